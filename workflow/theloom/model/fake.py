"""Models on fake tensors: the real classes with shapes and no bytes, quantised ones too."""

import copy
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, initialization
from transformers.pytorch_utils import Conv1D

from theloom.errors import ModelError
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.hooks.catalog import build_catalog
from theloom.hooks.failures import MODEL_ERRORS, refused, why
from theloom.hooks.layouts.trial import cannot_run
from theloom.hooks.points import HookCatalog, HookPoint
from theloom.model import pruning
from theloom.model.checkpoint.classes import auto_class, has_own_code
from theloom.model.checkpoint.limits import bounded_build
from theloom.model.length_switches import fix_frequencies
from theloom.model.quantization import packed_on_the_cpu
from theloom.model.weight_format import nf4_scales, quantization_config
from theloom.model.without_bytes.mode import WithoutBytes
from theloom.model.without_bytes.shapes_only import shapes_only, with_values_if_needed
from theloom.precision import torch_dtype
from theloom.rows.tower_inputs import has_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")

# What was found of models in this process, by the model and the question: the stages of a run, and
# runs of one model, ask again. Numbers and names, not the models
_FOUND: dict[tuple[Any, ...], Any] = {}
_MOST_FOUND = 512


class Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(linear.out_features, dtype=torch.float32))
        self.bias, self.out = linear.bias, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Make the tensors that LLM.int8() makes, without computing.

        Args:
            x: (…, in), fake.

        Returns:
            (…, out) in the dtype of `x`.
        """
        rows = x.numel() // x.shape[-1]
        half = x.to(torch.float16)
        scaled = (
            [x.new_empty((9, *x.shape), dtype=torch.int8)] if self.on_cpu else []
        )  # twice in FP32, and outliers
        scaled.clear()
        quantized, row_scale = (
            half.new_empty(x.shape, dtype=torch.int8),
            half.new_empty(rows, dtype=torch.float32),
        )
        if self.on_cpu:
            del half
            product = x.new_empty((rows, self.out), dtype=torch.int32)
            factors, converted, exact = (
                x.new_empty((*x.shape[:-1], self.out), dtype=torch.float32) for _ in range(3)
            )
            del factors, converted, quantized
            return exact.to(x.dtype)
        product = half.new_empty((rows, self.out), dtype=torch.int32)
        result = half.new_empty((*x.shape[:-1], self.out), dtype=torch.float16)
        del half, quantized, row_scale, product
        return result.to(x.dtype)


class NF4Linear(nn.Module):
    def __init__(self, linear: nn.Linear, double: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed
        count = linear.weight.numel()
        self.shape = linear.weight.shape
        self.register_buffer("weight", torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8))
        for number, (elements, size) in enumerate(nf4_scales(count, double)):
            dtype = torch.uint8 if size == 1 else torch.float32
            self.register_buffer(f"scales_{number}", torch.empty(elements, dtype=dtype))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Make the tensors that a 4-bit layer makes, without computing.

        Args:
            x: (…, in), fake.

        Returns:
            (…, out) in the dtype of `x`.
        """
        if not self.packed:
            return nn.functional.linear(x, x.new_empty(self.shape), self.bias)
        packing = x.new_empty((7, *self.shape), dtype=torch.uint8)
        del packing
        half = x.to(torch.bfloat16)
        product = half.new_empty((*x.shape[:-1], self.shape[0]))
        return product.to(x.dtype)


SCALED = (Int8Linear, NF4Linear)


def quantize(
    model: nn.Module,
    kind: str,
    model_config: "PretrainedConfig | None" = None,
    kernels: str = "cuda",
) -> None:
    """Replace every linear layer but the LM head by one that is quantised.

    Args:
        model: on fake tensors, which is changed.
        kind: `int8` or `int4`.
        model_config: of a quantised checkpoint, whose config says what is quantised and how; None:
            of one that is not.
        kernels: bitsandbytes' for `cuda` or `cpu`.
    """
    on_cpu, packed = kernels == "cpu", kernels == "cpu" and kind == "int4" and packed_on_the_cpu()
    said = quantization_config(model_config) if model_config is not None else {}
    left = said.get("llm_int8_skip_modules") or ()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child) and child is not head and not _named(f"{path}.{name}", left):
                linear = child if isinstance(child, nn.Linear) else _turned(child)
                double = bool(said.get("bnb_4bit_use_double_quant"))
                layer = (
                    Int8Linear(linear, on_cpu)
                    if kind == "int8"
                    else NF4Linear(linear, double, packed)
                )
                setattr(parent, name, layer)


def is_linear(module: nn.Module) -> bool:
    """Whether bitsandbytes takes it: a linear layer, or GPT-2's that is one.

    Args:
        module: any module.

    Returns:
        True for these two.
    """
    return isinstance(module, Conv1D) or type(module) is nn.Linear


def _turned(layer: Conv1D) -> nn.Linear:
    """GPT-2's layer as the linear one that it is, its weight the other way round."""
    linear = nn.Linear(layer.nx, layer.nf, dtype=layer.weight.dtype)
    linear.bias = layer.bias
    return linear


def _named(path: str, names: Collection[str]) -> bool:
    return any(f".{name}." in f".{path}." for name in names)


