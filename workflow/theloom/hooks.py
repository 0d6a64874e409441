"""Hook points: TransformerLens names for values of a Hugging Face model.

A name says where in the model a value is; `catalogue` lists what a model has, `select` turns a filter into hook points,
and `Taps` reads their values during a forward pass of the unmodified model.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Any

from theloom.errors import HookError

if TYPE_CHECKING:
    import torch

    from theloom.architecture import Architecture

RESIDUALS = (
    "hook_resid_pre",
    "hook_resid_post",
)  # the input and the output of a block: (batch, position, hidden size)


@dataclass(frozen=True)
class HookPoint:
    """One hook point of a model: its name, its block, which value of the block, and the width of a row."""

    name: str
    block: int
    value: str
    width: int


def catalogue(num_blocks: int, hidden_size: int) -> list[HookPoint]:
    """Every hook point of a model, in the order in which a forward pass reaches them."""
    return [
        HookPoint(f"blocks.{block}.{value}", block, value, hidden_size)
        for block in range(num_blocks)
        for value in RESIDUALS
    ]


def select(filters: Iterable[str], points: list[HookPoint]) -> list[HookPoint]:
    """The hook points that a filter asks for, in the order of the model; an empty filter asks for all.

    An entry is an exact name or a glob (`*`, `?`); `blocks.-1.` counts from the last block. Raises HookError, with near
    matches, for an entry that names nothing.
    """
    entries = list(filters)
    if not entries:
        return list(points)
    num_blocks = 1 + max(p.block for p in points)
    chosen: set[str] = set()
    for entry in entries:
        pattern = _from_the_end(entry, num_blocks)
        matched = {p.name for p in points if fnmatchcase(p.name, _literal_brackets(pattern))}
        if not matched:
            raise HookError(_unknown(entry, pattern, points, num_blocks))
        chosen |= matched
    return [p for p in points if p.name in chosen]


def _from_the_end(entry: str, num_blocks: int) -> str:
    match = re.match(r"blocks\.-(\d+)\.", entry)
    if not match:
        return entry
    block = num_blocks - int(match[1])
    return f"blocks.{block}.{entry[match.end() :]}"


def _literal_brackets(pattern: str) -> str:
    return pattern.replace("[", "[[]")


def _unknown(entry: str, pattern: str, points: list[HookPoint], num_blocks: int) -> str:
    glob = "*" in entry or "?" in entry
    asked = f"hook filter {entry!r} matches nothing" if glob else f"unknown hook point {entry!r}"
    near = _near(pattern, points, num_blocks)
    hint = f"did you mean {near!r}?" if near else f"its hook points are like {points[0].name!r}, {points[-1].name!r}"
    return f"{asked} (this model has {num_blocks} blocks, 0 to {num_blocks - 1}); {hint}"


def _near(pattern: str, points: list[HookPoint], num_blocks: int) -> str | None:
    """The nearest name: a block number past the end counts as the last one; then the spelling of the value decides."""
    match = re.match(r"blocks\.(-?\d+)\.(.*)", pattern)
    if not match:
        return next(iter(difflib.get_close_matches(pattern, [p.name for p in points], n=1)), None)
    block = min(max(int(match[1]), 0), num_blocks - 1)
    values = {p.value for p in points if p.block == block}
    value = next(iter(difflib.get_close_matches(match[2], sorted(values), n=1)), None)
    return f"blocks.{block}.{value}" if value else None


class _DeepestReached(Exception):  # noqa: N818
    """Ends a forward pass once the deepest requested hook point has been read."""


class Taps:
    """Reads hook points during forward passes: `sink(name, tensor)` is called as soon as a value exists.

    The tensor is the model's own: copy what is kept, since later operations may write to it and a view keeps the whole
    alive. `run` calls the model and ends its forward after the deepest block asked for. The model is left as it was.
    """

    def __init__(
        self,
        architecture: "Architecture",
        points: list[HookPoint],
        sink: Callable[[str, "torch.Tensor"], None],
    ) -> None:
        self.architecture = architecture
        self._points = points
        self._sink = sink
        self._handles: list[Any] = []

    def __enter__(self) -> "Taps":
        deepest = max(p.block for p in self._points)
        for point in self._points:
            block = self.architecture.blocks[point.block]
            if point.value == "hook_resid_pre":
                self._handles.append(block.register_forward_pre_hook(self._before(point), with_kwargs=True))
            else:
                self._handles.append(block.register_forward_hook(self._after(point)))
        last = self.architecture.blocks[deepest]
        self._handles.append(last.register_forward_hook(_stop))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, **inputs: Any) -> None:
        """One forward pass of the model, up to the deepest block asked for."""
        try:
            self.architecture.model(**inputs)
        except _DeepestReached:
            return
        raise HookError(f"the forward pass of {type(self.architecture.model).__name__} did not reach its own blocks")

    def _before(self, point: HookPoint) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._sink(point.name, args[0] if args else kwargs["hidden_states"])

        return hook

    def _after(self, point: HookPoint) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self._sink(point.name, output[0] if isinstance(output, tuple) else output)

        return hook


def _stop(module: Any, args: tuple[Any, ...], output: Any) -> None:
    raise _DeepestReached
