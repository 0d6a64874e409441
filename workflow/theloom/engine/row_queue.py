"""Rows that go to a consumer in memory, not to a file.

`ShardRows` is the sink of a shard: it takes rows as `ShardWriter` does, and puts those of each
batch into a `RowQueue` once all of them are there. The queue is bounded: where the consumer is the
slower one, the model waits.
"""

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from theloom.errors import StoreError
from theloom.hooks.points import SCORES, HookPoint
from theloom.precision import SCALED
from theloom.store.encoding import scaled
from theloom.store.file_format import METRICS
from theloom.store.nonfinite import refusal, token_of
from theloom.store.shard_file import ShardSpec
from theloom.store.writer import with_all_keys

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

# Batches of the engine that wait for the consumer at most.
BATCHES_AHEAD = 2


class QueueClosedError(Exception):
    """The consumer has left: there is nobody to put rows in for."""


@dataclass(frozen=True)
class RowBlock:
    """The rows of the windows of a batch: `number` (rows,) in the merged dataset, and by hook point
    (rows, …) in the dtype in which the file's rows are read.
    """

    number: np.ndarray
    hooks: Mapping[str, "torch.Tensor"]
    tables: Mapping[str, np.ndarray]  # of their tokens, (rows,) each


class RowQueue:
    """Between one thread that puts blocks and ends, and one that gets them.

    Args:
        ahead: blocks that may wait.
    """

    def __init__(self, ahead: int = BATCHES_AHEAD) -> None:
        self._ahead = ahead
        self._blocks: deque[RowBlock | None] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False

    def put(self, block: RowBlock | None) -> None:
        """Wait for room, and put a block.

        Args:
            block: rows of a batch; None is the end of an epoch.

        Raises:
            QueueClosedError: the consumer has left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._blocks) < self._ahead)
            self._check()
            self._blocks.append(block)
            self._changed.notify_all()

    def get(self) -> RowBlock | None:
        """Wait for a block, and take it.

        Returns:
            The block; None at the end of an epoch.

        Raises:
            BaseException: What `fail` was given, once all blocks before it are taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._blocks or self._error is not None)
            if not self._blocks:
                assert self._error is not None
                raise self._error
            block = self._blocks.popleft()
            self._changed.notify_all()
            return block

    def fail(self, error: BaseException) -> None:
        """Have the consumer raise an error.

        Args:
            error: what `get` raises once all blocks are taken.
        """
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """The consumer leaves: what waits is dropped, and `put` raises from now on."""
        with self._changed:
            self._closed = True
            self._blocks.clear()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise QueueClosedError where the consumer has left."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._closed:
            raise QueueClosedError


class ShardRows:
    """Takes the rows of a shard, as `handoff.RowSink` has it, and puts them into a queue by batch.

    Values that are not finite are treated as the shard's file would treat them
    (`store.nonfinite`), but at once.

    Args:
        queue: where they go.
        spec: what the file would hold.
    """

    taker = "reader"

    def __init__(self, queue: RowQueue, spec: ShardSpec) -> None:
        self.batches_done = 0
        self.metrics = dict.fromkeys(METRICS, 0.0)
        self._queue, self._spec = queue, spec
        self._points = {p.name: p for p in spec.points}
        self._parts: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
        self._beyond = dict.fromkeys(self._points, 0)  # values that overflow fp16

    def __enter__(self) -> Self:
        self._next_batch()  # one that failed comes again
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._parts.clear()

    def write(self, window: int, hook: str, start: int, rows: "torch.Tensor") -> None:
        """Take rows of one hook point and window.

        Args:
            window: its number in the shard.
            hook: name of the hook point.
            start: the number of the first row among the window's stored ones.
            rows: (positions, …), on the CPU, in the dtype that the writer is handed; they are
                copied.

        Raises:
            QueueClosedError: the consumer has left.
        """
        self._queue.check()
        point = self._points[hook]
        if point.over_keys:
            rows = with_all_keys(rows, self._spec.keys, point.fill)
        self._parts[hook].append((window, start, rows.clone()))

    def batch_done(self, rows: int, last: bool = False) -> None:
        """Put the rows of a batch into the queue; waits for room.

        Args:
            rows: of the shard that were written, with this batch.
            last: whether this is the last batch.

        Raises:
            ValueError: a hook point lacks rows of a window.
            StoreError: more values are not finite than the config allows.
            QueueClosedError: the consumer has left.
        """
        import torch

        found = {name: sorted(parts, key=lambda p: p[:2]) for name, parts in self._parts.items()}
        windows = sorted({window for window, _, _ in next(iter(found.values()), [])})
        number = self._numbers(windows)
        hooks = {}
        for name, parts in found.items():
            self._check_whole(name, windows, parts)
            if not len(number):
                continue
            hooks[name] = torch.cat([rows for _, _, rows in parts])
            self._check_finite(self._points[name], hooks[name], number)
            if self._spec.precision in SCALED:  # what would be read from the file
                hooks[name] = scaled.round_trip(hooks[name], self._spec.precision)
        self._next_batch()
        if len(number):
            self._queue.put(RowBlock(self._spec.tokens.first_row + number, hooks, self._of(number)))
        self.batches_done += 1

    def finish(self) -> None:
        """All batches are done."""

    def _next_batch(self) -> None:
        self._parts = {name: [] for name in self._points}

    def _numbers(self, windows: Sequence[int]) -> np.ndarray:
        """The rows of windows in the shard, (rows,)."""
        offset = self._spec.tokens.row_offset
        ranges = [np.arange(offset[w], offset[w + 1]) for w in windows]
        return np.concatenate([np.zeros(0, "i8"), *ranges])

    def _of(self, number: np.ndarray) -> dict[str, np.ndarray]:
        """The tables of the tokens of rows."""
        tokens = self._spec.tokens
        of_row = number if tokens.row_token is None else tokens.row_token[number]
        return {
            name: getattr(tokens, name)[of_row] for name in ("input_ids", "document", "position")
        }

    def _check_whole(
        self, hook: str, windows: Sequence[int], parts: "list[tuple[int, int, torch.Tensor]]"
    ) -> None:
        """Every window has all of its rows, one after the other."""
        seen = dict.fromkeys(windows, 0)
        for window, start, rows in parts:
            if seen.get(window) != start:
                raise ValueError(f"{hook}: rows of window {window} from {start} are out of order")
            seen[window] += len(rows)
        offset = self._spec.tokens.row_offset
        if any(seen[w] != offset[w + 1] - offset[w] for w in windows):
            raise ValueError(f"{hook}: windows of {windows} are there in part")

    def _check_finite(self, point: HookPoint, rows: "torch.Tensor", number: np.ndarray) -> None:
        wrong = ~rows.isfinite()
        if point.name.endswith(SCORES):  # of masked keys they are -inf
            wrong &= ~rows.isneginf()
        count = int(wrong.sum())
        if not count:
            return
        spec = self._spec
        beyond = int((wrong & ~rows.isnan()).sum()) if spec.precision == "fp16" else 0
        self._beyond[point.name] += beyond
        first = int(wrong.flatten(1).any(dim=1).int().argmax())
        place = f"{float(rows[first][wrong[first]][0]):g} at {token_of(spec.tokens, number[first])}"
        if words := refusal(spec, point, self._beyond[point.name], count - beyond, lambda: place):
            raise StoreError(words)
        log.warning("%s: %d values are not finite; first: %s", point.name, count, place)
