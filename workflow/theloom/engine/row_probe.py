"""Recomputes a few documents of a shard alone, while it runs, and compares their rows.

Rows must be those of a document by itself. What is known to break that (`model.length_switches`,
padding, chunks) is ruled out beforehand; a model that breaks it in another way stops the job here,
before the shard is finished.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from theloom.corpus.batching import Batch
from theloom.errors import ModelError
from theloom.hooks.points import HookPoint

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MIN_LIMIT = 1e-4  # in FP32


class RunsAlone(Protocol):
    """Runs one document by itself."""

    def alone(
        self, ids: "torch.Tensor", points: Sequence[HookPoint], window: int
    ) -> "dict[str, torch.Tensor]":
        """Run one document.

        Args:
            ids: Its token ids, (1, positions) int64.
            points: The hook points to keep.
            window: Its number in the shard.

        Returns:
            FP32 rows on the CPU by hook point, (positions, …).
        """
        ...


class RowsDifferError(ModelError):
    """Rows of a document are others in its batch than alone."""


class _Probe:
    """The documents of a shard that are run twice: in their batch, and alone.

    Args:
        windows: Numbers of the windows to recompute.
        points: The hook points that are extracted; the middle and the deepest one of those whose
            rows do not depend on the width of a batch are compared.
        tolerance: Error, as a share of the largest value, that rounding explains.
    """

    def __init__(
        self, windows: Iterable[int], points: Sequence[HookPoint], tolerance: float
    ) -> None:
        self._windows = set(windows)
        rows = [p for p in points if not p.over_keys]
        middle, deepest = len(rows) // 2, len(rows) - 1
        self._points = [rows[n] for n in sorted({middle, deepest}) if rows]
        self._first = {p.name: p.first for p in self._points}
        self._limit = max(4 * tolerance, MIN_LIMIT)
        self.compared = 0
        self.largest = 0.0

    def _check(
        self, window: int, name: str, rows: "torch.Tensor", expected: "torch.Tensor"
    ) -> None:
        """Raise RowsDifferError where rows (position, …) are others than those of the window
        alone.
        """
        error = row_error(rows, expected)
        self.largest = max(self.largest, error)
        if not error <= self._limit:
            raise RowsDifferError(
                f"window {window} of the shard ({len(rows)} tokens): {name} differs by "
                f"{error:.2g} of a row's largest value from the document alone: this model's "
                "rows depend on what runs beside or before them; set "
                "extraction.batch_tokens=1 and memory.streaming_chunk_size to the longest "
                "document, and report the model"
            )

    def log(self) -> None:
        """Say what was compared."""
        if self.compared:
            log.info(
                "recomputed alone: %d of the documents; rows differ by at most %.2g of their "
                "largest value",
                self.compared,
                self.largest,
            )


class RowProbe(_Probe):
    """The probe of a model that runs batch by batch; arguments as of `_Probe`."""

    def __init__(
        self, windows: Iterable[int], points: Sequence[HookPoint], tolerance: float
    ) -> None:
        super().__init__(windows, points, tolerance)
        self._row: int | None = None
        self._kept: dict[str, list[torch.Tensor]] = {}

    def begin(self, batch: Batch, chunk_size: int) -> None:
        """A batch is about to run: see which of its windows, if any, is to be compared.

        Args:
            batch: Its windows.
            chunk_size: Tokens of a window in one forward step.
        """
        mixed = len(batch.windows) > 1 or batch.width > chunk_size
        wanted = [r for r, w in enumerate(batch.windows) if w in self._windows and mixed]
        self._row = wanted[-1] if wanted and self._points else None
        self._kept = {p.name: [] for p in self._points}

    def keep(self, hook: str, values: "torch.Tensor") -> None:
        """See a chunk of a batch.

        Args:
            hook: The name of the hook point.
            values: (window, position, …).
        """
        if self._row is not None and hook in self._kept:
            self._kept[hook].append(_copy(values[self._row, self._first[hook] :]))

    def compare(self, runner: RunsAlone, batch: Batch, ids: "torch.Tensor") -> None:
        """Run the document of a finished batch alone, and compare.

        Args:
            runner: Runs it.
            batch: Its windows.
            ids: Token ids of the batch, (window, position) int64.

        Raises:
            RowsDifferError: Its rows are others than in the batch, by more than rounding explains.
        """
        import torch

        if self._row is None:
            return
        length, window = batch.lengths[self._row], batch.windows[self._row]
        expected = runner.alone(ids[self._row : self._row + 1, :length], self._points, window)
        self._windows.discard(window)
        for name, chunks in self._kept.items():
            rows, first = torch.cat(chunks)[:length], self._first[name]
            self._check(window, name, rows[first:], expected[name][first:])
        self.compared += 1


class SweptProbe(_Probe):
    """The probe of a model that runs layer by layer: the documents go through each block a second
    time, as batches of their own behind the others.

    Args:
        batches: Of the shard; the shortest windows of a few are recomputed.
        chunk_size: Tokens of a chunk: no longer ones are.
        points: As of `RowProbe`.
        tolerance: As of `RowProbe`.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        chunk_size: int,
        points: Sequence[HookPoint],
        tolerance: float,
    ) -> None:
        windows = dict.fromkeys(riskiest(batches, chunk_size, longest=0))
        super().__init__(windows, points, tolerance)
        length = {w: n for b in batches for w, n in zip(b.windows, b.lengths, strict=True)}
        self.batches = [Batch((w,), (length[w],)) for w in windows]
        self._names = {p.name for p in self._points}
        self._rows: dict[tuple[int, str], torch.Tensor] = {}

    def keep(self, batch: Batch, name: str, values: "torch.Tensor") -> None:
        """See rows of a batch of the shard.

        Args:
            batch: Its windows.
            name: Of the hook point.
            values: (window, position, …).
        """
        if name in self._names:
            for row, window in enumerate(batch.windows):
                if window in self._windows:
                    rows = values[row, : batch.lengths[row]]
                    self._rows[window, name] = _copy(rows)

    def compare(self, number: int, name: str, values: "torch.Tensor") -> None:
        """Compare the rows of a recomputed batch, which come after those of the shard's batches.

        Args:
            number: Of the batch in `batches`.
            name: Of the hook point.
            values: (1, position, …).

        Raises:
            RowsDifferError: They are others, by more than rounding explains.
        """
        window = self.batches[number].windows[0]
        rows = self._rows.pop((window, name), None)  # none: an earlier job computed them
        if rows is not None:
            self._check(window, name, rows, values[0].float().cpu())
            self.compared += name == self._points[-1].name


