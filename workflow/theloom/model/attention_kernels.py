"""Grouped queries on CUDA, so that a fused attention kernel takes them.

transformers has torch's attention share keys among a group's queries (`enable_gqa`). On CUDA the
kernels that share them want 16 bits and compute capability 8.0; elsewhere torch takes its plain
products, with scores of tokens × tokens for every head. With keys and values repeated, torch's
memory-efficient kernel takes FP32 and older GPUs too; the sums are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers.integrations import sdpa_attention

from theloom.devices import accelerator
from theloom.precision import BF16_CAPABILITY

_shared_by_transformers = sdpa_attention.use_gqa_in_sdpa
_traced: ContextVar[tuple[int, int] | None] = ContextVar("traced", default=None)


def repeat_keys_where_needed() -> None:
    """From now on, have transformers' attention repeat keys where no fused kernel shares them."""
    sdpa_attention.use_gqa_in_sdpa = _shares_keys


@contextmanager
def traced_as_cuda(capability: tuple[int, int] = BF16_CAPABILITY) -> Iterator[None]:
    """Within the context, attention on any device repeats keys as it would on such a GPU."""
    repeat_keys_where_needed()
    token = _traced.set(capability)
    try:
        yield
    finally:
        _traced.reset(token)


def _shares_keys(
    attention_mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor
) -> bool:
    capability = _traced.get()
    if capability is None:
        capability = accelerator.capability(key.device)
    if capability is not None and (key.dtype == torch.float32 or capability < BF16_CAPABILITY):
        return False
    return _shared_by_transformers(attention_mask, key, value)
