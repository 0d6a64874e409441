"""Attention on CUDA: grouped queries, so that a fused kernel takes them, and no wait of the host.

transformers has torch's attention share keys among a group's queries (`enable_gqa`). On CUDA the
kernels that share them want 16 bits and compute capability 8.0; elsewhere torch takes its plain
products, with scores of tokens × tokens for every head. With keys and values repeated, torch's
memory-efficient kernel takes FP32 and older GPUs too; the sums are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import masking_utils
from transformers.integrations import sdpa_attention

from theloom.devices import accelerator
from theloom.precision import BF16_CAPABILITY

_shared_by_transformers = sdpa_attention.use_gqa_in_sdpa
_packed_by_transformers = masking_utils.find_packed_sequence_indices
_one_document_a_row: ContextVar[bool] = ContextVar("one_document_a_row", default=False)
_traced: ContextVar[tuple[int, int] | None] = ContextVar("traced", default=None)


def repeat_keys_where_needed() -> None:
    """From now on, have transformers' attention repeat keys where no fused kernel shares them."""
    sdpa_attention.use_gqa_in_sdpa = _shares_keys


@contextmanager
def traced_as_cuda(capability: tuple[int, int] = BF16_CAPABILITY) -> Iterator[None]:
    """Within the context, attention on any device repeats keys as it would on such a GPU.

    Args:
        capability: the compute capability of the GPU.
    """
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


@contextmanager
def one_document_a_row() -> Iterator[None]:
    """Have positions count from 0 in every row of a batch within the context, without looking at
    them. transformers asks on the device whether a row has several documents, and the host waits
    for the answer in every forward pass.
    """
    masking_utils.find_packed_sequence_indices = _packed
    token = _one_document_a_row.set(True)
    try:
        yield
    finally:
        _one_document_a_row.reset(token)


def _packed(position_ids: torch.Tensor) -> torch.Tensor | None:
    return None if _one_document_a_row.get() else _packed_by_transformers(position_ids)
