"""What happens inside attention: queries and keys as they meet, their scores, and the pattern.

transformers hands queries, keys and values of most models to a function that it finds by name in a
registry. A layer that is requested its inside gets a function of ours by way of its own copy of the
config; all other layers keep theirs. That function runs the layer's eager attention, whose softmax
shows scores and pattern, only where these are requested. Attention classes that do not use the
registry, and call softmax themselves, are read at that softmax.
"""

import copy
import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from theloom.errors import HookError
from theloom.hooks.points import PATTERN, SCORES

if TYPE_CHECKING:
    from types import FunctionType


ROT_Q, ROT_K = "attn.hook_rot_q", "attn.hook_rot_k"
OURS = "theloom"

# scores below it are those of masked keys, which transformers sets to the least number of some
# dtype
MASKED = -3e4

Reader = Callable[
    [str, torch.Tensor], None
]  # called with a value's name in the block and the value


def uses_registry(core: torch.nn.Module) -> bool:
    """Whether a module that computes attention asks transformers' registry for the function that
    does.

    Args:
        core: a module that computes attention.

    Returns:
        True where it does, and has an eager function to fall back on.
    """
    return (
        "ALL_ATTENTION_FUNCTIONS" in _code(core).co_names
        and hasattr(core, "config")
        and _eager(core) is not None
    )


def rotates(core: torch.nn.Module) -> bool:
    """Whether a module that computes attention gives positions to its queries and keys by rotating
    them.

    Args:
        core: a module that computes attention.

    Returns:
        True by the names in its code: no tensor is looked at.
    """
    code = _code(core)
    names = {*code.co_names, *code.co_varnames}
    return any(word in name for name in names for word in ("rotary", "rope", "position_embeddings"))


class Inside:
    """Reads the inside of one attention module while the context is open.

    `wanted` holds names of values: `attn.hook_rot_q`, `attn.hook_rot_k`, `attn.hook_attn_scores`,
    `attn.hook_pattern`. `read` gets queries and keys as (batch, position, heads, head size), scores
    and pattern as (batch, heads, position, key), where keys are those that the layer holds.

    Raises:
        HookError: the module cannot show one of them.
    """

    def __init__(self, core: torch.nn.Module, wanted: Collection[str], read: Reader) -> None:
        self._core, self._wanted, self._read = core, frozenset(wanted), read
        self._was: Any = None
        self._registry = uses_registry(core)

    def __enter__(self) -> "Inside":
        core: Any = self._core
        if self._registry:
            if core in _open:
                raise HookError(f"the inside of {type(core).__name__} is being read already")
            self._was, own = core.config, copy.copy(core.config)
            own._attn_implementation_internal = OURS
            core.config, _open[core] = own, self
        else:
            self._was, inner = vars(core).get("forward"), core.forward
            core.forward = lambda *args, **kwargs: self._by_itself(inner, *args, **kwargs)
        return self

    def __exit__(self, *_: object) -> None:
        core: Any = self._core
        if self._registry:
            core.config = self._was
            del _open[core]
        elif self._was is None:
            del core.forward
        else:
            core.forward = self._was

    def call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        """Attention for the module at hand, as transformers' registry calls it; heads come before
        positions.

        Args:
            query: (batch, heads, position, head size).
            key: (batch, key heads, key, head size).
            value: (batch, key heads, key, head size).
            mask: as the model makes it.
            **options: of the registry, such as `scaling` and `dropout`.

        Returns:
            What the function of the registry returns: output and weights.
        """
        if ROT_Q in self._wanted:
            self._read(ROT_Q, query.transpose(1, 2))
        if ROT_K in self._wanted:
            self._read(ROT_K, key[:, :, -query.shape[2] :].transpose(1, 2))
        eager = _eager(self._core)
        assert eager is not None
        if not self._wanted & {SCORES, PATTERN}:
            core: Any = self._core
            ours, core.config = (
                core.config,
                self._was,
            )  # the function at hand may look at its name there
            try:
                usual = ALL_ATTENTION_FUNCTIONS.get_interface(
                    core.config._attn_implementation, eager
                )
                return usual(core, query, key, value, mask, **options)
            finally:
                core.config = ours
        with _Softmax(keep_input=SCORES in self._wanted) as softmax:
            output = eager(
                self._core,
                query,
                key,
                value,
                _additive(self._core, query, key, mask, options),
                **options,
            )
        self._show(softmax, key.shape[2], query.dtype)
        return output

    def _by_itself(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Softmax(keep_input=SCORES in self._wanted) as softmax:
            output = forward(*args, **kwargs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        self._show(softmax, None, first.dtype)
        return output

    def _show(self, softmax: "_Softmax", keys: int | None, dtype: torch.dtype) -> None:
        """Hand on what softmax was given and gave. Columns beyond the keys are sinks, which no
        token has.
        """
        name = type(self._core).__name__
        if len(softmax.seen) != 1:
            raise HookError(
                f"{name} took {len(softmax.seen)} softmaxes where one would be its attention "
                "pattern"
            )
        given, pattern = softmax.seen[0]
        if PATTERN in self._wanted:
            self._read(PATTERN, pattern[..., :keys].to(dtype))
        if given is not None:
            scores = given[..., :keys]
            self._read(SCORES, scores.masked_fill(scores < MASKED, -torch.inf))


_open: WeakKeyDictionary[torch.nn.Module, Inside] = WeakKeyDictionary()


def _dispatch(
    module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> Any:
    return _open[module].call(query, key, value, attention_mask, **options)


AttentionInterface.register(OURS, _dispatch)


class _Softmax(TorchFunctionMode):
    """Sees every softmax over the last of four axes: what it gave and, if that is to be kept, what
    it was given.
    """

    def __init__(self, keep_input: bool) -> None:
        super().__init__()
        self._keep_input = keep_input
        self.seen: list[tuple[torch.Tensor | None, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func in _SOFTMAX and result.ndim == 4:
            given: torch.Tensor = args[0] if args else options["input"]
            self.seen.append((given if self._keep_input else None, result))
        return result


_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


def _additive(
    core: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """The mask that eager attention adds to the scores, from the one that was made for another
    implementation.

    A fused implementation gets a Boolean mask, or one of the padding alone, or none at all where it
    masks by itself. Queries are the last tokens of the keys.
    """
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim in (2, 4)):
        raise HookError(
            f"attention scores and patterns cannot be read with a {type(mask).__name__}; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
    if mask is not None and mask.ndim == 4:
        allowed = mask
    else:
        said = options.get("is_causal")
        if getattr(core, "is_causal", True) if said is None else said:
            first = keys - queries
            behind = torch.arange(first, keys, device=query.device)[:, None] - torch.arange(
                keys, device=query.device
            )
            window = options.get("sliding_window") or keys
            allowed = allowed & (behind >= 0) & (behind < window)
        if mask is not None:
            allowed = allowed & mask[:, None, None, -keys:].bool()
    least = torch.finfo(query.dtype).min
    return torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~allowed, least
    )


def _code(core: torch.nn.Module) -> Any:
    return inspect.unwrap(type(core).forward).__code__


def _eager(core: torch.nn.Module) -> Callable[..., Any] | None:
    """The eager attention function that a module's own file has."""
    forward: FunctionType = inspect.unwrap(type(core).forward)
    name = next(
        (n for n in forward.__code__.co_names if "eager" in n and n in forward.__globals__), None
    )
    return forward.__globals__[name] if name else None
