"""Rows that are pooled: added up on the host until all of their tokens were there."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from theloom.store.shard_file import ShardTokens

if TYPE_CHECKING:
    import torch

# The number of a window, which of its stored rows comes first, and rows.
Stored = tuple[int, int, "torch.Tensor"]


class Pool:
    """Rows that are being added up, on the host; a window's are given once all of them are there.

    It belongs to the writer's thread.
    """

    def __init__(self, tokens: ShardTokens, kind: str, dtype: "torch.dtype") -> None:
        assert tokens.kept is not None
        assert tokens.row_token is not None
        self.kind, self._dtype = kind, dtype
        self._offset = tokens.row_offset
        kept = tokens.kept.nonzero()[0]
        self._count = np.bincount(
            np.searchsorted(tokens.row_token, kept), minlength=len(tokens.row_token)
        )
        self._window = np.searchsorted(self._offset, np.arange(tokens.rows), "right") - 1
        self._sums: dict[tuple[str, int], np.ndarray] = {}
        self._left: dict[tuple[str, int], int] = {}  # tokens of a row that are to come
        self._open: dict[tuple[str, int], int] = {}  # rows of a window that are to come

    def add(
        self, hook: str, groups: np.ndarray, lengths: np.ndarray, taken: "torch.Tensor"
    ) -> Iterator[Stored]:
        """Add what a step gives to its rows.

        Args:
            hook: the name of the hook point.
            groups: the row that each partial result belongs to, (n,).
            lengths: kept tokens in each of them, (n,).
            taken: partial sums or maxima, (n, …) FP32 on the host.

        Yields:
            Windows whose rows are all there: number, position of the first row, rows.
        """
        values = taken.numpy()
        for group, length, value in zip(groups.tolist(), lengths.tolist(), values, strict=True):
            key = (hook, group)
            if key not in self._sums:
                self._sums[key] = value.astype("f8")
                self._left[key] = int(self._count[group])
            elif self.kind == "max":
                np.maximum(self._sums[key], value, out=self._sums[key])
            else:
                self._sums[key] += value
            self._left[key] -= length
            if not self._left[key]:
                window = int(self._window[group])
                first, end = (int(r) for r in self._offset[window : window + 2])
                waiting = self._open.get((hook, window), end - first) - 1
                self._open[hook, window] = waiting
                if not waiting:
                    del self._open[hook, window]
                    yield window, 0, self._finished(hook, first, end)

    def no_rows(self, width: Sequence[int]) -> "torch.Tensor":
        """The rows of a window of which none is kept.

        Args:
            width: shape of a row.

        Returns:
            (0, *width), in the stored dtype.
        """
        import torch

        return torch.empty((0, *width), dtype=self._dtype)

    def _finished(self, hook: str, first: int, end: int) -> "torch.Tensor":
        import torch

        sums = np.stack([self._sums.pop((hook, group)) for group in range(first, end)])
        for group in range(first, end):
            del self._left[hook, group]
        if self.kind == "mean":
            counts = self._count[first:end].reshape(-1, *(1 for _ in sums.shape[1:]))
            sums /= counts
        return torch.from_numpy(sums).to(self._dtype)
