"""Weights quantised as they come from their files, one tensor at a time, as transformers quantises
a whole model.

Which layers are replaced, in what precision a weight is before it is quantised, and the
quantisation itself are those of `from_pretrained`: its quantizer prepares the empty model, and its
own loading makes a part's tensors. Checkpoints that bitsandbytes has quantised take the same way,
with the quantizer that puts their tensors together.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.utils import logging as transformers_logging

from theloom.model import quantization
from theloom.model.weight_format import quantized_bytes, quantizing_bytes

CODE = 16 * 4  # bytes of NF4's own table of numbers


def quantizer(bits: str, model_config: PretrainedConfig, precision: str) -> HfQuantizer:
    """Make what quantises a model on loading, or loads what a checkpoint says it is quantised to
    already.

    Args:
        bits: `8bit` or `4bit`; not used where the checkpoint is quantised.
        model_config: of the checkpoint.
        precision: `fp32`, `fp16` or `bf16`: of what is not quantised.

    Returns:
        The quantiser of transformers; its environment is checked.
    """
    own = getattr(model_config, "quantization_config", None)
    requested = quantization.bitsandbytes_config(bits, precision) if own is None else own
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(requested, pre_quantized=own is not None)
    quantizer.validate_environment()
    return quantizer


def replace_layers(
    model: PreTrainedModel, quantizer: HfQuantizer, dtype: torch.dtype, device: torch.device
) -> None:
    """Put bitsandbytes' layers into a model on the meta device, where a quantised load has them.

    Args:
        model: which is changed.
        quantizer: of `quantizer`.
        dtype: of what is not quantised.
        device: that the model is to run on.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # that of the new layers' biases
    try:
        quantizer.preprocess_model(
            model=model, dtype=dtype, device_map={"": device}, checkpoint_files=None
        )
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)


class OnDisk:
    """A tensor that is read when transformers asks for it."""

    def __init__(self, read: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        self._read, self._dtype = read, dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()

    def is_floating_point(self) -> bool:
        """As of a tensor; nothing is read.

        Returns:
            True for a floating-point dtype.
        """
        return self._dtype.is_floating_point


class PartLoader:
    """Makes the tensors of a part of a model, quantised where they are to be, in an `empty` model
    of its own.

    The model that runs is not touched, so that one block can be made while another computes.
    """

    def __init__(self, empty: PreTrainedModel, quantizer: HfQuantizer) -> None:
        self._model, self.quantizer = empty, quantizer
        self._mapping = get_model_conversion_mapping(empty, hf_quantizer=quantizer)

    def load(
        self, tensors: Mapping[str, OnDisk], names: Sequence[str], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Make tensors of the model from those of the files.

        Args:
            tensors: of the files, by key.
            names: of the parameters and buffers to make.
            device: that they are made on.

        Returns:
            The tensors by their names in the model.
        """
        model = self._model
        config = LoadStateDictConfig(
            weight_mapping=cast(Any, copy.deepcopy(self._mapping)),
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            hf_quantizer=self.quantizer,
        )
        empty = {name: model.get_parameter_or_buffer(name) for name in names}
        made = {}
        try:
            with quantization.one_tensor_at_a_time(), _no_progress_bar():
                convert_and_load_state_dict_in_model(model, dict(tensors), config)
        finally:
            for name, meta in empty.items():
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                tensor = getattr(module, leaf)
                if tensor is not meta:
                    made[name] = tensor.requires_grad_(False)
                    (module._parameters if leaf in module._parameters else module._buffers)[
                        leaf
                    ] = cast(Any, meta)
                release(module)
        return made


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without the bar that transformers shows for each load: there is one for each block here."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def quantized_bits(module: nn.Module) -> str | None:
    """Tell how many bits the weight of a layer has.

    Args:
        module: any module.

    Returns:
        `8bit` or `4bit` for a layer of bitsandbytes, else None.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return (
        "8bit"
        if isinstance(module, Linear8bitLt)
        else "4bit"
        if isinstance(module, Linear4bit)
        else None
    )


def release(module: nn.Module) -> None:
    """Drop what a layer of bitsandbytes keeps of its weight besides the parameter.

    Args:
        module: any module; nothing happens for one that is not quantised.
    """
    kind, layer = quantized_bits(module), cast(Any, module)
    if kind == "8bit":
        layer.state.reset_grads()
        layer.state.idx = layer.state.subB = layer.weight.SCB = None
    elif kind == "4bit":
        layer.quant_state = None


def held(module: nn.Module, leaf: str, tensor: torch.Tensor) -> int:
    """Bytes of a parameter or buffer once it is loaded, with the scales that are kept with it.

    Args:
        module: the module that has it.
        leaf: its name there, such as `weight`.
        tensor: which may be on the meta device.

    Returns:
        Bytes on the device.
    """
    kind, count = quantized_bits(module), tensor.numel()
    if kind is None or leaf != "weight":
        return count * tensor.element_size()
    layer = cast(Any, module)
    if kind == "8bit":
        return quantized_bytes("int8", count, int(layer.out_features))
    double = layer.weight.compress_statistics
    return CODE + quantized_bytes("int4", count, int(layer.out_features), double)


def staging(bits: str, count: int, stored: torch.dtype, precision: torch.dtype, device: str) -> int:
    """Bytes that quantising a weight takes on top of its result.

    On a GPU the weight in the model's precision, and for 8 bits in FP16 too. On the CPU
    bitsandbytes 0.50 (backends/default/ops.py) makes copies: for 8 bits one in FP16 and two in
    FP32; for 4 bits one in FP32, one of 32-bit numbers, one of bytes and half of that.

    Args:
        bits: `8bit` or `4bit`.
        count: elements of the weight.
        stored: the dtype in the file.
        precision: the model's dtype, from which the weight is quantised.
        device: `cpu`, or the type of a GPU.

    Returns:
        Bytes.

    Examples:
        >>> staging("8bit", 1000, torch.bfloat16, torch.bfloat16, "cpu")
        11000
    """
    size, half = precision.itemsize, 0 if precision == torch.float16 else 2
    if device != "cpu":
        return quantizing_bytes("int8" if bits == "8bit" else "int4", count, size)
    read = stored.itemsize + size if stored != precision else 0
    if bits == "8bit":
        return count * max(read, size + half + 7)
    return count * max(2 * read, 2 * (size + (0 if size == 4 else 4)) + 19) // 2


@contextmanager
def shapes_alone(model: nn.Module) -> Iterator[None]:
    """Have bitsandbytes' layers run on fake tensors, as linear layers of the same shapes.

    Args:
        model: whose quantised layers are replaced for a while.
    """

    def plain(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(
                x, x.new_empty(layer.out_features, layer.in_features), layer.bias
            )

        return forward

    layers: list[Any] = (
        [m for m in model.modules() if quantized_bits(m)]
        if getattr(model, "is_quantized", False)
        else []
    )
    for layer in layers:
        layer.forward = plain(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
