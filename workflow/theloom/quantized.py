"""Linear layers as bitsandbytes holds and runs them, in shapes alone: for traces, where no kernel runs.

Sizes follow bitsandbytes 0.50: LLM.int8() keeps a byte a weight and a 4-byte scale for each output row, and its product
makes the rows in int8, an int32 result and a float16 one; NF4 keeps half a byte a weight and a 4-byte scale for each 64
weights, and the whole weight is made 16-bit for each product.
"""

import math

import torch
from torch import nn

NF4_BLOCK = 64


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
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        count = linear.weight.numel()
        self.shape = linear.weight.shape
        self.register_buffer("weight", torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(math.ceil(count / NF4_BLOCK), dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, x.new_empty(self.shape), self.bias)


def quantize(model: nn.Module, kind: str) -> None:
    """Replace every linear layer but the LM head, as `int8` or `int4`."""
    replacement = {"int8": _Int8Linear, "int4": _NF4Linear}[kind]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, replacement(child))
