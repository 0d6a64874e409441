"""What is stored of a forward pass: all rows, those of some tokens, or rows pooled over tokens.

`step` gives the part of a selection for one forward step. `Step.take` runs on the device, before
the hand-off, so that nothing else is copied off it; `Step.rows` runs on the host, in the writer's
thread, and gives what the file gets.

Pooling adds up values as the model gives them, in FP32: pairwise within a step, and in FP64 on the
host over steps, chunks and windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from theloom.corpus.batching import Batch
from theloom.devices import host, pinned
from theloom.engine.pool import Pool, Stored
from theloom.errors import MemoryPlanError
from theloom.precision import BYTES, torch_dtype
from theloom.rows.pooling import ADDED_UP
from theloom.store.shard_file import ShardTokens
from theloom.terminal import format_bytes

if TYPE_CHECKING:
    import torch

    from theloom.hooks.points import HookPoint


class Step(Protocol):
    """What is stored of one forward step."""

    def take(self, values: "torch.Tensor") -> "torch.Tensor":
        """Choose on the device what of a hook point's values is copied off it.

        Args:
            values: (window, position, …).

        Returns:
            Those values, in a shape of the step's own.
        """
        ...

    def rows(self, hook: str, taken: "torch.Tensor") -> Iterator[Stored]:
        """Divide what was copied off by windows, on the host.

        Args:
            hook: The name of the hook point.
            taken: What `take` returned, on the host.

        Yields:
            For each window its number, the first of its stored rows, and rows (n, …).
        """
        ...


@dataclass(frozen=True)
class WholeStep:
    """All rows of a step of a batch, from position `start` on; padding is left out on the host."""

    batch: Batch
    start: int

    def take(self, values: "torch.Tensor") -> "torch.Tensor":
        """Take everything, padding included.

        Args:
            values: (window, position, …).

        Returns:
            The same tensor.
        """
        return values

    def rows(self, hook: str, taken: "torch.Tensor") -> Iterator[Stored]:
        """As `Step.rows`; padding is left out.

        Args:
            hook: Not used.
            taken: (window, position, …), on the host.

        Yields:
            For each window its number, the position of its first row, and rows (n, …).
        """
        pairs = zip(self.batch.windows, self.batch.lengths, strict=True)
        for number, (window, length) in enumerate(pairs):
            real = min(length - self.start, taken.shape[1])
            if real > 0:
                yield window, self.start, taken[number, :real]


@dataclass(frozen=True)
class _Places:
    """Where the kept tokens of a step are: row of the batch and column of the step, in order."""

    window: np.ndarray
    column: np.ndarray
    _there: "dict[torch.device, list[torch.Tensor]]" = field(default_factory=dict)

    def of(self, values: "torch.Tensor") -> "torch.Tensor":
        """Their values, (tokens, …)."""
        window, column = _on(values.device, self._there, self.window, self.column)
        return values[window, column]


def _on(
    device: "torch.device",
    there: "dict[torch.device, list[torch.Tensor]]",
    *arrays: np.ndarray,
) -> "list[torch.Tensor]":
    """Arrays on a device, copied there once: a step has them for all of its hook points. The host
    does not wait for what the device has queued before.
    """
    import torch

    if device not in there:
        there[device] = [
            pinned.pinned_copy(torch.from_numpy(a), device).to(device, non_blocking=True)
            for a in arrays
        ]
    return there[device]


@dataclass(frozen=True)
class KeptStep:
    """The rows of some tokens: `parts` are windows, the first of their stored rows, how many."""

    places: _Places
    parts: list[tuple[int, int, int]]
    dtype: "torch.dtype | None"

    def take(self, values: "torch.Tensor") -> "torch.Tensor":
        """Take the rows of the kept tokens.

        Args:
            values: (window, position, …).

        Returns:
            (kept tokens, …), in the stored dtype.
        """
        rows = self.places.of(values)
        return rows if self.dtype is None else rows.to(self.dtype)

    def rows(self, hook: str, taken: "torch.Tensor") -> Iterator[Stored]:
        """As `Step.rows`.

        Args:
            hook: Not used.
            taken: (kept tokens, …), on the host.

        Yields:
            For each window its number, the first of its stored rows, and rows (n, …).
        """
        at = 0
        for window, first, count in self.parts:
            yield window, first, taken[at : at + count]
            at += count


@dataclass(frozen=True)
class PooledStep:
    """Partial sums, or maxima, of the stored rows that some tokens of a step belong to."""

    places: _Places
    groups: np.ndarray  # stored row of each kept token, ascending within a window
    empty: list[int]  # windows without a stored row of their own that begin here
    pool: "Pool"
    again: bool  # the step ran in an earlier job, which has written what it completes
    _there: "dict[torch.device, list[torch.Tensor]]" = field(default_factory=dict)

    def take(self, values: "torch.Tensor") -> "torch.Tensor":
        """Reduce the kept tokens of each row pairwise, level by level: each run of tokens of one
        row halves until one is left. No more than twice the kept tokens is in memory, as for
        what is copied off the device.

        Args:
            values: (window, position, …).

        Returns:
            (rows of the step, …) FP32.
        """
        import torch

        rows = self.places.of(values).float()
        flat = iter(_on(rows.device, self._there, *(a for level in self._levels for a in level)))
        for left, pairs, right in zip(flat, flat, flat, strict=True):
            joined, other = rows.index_select(0, left), rows.index_select(0, right)
            del rows  # before what follows
            mine = joined.index_select(0, pairs)
            both = torch.maximum(mine, other) if self.pool.kind == "max" else mine + other
            del mine, other
            rows = joined.index_copy_(0, pairs, both)
            del joined, both
        return rows

    def rows(self, hook: str, taken: "torch.Tensor") -> Iterator[Stored]:
        """As `Step.rows`, for the windows that are complete with this step.

        Args:
            hook: The name of the hook point.
            taken: (rows of the step, …) FP32, on the host.

        Yields:
            For each such window its number, 0, and its rows (n, …).
        """
        found = list(self.pool.add(hook, *self._runs, taken))
        if not self.again:
            yield from found
            yield from ((window, 0, self.pool.no_rows(taken.shape[1:])) for window in self.empty)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each run of tokens of the same window and row begins."""
        run = np.stack([self.places.window, self.groups])
        new = np.ones(run.shape[1], bool)
        new[1:] = (np.diff(run) != 0).any(axis=0)
        return new.nonzero()[0]

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The stored row of each run, and its tokens."""
        lengths = np.diff(np.append(self._starts, len(self.groups)))
        return self.groups[self._starts], lengths

    @cached_property
    def _levels(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each halving: the left of each pair, which pairs have a right one, and these."""
        starts, lengths = self._starts, self._runs[1]
        levels = []
        while len(lengths) and lengths.max() > 1:
            halves = -(-lengths // 2)
            after = np.cumsum(halves) - halves
            run = np.repeat(np.arange(len(lengths)), halves)
            left = starts[run] + 2 * (np.arange(len(run)) - after[run])
            pairs = (left + 1 < (starts + lengths)[run]).nonzero()[0]
            levels.append((left, pairs, left[pairs] + 1))
            starts, lengths = after, halves
        return levels


class Selection:
    """What a shard stores of its windows.

    Args:
        tokens: of the shard.
        pool: `rows.pool`.
        store: the precision on disk; None, where nothing is stored: each value's own, FP32 for
            pooled rows.
    """

    def __init__(self, tokens: ShardTokens, pool: str, store: str | None) -> None:
        self._tokens, self._store = tokens, store
        self.whole = tokens.row_token is None
        self._dtype = None if store is None else torch_dtype(store)
        self._pool = None
        if tokens.row_token is not None and pool in ADDED_UP:
            self._pool = Pool(tokens, pool, self._dtype or torch_dtype("fp32"))
        self._last: tuple[tuple[Batch, int, int, bool], Step] | None = None

    @property
    def handed(self) -> str | None:
        """The precision in which a runner hands values over; None: the model's own values."""
        return self._store if self.whole else None

    def rows(self, batch: Batch) -> int:
        """Count the stored rows of a batch's windows.

        Args:
            batch: Its windows.

        Returns:
            Rows.
        """
        offset = self._tokens.row_offset
        return sum(int(offset[w + 1] - offset[w]) for w in batch.windows)

    def largest(
        self, batches: Sequence[Batch], points: "Sequence[HookPoint]", chunk_size: int
    ) -> int:
        """The largest value that is copied off the device in one step.

        Args:
            batches: Of the shard.
            points: The hook points.
            chunk_size: Tokens of a window in one forward step.

        Returns:
            Bytes.
        """
        widest = (
            self._copied(b, chunk_size) * max((p.width(b.width) for p in points), default=0)
            for b in batches
        )
        return self._item * max(widest, default=0)

    def step_bytes(
        self, batches: Sequence[Batch], points: "Sequence[HookPoint]", chunk_size: int
    ) -> int:
        """All values that are copied off the device in the largest step.

        Args:
            batches: Of the shard.
            points: The hook points.
            chunk_size: Tokens of a window in one forward step.

        Returns:
            Bytes.
        """
        steps = (
            self._copied(b, chunk_size) * sum(p.width(b.width) for p in points) for b in batches
        )
        return self._item * max(steps, default=0)

    @property
    def _item(self) -> int:
        """Bytes of an element that is copied off the device."""
        return BYTES["fp32" if self._pool else self._store or "fp32"]

    def _copied(self, batch: Batch, chunk_size: int) -> int:
        """The most rows that one step of a batch gives."""
        step = batch.step(chunk_size)
        if self.whole:
            return step
        kept = self._kept
        offset = self._tokens.window_offset
        of_windows = (
            int(np.searchsorted(kept, offset[w + 1]) - np.searchsorted(kept, offset[w]))
            for w in batch.windows
        )
        return min(step, sum(of_windows))

    def check_room(self, batches: Sequence[Batch], points: "Sequence[HookPoint]") -> None:
        """Check that what waits for the other windows of its documents fits the host.

        Args:
            batches: In the order in which they run.
            points: The hook points that are read together.

        Raises:
            MemoryPlanError: It does not.
        """
        if self._pool is None:
            return
        document = self._tokens.window_document
        numbers = {int(d): n for n, d in enumerate(np.unique(document))}
        first = np.full(len(numbers), len(batches))
        last, rows = np.zeros(len(numbers), "i8"), np.zeros(len(numbers), "i8")
        of_window = np.diff(self._tokens.row_offset)
        for number, batch in enumerate(batches):
            for window in batch.windows:
                of = numbers[int(document[window])]
                first[of], last[of] = min(first[of], number), number
                rows[of] += of_window[window]
        changes = np.zeros(len(batches) + 1)
        np.add.at(changes, first, rows)
        np.subtract.at(changes, last + 1, rows)
        row = 8 * sum(p.width(1) for p in points)  # summed in FP64
        needed, free = int(np.cumsum(changes).max(initial=0)) * row, host.memory().free
        if needed > free:
            raise MemoryPlanError(
                f"rows.pool: rows that wait for other windows of their documents take "
                f"{format_bytes(needed)} of host memory, and {format_bytes(free)} are free; raise "
                "extraction.shards, or ask for fewer hook points"
            )

    def again(self, batches: Sequence[Batch], first: int) -> list[int]:
        """Find the batches of an earlier job that must run again: rows that later batches complete
        are made of their windows, too.

        Args:
            batches: Of the shard.
            first: The number of the first batch that has not run.

        Returns:
            Numbers of batches before it.
        """
        if self._pool is None or not first:
            return []
        token = self._tokens
        group = token.window_document
        ahead = {int(group[w]) for batch in batches[first:] for w in batch.windows}
        return [n for n in range(first) if any(int(group[w]) in ahead for w in batches[n].windows)]

    def step(self, batch: Batch, start: int, width: int, again: bool = False) -> Step:
        """What is stored of one forward step.

        Args:
            batch: The windows that run together.
            start: The position of the step's first column in each.
            width: Columns of the step.
            again: The batch ran in an earlier job.

        Returns:
            What takes its values and divides them; the same object for all hook points.
        """
        if self.whole:
            return WholeStep(batch, start)
        key = (batch, start, width, again)
        if self._last is None or self._last[0] != key:  # the same for all hook points
            self._last = (key, self._selected(batch, start, width, again))
        return self._last[1]

    @cached_property
    def _kept(self) -> np.ndarray:
        assert self._tokens.kept is not None
        return self._tokens.kept.nonzero()[0]

    def _selected(self, batch: Batch, start: int, width: int, again: bool) -> Step:
        tokens, kept = self._tokens, self._kept
        assert tokens.row_token is not None
        rows, columns, found = [], [], []
        parts: list[tuple[int, int, int]] = []
        empty: list[int] = []
        for number, (window, length) in enumerate(zip(batch.windows, batch.lengths, strict=True)):
            first = int(tokens.window_offset[window]) + start
            end = first + max(0, min(width, length - start))
            here = kept[slice(*np.searchsorted(kept, [first, end]))]
            rows.append(np.full(len(here), number))
            columns.append(here - first)
            found.append(here)
            stored = int(tokens.row_offset[window + 1] - tokens.row_offset[window])
            if not stored and not start:
                empty.append(window)
                parts.append((window, 0, 0))
            elif len(here) and self._pool is None:
                before = int(np.searchsorted(tokens.row_token, first) - tokens.row_offset[window])
                parts.append((window, before, len(here)))
        places = _Places(np.concatenate(rows), np.concatenate(columns))
        if self._pool is None:
            return KeptStep(places, parts, self._dtype)
        groups = np.searchsorted(tokens.row_token, np.concatenate(found))
        return PooledStep(places, groups, empty, self._pool, again)