def riskiest(batches: Sequence[Batch], chunk_size: int, longest: int) -> list[int]:
    """Choose windows to recompute.

    Args:
        batches: Of the shard, that are still to run.
        chunk_size: Tokens of a chunk.
        longest: Tokens of the longest document for which one pass is known to fit.

    Returns:
        Numbers of windows: the shortest of the first batch, of the one with most padding and of the
        last one, and of those that go in chunks.
    """
    mixed = [b for b in batches if len(b.windows) > 1 and b.width <= chunk_size]
    chosen = [b for b in batches if b.width > chunk_size and b.lengths[-1] <= longest][-1:]
    if mixed:
        padded = max(mixed, key=lambda b: b.tokens - sum(b.lengths))
        chosen += [mixed[0], padded, mixed[-1]]
    return [b.windows[-1] for b in chosen]


def row_error(rows: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The typical error of a row, in the quarter of a document where it is largest.

    A few rows may differ by more in 16 bits (where large values cancel, or an expert is chosen by
    the last bit), so the median of each quarter counts.

    Args:
        rows: (position, …).
        expected: Of the same shape.

    Returns:
        A share of a row's largest value; infinite for values that are finite in one alone.
    """
    import torch

    rows, expected = rows.flatten(1).float(), expected.flatten(1).float()
    if not torch.equal(rows.isfinite(), expected.isfinite()):
        return float("inf")
    found, wanted = rows.nan_to_num(), expected.nan_to_num()
    errors = (found - wanted).abs().amax(1) / wanted.abs().amax(1).clamp_min(1e-30)
    return max(float(part.median()) for part in errors.chunk(4))


def _copy(rows: "torch.Tensor") -> "torch.Tensor":
    """In FP32 on the host; the memory of what a model gives may be another value's soon."""
    import torch

    return rows.to("cpu", torch.float32, copy=True)
