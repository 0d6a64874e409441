"""How a model calls its blocks: the arguments of each call, recorded and checked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from theloom.devices.pinned import pinned_copy
from theloom.errors import ModelError
from theloom.hooks.blocks import Architecture
from theloom.hooks.failures import MODEL_ERRORS, why
from theloom.model.forward import PrefillCache
from theloom.model.length_switches import as_long_as, forget_lengths

RESIDUAL = "hidden_states"  # what blocks call it where it comes by name


class _Stop(Exception):  # noqa: N818
    """Ends the shell's forward once all is recorded."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block: all but the residual, whose place is kept, and the KV cache,
    which is not.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool  # whether the residual comes by name

    def run(self, block: nn.Module, residual: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Run a block as the model calls it.

        Args:
            block: the module.
            residual: what enters it, (batch, position, hidden size).
            cache: its KV cache; None: it has none.

        Returns:
            What leaves it, (batch, position, hidden size).
        """

        def fill(value: Any) -> Any:
            if value is CACHE:
                return cache
            return (
                value.to(residual.device, non_blocking=True)
                if isinstance(value, torch.Tensor)
                else value
            )

        args, kwargs = tree_map(fill, self.args), tree_map(fill, self.kwargs)
        output = (
            block(*args, **kwargs | {RESIDUAL: residual})
            if self.named
            else block(residual, *args, **kwargs)
        )
        return output if isinstance(output, torch.Tensor) else output[0]


class _Placeholder:
    """Stands for a KV cache in recorded arguments."""


CACHE = _Placeholder()


class Frame:
    """A model seen as what is round its blocks; it may be one without bytes.

    `outputs` says of every block how many values it returns (0: a tensor, not a tuple),
    `residual_dtype` the precision of the residual stream; `look` finds both.
    """

    def __init__(self, described: Architecture, device: torch.device) -> None:
        self.architecture, self.device = described, device
        self.model, self.blocks = described.model, described.blocks
        self.outputs: list[int] = [0] * len(self.blocks)
        self.residual_dtype = self.model.dtype
        if described.repeats:
            raise refusal(self, "a module of it runs several times in a pass")

    @property
    def streams(self) -> bool:
        """Whether a block's part of the KV cache is keys and values alone, which a cache of its own
        can hold.
        """
        layers = DynamicCache(config=self.model.config).layers
        return len(layers) == len(self.blocks) and all(
            type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers
        )

    def enter(
        self, ids: torch.Tensor, seen: int = 0, streamed: bool = False, whole: int = 0
    ) -> torch.Tensor:
        """Compute what enters the first block.

        Args:
            ids: token ids, (batch, position) int64.
            seen: tokens that came before these.
            streamed: the documents go in chunks, through a KV cache.
            whole: tokens of the documents; 0: no more than these.

        Returns:
            The residual, (batch, position, hidden size).
        """
        found: list[torch.Tensor] = []

        def first(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found.append(residual_of(args, kwargs))
            raise _Stop

        self._forward(first, ids, seen, streamed, whole)
        return found[0]

    def record(
        self, ids: torch.Tensor, seen: int = 0, streamed: bool = False, whole: int = 0
    ) -> list[Call]:
        """Record every block's arguments for token ids of a shape, as of `enter`.

        Args:
            ids: token ids, (batch, position) int64.
            seen: tokens that came before these.
            streamed: the documents go in chunks, through a KV cache.
            whole: tokens of the documents; 0: no more than these.

        Returns:
            The calls in the order of the blocks; their tensors are on the host.

        Raises:
            ModelError: the blocks do not run once each, in order.
        """
        calls: list[Call] = []
        to_host = _Once(self.device)

        def through(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if number != len(calls):
                raise ModelError(f"{self._name}: its blocks do not run once each, in order")
            named = not (args and isinstance(args[0], torch.Tensor))
            calls.append(
                Call(
                    tree_map(to_host, args if named else args[1:]),
                    _mapped(to_host, kwargs, named),
                    named,
                )
            )
            if number == len(self.blocks) - 1:
                raise _Stop
            residual, count = residual_of(args, kwargs), self.outputs[number]
            return (residual, *[None] * (count - 1)) if count else residual

        self._forward(through, ids, seen, streamed, whole)
        if len(calls) < len(self.blocks):
            raise ModelError(
                f"{self._name}: only {len(calls)} of its {len(self.blocks)} blocks ran"
            )
        return calls

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _forward(
        self, run: Callable[..., Any], ids: torch.Tensor, seen: int, streamed: bool, whole: int
    ) -> None:
        """The model's own forward, with the work of every block replaced; modules stay."""
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": streamed}
        if streamed:
            inputs["past_key_values"] = cache_that_saw(self.model.config, seen)
        blocks: Sequence[Any] = self.blocks
        try:
            for number, block in enumerate(blocks):
                block.forward = lambda *args, _number=number, **kwargs: run(_number, args, kwargs)
            forget_lengths(self.model)
            with torch.inference_mode(), as_long_as(self.model, max(whole, seen + ids.shape[1])):
                self.model(**inputs)
        except _Stop:
            pass
        finally:
            for block in blocks:
                vars(block).pop("forward", None)


class _Once:
    """Moves tensors to the host, each once, and leaves out KV caches.

    They are pinned, so that no block's call stops the host to fetch them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Cache):
            return CACHE
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._moved:  # the original is kept, so that its id stays its own
            self._moved[id(value)] = (value, pinned_copy(value.cpu(), self._device))
        return self._moved[id(value)][1]


def _mapped(to_host: _Once, kwargs: dict[str, Any], named: bool) -> dict[str, Any]:
    """Arguments by name in their order, the residual's place kept."""
    return {
        name: None if named and name == RESIDUAL else tree_map(to_host, value)
        for name, value in kwargs.items()
    }


def residual_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Find the residual among the arguments of a block.

    Args:
        args: the positional ones.
        kwargs: the named ones.

    Returns:
        (batch, position, hidden size).

    Examples:
        >>> residual_of((), {RESIDUAL: torch.zeros(1, 2, 8)}).shape
        torch.Size([1, 2, 8])
    """
    return args[0] if args and isinstance(args[0], torch.Tensor) else kwargs[RESIDUAL]


def cache_that_saw(config: PretrainedConfig, seen: int) -> DynamicCache:
    """Make a KV cache without data, which tells every layer how many tokens came before: for
    positions and masks.

    Args:
        config: of the model.
        seen: tokens that came before.

    Returns:
        The cache.
    """
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = seen
        else:
            plain: Any = layer
            plain.get_seq_length = lambda: seen
            plain.get_mask_sizes = lambda queries: (seen + queries, 0)
    return cache


class BlockCache(PrefillCache):
    """The KV cache of one block.

    Raises:
        ModelError: the block looks at another's, which is not there.
    """

    def __init__(self, config: PretrainedConfig, block: int) -> None:
        super().__init__(config=config)
        self._block = block

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As of `DynamicCache`, for the one block.

        Args:
            key_states: (batch, heads, position, head size).
            value_states: (batch, heads, position, head size).
            layer_idx: the number of the block.
            *args: of transformers.
            **kwargs: of transformers.

        Returns:
            Keys and values of all tokens that the block sees.

        Raises:
            ModelError: it is another block.
        """
        return super().update(key_states, value_states, self._own(layer_idx), *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As of `DynamicCache`, for the one block.

        Args:
            layer_idx: the number of the block; 0, which transformers asks by default, too.

        Returns:
            Tokens that came before.
        """
        return super().get_seq_length(self._own(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As of `DynamicCache`, for the one block.

        Args:
            query_length: tokens of this step.
            layer_idx: the number of the block.

        Returns:
            Keys that the block sees, and how many are left out before them.
        """
        return super().get_mask_sizes(query_length, self._own(layer_idx))

    def _own(self, requested: int) -> int:
        if requested != self._block:
            raise ModelError(
                f"block {self._block} looks at the KV cache of block {requested}: documents "
                "longer than a chunk cannot go "
                "through this model layer by layer; set extraction.execution=resident"
            )
        return requested


PROBE_TOKENS = 5


def inspect_calls(frame: Frame) -> "BlockCalls":
    """See how the blocks of a model without bytes are called.

    Args:
        frame: which learns their outputs and the precision of the residual stream.

    Returns:
        The calls of all blocks.

    Raises:
        ModelError: the model is refused.
    """
    _whole_blocks(frame)
    seen = BlockCalls(frame)
    if len(seen.dtypes) > 1:
        raise refusal(
            frame, f"its residual stream changes its precision ({', '.join(map(str, seen.dtypes))})"
        )
    frame.outputs, frame.residual_dtype = seen.outputs, seen.dtypes.pop()
    return seen


class BlockCalls:
    """How the blocks are called in a whole forward pass, and what they return."""

    def __init__(self, shell: Frame) -> None:
        self.calls: list[list[tuple[str, Any]]] = []
        self.outputs: list[int] = []
        self.dtypes: set[torch.dtype] = set()
        self._shell = shell
        self._last: Any = None
        self._shared: dict[int, Any] = {}
        handles = []
        for number, block in enumerate(shell.blocks):
            handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(block.register_forward_hook(self._after))
        try:
            with torch.inference_mode():
                shell.model(
                    input_ids=torch.zeros(2, PROBE_TOKENS, dtype=torch.int64), use_cache=False
                )
        except MODEL_ERRORS as error:
            raise refusal(shell, f"it cannot be run without its weights ({why(error)})") from None
        finally:
            for handle in handles:
                handle.remove()
        if len(self.calls) != len(shell.blocks):
            raise refusal(shell, f"{len(self.calls)} of its {len(shell.blocks)} blocks ran")

    def _before(self, number: int) -> Any:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number != len(self.calls):
                raise refusal(self._shell, f"block {number} ran out of turn")
            named = not (args and isinstance(args[0], torch.Tensor))
            residual = kwargs.get("hidden_states") if named else args[0]
            expected = (2, PROBE_TOKENS, self._shell.architecture.hidden_size)
            if not isinstance(residual, torch.Tensor) or tuple(residual.shape) != expected:
                shape = (
                    list(residual.shape)
                    if isinstance(residual, torch.Tensor)
                    else type(residual).__name__
                )
                raise refusal(
                    self._shell,
                    f"what goes into block {number} is no residual stream of its own: {shape}",
                )
            if number and residual is not self._last:
                raise refusal(
                    self._shell,
                    f"the residual is changed between block {number - 1} and block {number}",
                )
            self.dtypes.add(residual.dtype)
            rest = (
                args if named else args[1:],
                {k: v for k, v in kwargs.items() if not (named and v is residual)},
            )
            self._no_shared_state(number, rest)
            self.calls.append(list(leaves(rest)))

        return hook

    def _after(self, block: Any, args: Any, output: Any) -> None:
        self.outputs.append(len(output) if isinstance(output, tuple | list) else 0)
        self._last = output[0] if isinstance(output, tuple | list) else output

    def _no_shared_state(self, number: int, arguments: Any) -> None:
        args, kwargs = arguments
        for value in [*args, *kwargs.values()]:
            if isinstance(value, dict | list | set):
                if id(value) in self._shared:
                    kind = type(value).__name__
                    raise refusal(
                        self._shell,
                        f"blocks pass a {kind} from one to the next (block {number} has it too)",
                    )
                self._shared[id(value)] = value


def _whole_blocks(shell: Frame) -> None:
    """Every block is a module that takes and gives the residual stream, with weights and modules
    of its own.
    """
    if shell.architecture.ends:
        raise refusal(shell, "the residual stream is not what goes into and out of its blocks")
    owner: dict[int, int] = {}
    for number, block in enumerate(shell.blocks):
        for part in [*block.modules(), *block.parameters()]:
            if owner.setdefault(id(part), number) != number:
                raise refusal(shell, f"block {number} shares weights with block {owner[id(part)]}")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through nested arguments.

    Args:
        value: tuples, lists and dicts, nested.
        path: that of `value` itself.

    Yields:
        The path of each value, and the value.

    Examples:
        >>> list(leaves({"a": [1, {"b": 2}]}))
        [('a[0]', 1), ('a[1].b', 2)]
    """
    if isinstance(value, tuple | list):
        for number, entry in enumerate(value):
            yield from leaves(entry, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from leaves(entry, f"{path}.{name}" if path else name)
    else:
        yield path, value


def leaf_kind(path: str, value: Any) -> tuple[Any, ...]:
    """Describe one argument, but for the values of tensors.

    Args:
        path: of the argument.
        value: what it is.

    Returns:
        What two calls of the same kind share: path, then shape and dtype, or the type.

    Examples:
        >>> leaf_kind("mask", torch.zeros(1, 4)), leaf_kind("causal", True)
        (('mask', (1, 4), torch.float32), ('causal', <class 'bool'>))
    """
    if isinstance(value, torch.Tensor):
        return path, tuple(value.shape), value.dtype
    return path, "cache" if isinstance(value, Cache) or value is CACHE else type(value)


def refusal(shell: Frame, reason: str) -> ModelError:
    """Make the one line with which a model is refused.

    Args:
        shell: the model.
        reason: why it cannot run layer by layer.

    Returns:
        The error, to be raised.
    """
    model: PreTrainedModel = shell.model
    return ModelError(
        f"{type(model).__name__} cannot be run layer by layer: {reason}; set "
        "extraction.execution=resident"
    )
