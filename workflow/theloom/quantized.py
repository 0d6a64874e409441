"""Quantised weights: what a checkpoint says of its own, what is resident of them, and their shapes for traces.

Linear layers are made here as bitsandbytes holds and runs them, in shapes alone, where no kernel runs.

Sizes follow bitsandbytes 0.50: LLM.int8() keeps a byte a weight and a 4-byte scale for each output row, and its product
makes the rows in int8, an int32 result and a float16 one; NF4 keeps half a byte a weight and a 4-byte scale for each 64
weights, and the whole weight is made 16-bit for each product. Where these scales are quantised once more, they are a
byte each, with a 4-byte scale for each 256 and a table of 256 numbers.
"""

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from theloom.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NF4_BLOCK = 64
SCALES_BLOCK = 256


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
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    odd = [name for name, m in model.named_modules() if isinstance(m, Linear4bit) and m.in_features % NF4_BLOCK]
    if odd and has_avx512bf16():
        raise ModelError(
            f"bitsandbytes runs 4-bit weights on this CPU where their width is a multiple of {NF4_BLOCK}, "
            f"which that of {odd[0]} is not; set memory.quantization=8bit or null"
        )


def resident(model: nn.Module) -> int:
    """Bytes of all weights and buffers of a real model, and of the scales that bitsandbytes keeps beside them."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(held.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            parts = vars(state)
            yield from (v for v in parts.values() if isinstance(v, torch.Tensor))
            state = parts.get("state2")
    for module in model.modules():
        places = [getattr(module, "weight", None), getattr(module, "state", None)]
        found = [getattr(place, name, None) for place in places for name in ("CB", "SCB")]
        yield from (v for v in found if isinstance(v, torch.Tensor))


def _said(model_config: "PretrainedConfig") -> dict[str, Any]:
    said: Any = getattr(model_config, "quantization_config", None) or {}
    return said if isinstance(said, dict) else said.to_dict()


class _Int8Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(linear.out_features, dtype=torch.float32))
        self.bias, self.out = linear.bias, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        half = x.to(torch.float16)
        quantized, row_scale = half.new_empty(x.shape, dtype=torch.int8), half.new_empty(rows, dtype=torch.float32)
        product = half.new_empty((rows, self.out), dtype=torch.int32)
        result = half.new_empty((*x.shape[:-1], self.out), dtype=torch.float16)
        del half, quantized, row_scale, product
        return result.to(x.dtype)


class _NF4Linear(nn.Module):
    def __init__(self, linear: nn.Linear, double: bool = False) -> None:
        super().__init__()
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
        return nn.functional.linear(x, x.new_empty(self.shape), self.bias)


def quantize(model: nn.Module, kind: str, model_config: "PretrainedConfig | None" = None) -> None:
    """Replace every linear layer but the LM head, as `int8` or `int4`; a quantised checkpoint's as its config says."""
    said = _said(model_config) if model_config is not None else {}
    left = said.get("llm_int8_skip_modules") or ()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head and not _named(f"{path}.{name}", left):
                double = bool(said.get("bnb_4bit_use_double_quant"))
                setattr(parent, name, _Int8Linear(child) if kind == "int8" else _NF4Linear(child, double))


def _named(path: str, names: Collection[str]) -> bool:
    return any(f".{name}." in f".{path}." for name in names)
