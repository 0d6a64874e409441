"""What stands in for a model's code where it would look at values, which fake tensors have not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.integrations import moe

_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Replace what needs values or a kernel by something of the same result's shape.

    Packed sequences are looked for in the position ids, and where one cannot look a b×s×s mask is
    made; the grouped product of experts has no fake kernel for every dtype; code that looks for
    what is not zero finds everything (`_EverythingIsNonzero`). PyTorch prints no traceback of its
    own where an operation fails: the caller reports that.
    """
    packed, grouped = masking_utils.find_packed_sequence_indices, moe._grouped_mm
    level = _FAKE_TENSOR_LOG.level
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    moe._grouped_mm = _grouped_product
    _FAKE_TENSOR_LOG.setLevel(logging.CRITICAL + 1)
    try:
        with _EverythingIsNonzero():
            yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._grouped_mm = packed, grouped
        _FAKE_TENSOR_LOG.setLevel(level)


def _grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: A002
    return input.new_empty(input.shape[0], weight.shape[-1], dtype=weight.dtype)


class _EverythingIsNonzero(TorchDispatchMode):
    """Answers `nonzero` of a fake tensor as if all its entries were not zero, with real indices.

    So experts that look for their tokens get all tokens, which is the most that it can take, and a
    loop over the experts that have tokens is one over all experts.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if func is torch.ops.aten.nonzero.default and fake:
            with unset_fake_temporarily():
                return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        if tensors and not fake:  # indices that came from here
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
