"""What stands in for a model's code where it would look at values, which fake tensors have not."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.integrations import moe

from theloom.hooks.failures import MODEL_ERRORS

_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def shapes_only(known: bool = False) -> Iterator[None]:
    """Replace what needs values or a kernel by something of the same result's shape.

    Packed sequences are looked for in the position ids, and where one cannot look a b×s×s mask is
    made; a causal model gets no padding, so a mask that it makes of ones is left out as it is of
    values; the grouped product of experts has no fake kernel for every dtype; code that looks for
    what is not zero finds everything (`_EverythingIsNonzero`). PyTorch prints no traceback of its
    own where an operation fails: the caller reports that.

    Args:
        known: some inputs are real tensors, such as the sizes of images: what is made of them alone
            has values.
    """
    packed, grouped = masking_utils.find_packed_sequence_indices, moe._grouped_mm
    ignored = masking_utils._ignore_causal_mask_sdpa
    level = _FAKE_TENSOR_LOG.level
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils._ignore_causal_mask_sdpa = lambda padding_mask, *args, **named: ignored(
        None, *args, **named
    )
    moe._grouped_mm = _grouped_product
    _FAKE_TENSOR_LOG.setLevel(logging.CRITICAL + 1)
    try:
        with _EverythingIsNonzero(known):
            yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._grouped_mm = packed, grouped
        masking_utils._ignore_causal_mask_sdpa = ignored
        _FAKE_TENSOR_LOG.setLevel(level)


def _grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: A002
    return input.new_empty(input.shape[0], weight.shape[-1], dtype=weight.dtype)


class _EverythingIsNonzero(TorchDispatchMode):
    """Answers `nonzero` of a fake tensor as if all its entries were not zero, with real indices.

    So experts that look for their tokens get all tokens, which is the most that it can take, and a
    loop over the experts that have tokens is one over all experts. An operation that fails after
    such an answer does so for want of values.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper costs 10 µs an operation

    def __init__(self, known: bool = False) -> None:
        super().__init__()
        self.answered = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.answered:
            return self._run(func, args, kwargs or {})
        leaves = tree_leaves((args, kwargs))
        indices = (
            any(isinstance(x, torch.Tensor) for x in leaves) or _counts(func, leaves)
        ) and not any(isinstance(x, FakeTensor) for x in leaves)
        try:
            with unset_fake_temporarily() if indices else nullcontext():
                return self._run(func, args, kwargs or {})
        except MODEL_ERRORS:
            raise DataDependentOutputException(func) from None

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _MADE_OF_NONZERO and isinstance(args[0], FakeTensor):
            with self:
                return func.decompose(*args, **kwargs)
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            return self._every_index(args[0])
        if func is torch.ops.aten.index.Tensor:
            without_masks = [self._without_mask(index) for index in args[1]]
            return func(args[0], [index for found in without_masks for index in found])
        return func(*args, **kwargs)

    def _every_index(self, tensor: torch.Tensor) -> torch.Tensor:
        self.answered = True
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=torch.bool).nonzero()

    def _without_mask(self, index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        """An index, or those of all entries of a mask."""
        if isinstance(index, FakeTensor) and index.dtype == torch.bool:
            return self._every_index(index).unbind(1)
        return [index]


def _counts(func: Any, leaves: Sequence[Any]) -> bool:
    """Whether an operation gives the integers of a range, which have values without any tensor."""
    return func in _RANGES and not any(
        isinstance(x, float) or (isinstance(x, torch.dtype) and x.is_floating_point) for x in leaves
    )


_RANGES = tuple(getattr(torch.ops.aten.arange, name) for name in ("default", "start", "start_step"))

_MADE_OF_NONZERO = (
    torch.ops.aten.where.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.argwhere.default,
)
