"""Quantised weights: what a checkpoint says of its own, what is resident of them, and their shapes for traces.

Linear layers are made here as bitsandbytes holds and runs them, in shapes alone, where no kernel runs.

Sizes follow bitsandbytes 0.50: LLM.int8() keeps a byte a weight and a 4-byte scale for each output row, and its product
makes the rows in int8, an int32 result and a float16 one; NF4 keeps half a byte a weight and a 4-byte scale for each 64
weights, and the whole weight is made 16-bit for each product. Where these scales are quantised once more, they are a
byte each, with a 4-byte scale for each 256 and a table of 256 numbers.

On the CPU the 8-bit product is scaled in FP32, with three tables of its size beside it. Where the processor has
AVX512-BF16, a 4-bit weight is packed anew at its first product, which takes 7 bytes a weight, and products are in BF16.
"""

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from theloom.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NF4_BLOCK = 64
SCALES_BLOCK = 256
PACKED_ROWS = 32


def own(model_config: "PretrainedConfig") -> str | None:
    """`8bit` or `4bit` for a checkpoint that bitsandbytes has quantised, None for one that is as it was trained.

    Raises ModelError for other kinds of quantisation, whose sizes are not known here.
    """
    said = _said(model_config)
    method = said.get("quant_method")
    method = str(getattr(method, "value", method) or "an unnamed method")
    if not said or method == "gguf":  # GGUF is made whole when it is converted
        return None
    if not method.startswith("bitsandbytes"):
        raise ModelError(
            f"its weights are quantised by {method}, and TheLoom knows the memory of "
            "bitsandbytes alone; take its unquantised weights, with memory.quantization where they are too large"
        )
    return "4bit" if said.get("load_in_4bit") or said.get("_load_in_4bit") else "8bit"


def check_runs_on_the_cpu(model: nn.Module) -> None:
    """Raises ModelError where bitsandbytes' product for 4-bit weights on this CPU does not take their widths."""
    from bitsandbytes.nn import Linear4bit

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    for name, layer in layers if _packed_on_the_cpu() else ():
        for what, found, unit in (
            ("width", layer.in_features, NF4_BLOCK),
            ("number of rows", layer.out_features, PACKED_ROWS),
        ):
            if found % unit:
                raise ModelError(
                    f"bitsandbytes runs 4-bit weights on this CPU where their {what} is a multiple of {unit}, "
                    f"which that of {name} is not; set memory.quantization=8bit or null"
                )


def resident(model: nn.Module) -> int:
    """Bytes of all weights and buffers of a real model, and of the scales that bitsandbytes keeps beside them."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(held.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in [*model.parameters(), *model.buffers()]:
        yield from with_scales(tensor)
    for module in model.modules():
        found = [getattr(getattr(module, "state", None), name, None) for name in ("CB", "SCB")]
        yield from (v for v in found if isinstance(v, torch.Tensor))


def with_scales(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A weight and what bitsandbytes keeps beside it, before the first product."""
    yield tensor
    yield from (v for name in ("CB", "SCB") if isinstance(v := getattr(tensor, name, None), torch.Tensor))
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        parts = vars(state)
        yield from (v for v in parts.values() if isinstance(v, torch.Tensor))
        state = parts.get("state2")


def _said(model_config: "PretrainedConfig") -> dict[str, Any]:
    said: Any = getattr(model_config, "quantization_config", None) or {}
    return said if isinstance(said, dict) else said.to_dict()


class _Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(linear.out_features, dtype=torch.float32))
        self.bias, self.out = linear.bias, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        half = x.to(torch.float16)
        scaled = [x.new_empty((9, *x.shape), dtype=torch.int8)] if self.on_cpu else []  # twice in FP32, and outliers
        scaled.clear()
        quantized, row_scale = half.new_empty(x.shape, dtype=torch.int8), half.new_empty(rows, dtype=torch.float32)
        if self.on_cpu:
            del half
            product = x.new_empty((rows, self.out), dtype=torch.int32)
            factors, converted, exact = (x.new_empty((*x.shape[:-1], self.out), dtype=torch.float32) for _ in range(3))
            del factors, converted, quantized
            return exact.to(x.dtype)
        product = half.new_empty((rows, self.out), dtype=torch.int32)
        result = half.new_empty((*x.shape[:-1], self.out), dtype=torch.float16)
        del half, quantized, row_scale, product
        return result.to(x.dtype)


class _NF4Linear(nn.Module):
    def __init__(self, linear: nn.Linear, double: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed
        count = linear.weight.numel()
        self.shape = linear.weight.shape
        self.register_buffer("weight", torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8))
        scales = math.ceil(count / NF4_BLOCK)
        self.register_buffer("absmax", torch.empty(scales, dtype=torch.uint8 if double else torch.float32))
        if double:
            self.register_buffer("absmax_of_absmax", torch.empty(math.ceil(scales / SCALES_BLOCK), dtype=torch.float32))
            self.register_buffer("code", torch.empty(256, dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            return nn.functional.linear(x, x.new_empty(self.shape), self.bias)
        packing = x.new_empty((7, *self.shape), dtype=torch.uint8)
        del packing
        half = x.to(torch.bfloat16)
        product = half.new_empty((*x.shape[:-1], self.shape[0]))
        return product.to(x.dtype)


SCALED = (_Int8Linear, _NF4Linear)


def quantize(
    model: nn.Module, kind: str, model_config: "PretrainedConfig | None" = None, kernels: str = "cuda"
) -> None:
    """Replace every linear layer but the LM head, as `int8` or `int4`; a quantised checkpoint's as its config says.

    `kernels`: those of cuda or of the cpu.
    """
    on_cpu, packed = kernels == "cpu", kernels == "cpu" and kind == "int4" and _packed_on_the_cpu()
    said = _said(model_config) if model_config is not None else {}
    left = said.get("llm_int8_skip_modules") or ()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child) and child is not head and not _named(f"{path}.{name}", left):
                linear = child if isinstance(child, nn.Linear) else _turned(child)
                double = bool(said.get("bnb_4bit_use_double_quant"))
                layer = _Int8Linear(linear, on_cpu) if kind == "int8" else _NF4Linear(linear, double, packed)
                setattr(parent, name, layer)


def is_linear(module: nn.Module) -> bool:
    """Whether bitsandbytes takes it: a linear layer, or GPT-2's that is one."""
    return isinstance(module, Conv1D) or type(module) is nn.Linear


def _turned(layer: Conv1D) -> nn.Linear:
    """GPT-2's layer as the linear one that it is, its weight the other way round."""
    linear = nn.Linear(layer.nx, layer.nf, dtype=layer.weight.dtype)
    linear.bias = layer.bias
    return linear


def _packed_on_the_cpu() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _named(path: str, names: Collection[str]) -> bool:
    return any(f".{name}." in f".{path}." for name in names)
