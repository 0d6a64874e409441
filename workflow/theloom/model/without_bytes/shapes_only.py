"""What stands in for a model's code where it would look at values, which fake tensors have not."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import masking_utils
from transformers.integrations import moe

from theloom.hooks.failures import MODEL_ERRORS, NEED_VALUES, ValuesNeededError
from theloom.rows.tower_inputs import has_values, mark_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def shapes_only(known: bool = False) -> Iterator[None]:
    """Replace what needs values or a kernel by something of the same result's shape.

    Packed sequences are looked for in the position ids, and where one cannot look a b×s×s mask is
    made; a causal model gets no padding, so a mask that it makes of ones is left out as it is of
    values; the grouped product of experts has no fake kernel for every dtype; code that looks for
    what is not zero finds everything (`_EverythingIsNonzero`); and a module that is converted to a
    dtype in a pass gets new tensors, which torch would swap. PyTorch prints no traceback of its
    own where an operation fails: the caller reports that.

    Args:
        known: some inputs are real tensors, such as the sizes of images: what is made of them alone
            has values.
    """
    packed, grouped = masking_utils.find_packed_sequence_indices, moe._grouped_mm
    ignored, convert = masking_utils._ignore_causal_mask_sdpa, nn.Module._apply
    entry, listed = FakeTensor.__getitem__, FakeTensor.tolist
    silent = _FAKE_TENSOR_LOG.disabled
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils._ignore_causal_mask_sdpa = lambda padding_mask, *args, **named: ignored(
        None, *args, **named
    )
    moe._grouped_mm = _grouped_product
    nn.Module._apply = _converted  # type: ignore[method-assign]
    FakeTensor.__getitem__ = _entry  # type: ignore[assignment]
    FakeTensor.tolist = _listed  # type: ignore[method-assign]
    _FAKE_TENSOR_LOG.disabled = True
    try:
        with _EverythingIsNonzero(known):
            yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._grouped_mm = packed, grouped
        masking_utils._ignore_causal_mask_sdpa = ignored
        nn.Module._apply = convert  # type: ignore[method-assign]
        FakeTensor.__getitem__ = entry  # type: ignore[method-assign]
        FakeTensor.tolist = listed  # type: ignore[method-assign]
        _FAKE_TENSOR_LOG.disabled = silent


def _converted(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Convert the tensors of a module, as routers do in a pass: torch cannot swap fake ones."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None and (new := function(parameter)) is not parameter:
            self._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        self._buffers[name] = buffer if buffer is None else function(buffer)
    return self


def _entry(self: FakeTensor, index: Any) -> Any:
    """An entry of a tensor; its last one for an expert that there is not. DBRX counts in a class
    more than it has experts, which is never hit in a run, and always where everything is.
    """
    if isinstance(index, torch.Tensor) and not index.ndim and not isinstance(index, FakeTensor):
        with unset_fake_temporarily():
            index = index if index.dtype == torch.bool else index.clamp(max=self.shape[0] - 1)
    return torch.Tensor.__getitem__(self, index)


def _listed(self: FakeTensor) -> Any:
    """The numbers of a tensor. How many tokens go to each expert is not known, but how many do in
    all: each gets as many as the next one, and what experts take in turn is the same in sum.
    """
    hits = getattr(self, _HITS, None)
    if hits is None or self.dim() != 1:
        return _TOLIST(self)
    share, more = divmod(hits, len(self))
    return [share + (number < more) for number in range(len(self))]


_TOLIST = FakeTensor.tolist

T = TypeVar("T")


def with_values_if_needed(config: "PretrainedConfig", run: Callable[[], T]) -> T:
    """Run a model without bytes; where its code decides by values, once more with real token ids,
    so that what follows from these alone, such as the lengths of documents, has values.

    Args:
        config: of the model, on which it is marked that ids are real (`has_values`).
        run: runs it, in a `shapes_only` by that mark.

    Returns:
        What `run` gives.
    """
    try:
        return run()
    except (ValuesNeededError, *NEED_VALUES):
        if has_values(config):
            raise
    mark_values(config, True)
    try:
        return run()
    except BaseException:
        mark_values(config, False)
        raise


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
        self.answered = self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.answered:
            return self._run(func, args, kwargs or {})
        leaves = tree_leaves((args, kwargs))
        if self._known and any(map(_constant, leaves)):
            args, kwargs = tree_map(_of_constant, (args, kwargs))
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
            if isinstance(args[0], FakeTensor):
                args = (args[0], [found for index in args[1] for found in _places(index)])
            without_masks = [self._without_mask(index) for index in args[1]]
            return func(args[0], [index for found in without_masks for index in found])
        result = func(*args, **kwargs)
        if func in _OF_ROUTERS and isinstance(args[0], FakeTensor):
            _follow(func, args, result)
        return result

    def _every_index(self, tensor: torch.Tensor) -> torch.Tensor:
        self.answered = True
        axes = getattr(tensor, _AXES, ())
        with unset_fake_temporarily():
            every = torch.ones(tensor.shape, dtype=torch.bool)
            if sorted(axes) == [_TOKEN, _CHOICE]:  # a token chooses an expert once
                every.narrow(axes.index(_CHOICE), 1, every.shape[axes.index(_CHOICE)] - 1).fill_(
                    False
                )
            return every.nonzero()

    def _without_mask(self, index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        """An index, or those of all entries of a mask."""
        if isinstance(index, FakeTensor) and index.dtype == torch.bool:
            return self._every_index(index).unbind(1)
        return [index]


def _places(index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """An index, or those of the entries of a mask that has values."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