@dataclass(frozen=True)
class FakeModel:
    """A model without bytes: what a trace runs."""

    model: "PreTrainedModel"
    mode: WithoutBytes
    precision: str
    identity: object  # equal where passes are alike

    @cached_property
    def architecture(self) -> Architecture:
        """What the model consists of: found by a pass, which weights alone do not need."""
        model = self.model

        def describe() -> Architecture:
            with self.mode, shapes_only(has_values(model.config)):
                return find_blocks(model)

        return with_values_if_needed(model.config, describe)

    def remembered(self, about: tuple[Any, ...], find: Callable[[], T]) -> T:
        """Find something of the model, unless it was found of one like it in this process.

        Args:
            about: the question.
            find: answers it; not called where the answer is known.

        Returns:
            The answer, which is not to be changed.
        """
        # kernels of the CPU take memory by their threads and by who computes
        kernels = (torch.get_num_threads(), torch.backends.mkldnn.enabled)
        key = (self.identity, *kernels, *about)
        if key not in _FOUND:
            answer = find()
            if len(_FOUND) >= _MOST_FOUND:
                del _FOUND[next(iter(_FOUND))]
            _FOUND[key] = answer
        return _FOUND[key]

    @property
    def weights(self) -> list[int]:
        """Bytes of every storage of the model."""
        return pruning.storages(self.model)

    def unneeded(self, points: Sequence[HookPoint]) -> list[str]:
        """Find the modules that reading hook points does not need (`pruning.unneeded`).

        Args:
            points: the hook points to read.

        Returns:
            Names of modules.
        """
        names = self.remembered(
            ("unneeded", tuple(points)),
            lambda: self._run(lambda: pruning.unneeded(self.architecture, points)),
        )
        return list(names)

    @property
    def catalog(self) -> HookCatalog:
        """The hook points that can be read from the model."""
        known = self.remembered(
            ("catalog",), lambda: self._run(lambda: build_catalog(self.architecture))
        )
        return HookCatalog(list(known.points), dict(known.unsupported))

    def _run(self, run: Callable[[], T]) -> T:
        """What runs the model; its errors are ModelErrors."""
        model = self.architecture.model  # found before its mode is entered

        def without_bytes() -> T:
            with self.mode, shapes_only(has_values(model.config)), refused(cannot_run(model)):
                return run()

        return with_values_if_needed(model.config, without_bytes)

    @property
    def residuals(self) -> list[HookPoint]:
        """The residual stream before and after every block, or the outputs of all stages."""
        return self.architecture.stream


def fake_model(
    model_config: "PretrainedConfig",
    precision: str,
    quantization: str | None = None,
    attention: str | None = None,
    lm_head: bool = False,
    trust_remote_code: bool = False,
    kernels: str = "cuda",
) -> FakeModel:
    """Build the classes that extraction loads on fake tensors.

    Args:
        model_config: of transformers; it is copied.
        precision: `fp32`, `fp16` or `bf16`.
        quantization: `int8`, `int4` or None.
        attention: its implementation; None: the model's default.
        lm_head: with the LM head.
        trust_remote_code: run Python code that comes with the model.
        kernels: bitsandbytes' for `cuda` or `cpu`.

    Returns:
        The model without bytes.

    Raises:
        ModelError: it cannot be built so.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    build = AutoModelForCausalLM if lm_head else auto_class(model_config, trust_remote_code)
    mode = WithoutBytes()
    try:
        # on `meta` no weight is initialised, as when transformers loads a model: code that looks at
        # values would fail
        with (
            bounded_build(),
            torch.device("meta"),
            initialization.meta_device_safe_creation_ops(),
        ):
            model = build.from_config(
                copy.deepcopy(model_config),  # it may be that of a loaded model
                dtype=torch_dtype(precision),
                trust_remote_code=trust_remote_code,
                **options,
            )
        with mode:
            _to_fake(model)
            fix_frequencies(model)
            if quantization is not None:
                quantize(model, quantization, model_config, kernels)
    except (*MODEL_ERRORS, ImportError) as error:
        raise ModelError(f"{model_config.model_type}: cannot be built: {why(error)}") from None
    model.eval().requires_grad_(False)
    identity = _identity(model, precision, quantization, kernels)
    if has_own_code(model_config, trust_remote_code):
        identity = object()
    return FakeModel(model, mode, precision, identity)


def _identity(model: "PreTrainedModel", *build: str | None) -> object:
    """All that passes of a model of transformers' own classes depend on; not the folder that its
    config names.
    """
    said = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    attention = model.config._attn_implementation
    return type(model), json.dumps(said, default=str), attention, *build


def _to_fake(model: "PreTrainedModel") -> None:
    """Put a model of `meta` tensors on fake tensors of the CPU. Weights that are shared stay so."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:  # the original is kept, so that its id stays its own
            # from numbers alone a result is looked up: a tensor of `meta` is converted each time
            new = (
                torch.empty(tensor.shape, dtype=tensor.dtype)
                if tensor.is_contiguous()
                else torch.empty_like(tensor, device="cpu")
            )
            made[id(tensor)] = (tensor, new)
        return made[id(tensor)][1]

    model._apply(fake)
    model.tie_weights()