def _constant(value: Any) -> bool:
    """Whether a tensor without bytes is of a number in the model's code, as `torch.tensor(0.0)`."""
    return isinstance(value, FakeTensor) and value.constant is not None


def _of_constant(value: Any) -> Any:
    return value.constant if _constant(value) else value


def _counts(func: Any, leaves: Sequence[Any]) -> bool:
    """Whether an operation gives a mask of ones, one of zeros for a list of tokens, a single number
    or the integers of a range, which have values without any tensor.
    """
    if func in (torch.ops.aten.ones.default, torch.ops.aten.scalar_tensor.default):
        return True
    if func is torch.ops.aten.zeros.default:
        sizes = [x for x in leaves if type(x) is int]
        return not sizes or (torch.bool in leaves and math.prod(sizes) <= _TOKENS)
    return func in _RANGES and not any(
        isinstance(x, float) or (isinstance(x, torch.dtype) and x.is_floating_point) for x in leaves
    )


_TOKENS = 1 << 24  # of a mask at most, whose bytes are real: none of tokens by tokens

_RANGES = tuple(getattr(torch.ops.aten.arange, name) for name in ("default", "start", "start_step"))

# what a router makes of its choice: how many entries of a mask are one, and which axis is which
_HITS, _AXES = "_entries_that_are_one", "_axes_of_choice"
_TOKEN, _CHOICE, _EXPERT = range(3)
_aten = torch.ops.aten
_OF_ROUTERS = (
    _aten.scatter.value,
    _aten._to_copy.default,
    _aten.to.dtype,  # the same, as it arrives under inference mode
    _aten.sum.dim_IntList,
    _aten.topk.default,
    _aten.one_hot.default,
    _aten.unsqueeze.default,  # one_hot in parts: compared to the numbers of experts
    _aten.eq.Tensor,
    _aten.permute.default,
    _aten.select.int,
    _aten.squeeze.dim,
)


def _follow(func: Any, args: Any, result: Any) -> None:
    """Note of a tensor what a router made it of."""
    if func is _aten.topk.default:
        if result[1].ndim == 2:
            setattr(result[1], _AXES, (_TOKEN, _CHOICE))
        return
    hits = getattr(args[0], _HITS, None)
    if func is _aten.scatter.value and args[3] == 1:
        setattr(result, _HITS, args[2].numel())
    elif hits is not None and func in (
        _aten._to_copy.default,
        _aten.to.dtype,
        _aten.sum.dim_IntList,
    ):
        setattr(result, _HITS, hits)
    axes = list(getattr(args[0], _AXES, ()))
    if not axes or func is _aten.sum.dim_IntList:
        return
    if func is _aten.unsqueeze.default and args[1] not in (-1, len(axes)):
        return
    if func is _aten.one_hot.default or func is _aten.unsqueeze.default:
        axes.append(_EXPERT)
    elif func is _aten.permute.default:
        axes = [axes[axis] for axis in args[1]]
    elif func is _aten.select.int or (func is _aten.squeeze.dim and result.ndim < len(axes)):
        axes.pop(args[1])
    setattr(result, _AXES, tuple(axes))


_MADE_OF_NONZERO = (
    torch.ops.aten.where.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.argwhere.default,
)
