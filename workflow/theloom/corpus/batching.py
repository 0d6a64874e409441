"""Which windows go through the model together.

Windows of similar length share forward passes: short ones a single pass, those longer than the
chunk size one chunk after another. The order depends on the lengths alone, longest first: so the
memory peak comes at the start, and a resumed run continues where the first one stopped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from theloom.model.length_switches import LengthSwitch, ways

if TYPE_CHECKING:
    import torch


# Tokens of padding that cost as much as another pass: 85 on two CPU cores, about 300 where a GPU
# reads its weights for every pass.
PASS_TOKENS = 128


@dataclass(frozen=True)
class Batch:
    """Windows that are forwarded together: their numbers in the shard and their lengths in tokens,
    longest first.
    """

    windows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest window: the width of the padded batch."""
        return self.lengths[0]

    @property
    def tokens(self) -> int:
        """Tokens that are forwarded, padding included."""
        return len(self.windows) * self.width

    def step(self, chunk_size: int) -> int:
        """The size of the batch's largest forward step.

        Args:
            chunk_size: tokens of a window that go through the model at once.

        Returns:
            Tokens, padding included.

        Examples:
            >>> batch = Batch(windows=(0, 2), lengths=(30, 12))
            >>> batch.step(chunk_size=16), batch.step(chunk_size=64)
            (32, 60)
        """
        return len(self.windows) * min(self.width, chunk_size)


@dataclass(frozen=True)
class Lengths:
    """Tokens of the windows of a corpus: of each shard the lengths that occur, ascending, and how
    many windows have each. So memory grows with the lengths that differ, not with the windows.
    """

    shards: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, shards: Iterable[np.ndarray]) -> "Lengths":
        """Count lengths.

        Args:
            shards: tokens of each window, (windows,), of one shard after the other.

        Returns:
            The lengths of all of them.

        Examples:
            >>> Lengths.of([np.array([3, 900, 3])]).longest
            900
        """
        return cls(tuple(np.unique(lengths, return_counts=True) for lengths in shards))

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max((int(lengths.max(initial=1)) for lengths, _ in self.shards), default=1)

    @property
    def tokens(self) -> int:
        """Tokens of the largest shard."""
        return max((int(lengths @ counts) for lengths, counts in self.shards), default=0)

    @property
    def of_largest_shard(self) -> np.ndarray:
        """Tokens of each window of the shard with most tokens, ascending, (windows,)."""
        lengths, counts = max(self.shards, key=lambda shard: int(shard[0] @ shard[1]))
        return np.repeat(lengths, counts)

    def most_together(self, batch_tokens: int) -> int:
        """Compute how many windows a batch has at most.

        Args:
            batch_tokens: tokens of a batch, padding included.

        Returns:
            Windows.

        Examples:
            >>> Lengths.of([np.array([3, 900, 5, 4])]).most_together(batch_tokens=64)
            3
        """
        most = 1
        for lengths, counts in self.shards:
            no_longer = np.cumsum(counts)
            together = np.minimum(batch_tokens // np.maximum(lengths, 1), no_longer)
            most = max(most, int(together.max(initial=0)))
        return most

    def streamed(self, chunk_size: int, side_by_side: int) -> tuple[tuple[int, int], ...]:
        """The batches of windows longer than a chunk, one of which takes the most memory.

        Batches that have both fewer windows and a smaller KV cache than another are left out.

        Args:
            chunk_size: tokens of a chunk.
            side_by_side: how many windows may stream together.

        Returns:
            Windows and tokens of the longest window, for each of these batches.
        """
        batches: set[tuple[int, int]] = set()
        for lengths, counts in self.shards:
            long = lengths > chunk_size
            # two full batches of each length suffice: more of them would be like these
            kept = np.repeat(lengths[long], np.minimum(counts[long], 2 * side_by_side))
            batches |= {
                (len(b.windows), b.width) for b in plan_batches(kept, 0, chunk_size, side_by_side)
            }
        most: list[tuple[int, int]] = []
        for count, tokens in sorted(batches, reverse=True):
            if not most or count * tokens > most[-1][0] * most[-1][1]:
                most.append((count, tokens))
        return tuple(most)


def plan_batches(
    lengths: np.ndarray,
    batch_tokens: int,
    chunk_size: int,
    streamed_windows: int = 1,
    switches: Sequence[LengthSwitch] = (),
    alike: np.ndarray | None = None,
) -> list[Batch]:
    """Group all windows into batches.

    Windows are sorted by length, longest first, then by number. A batch ends where its padding
    would cost more than another pass. Windows longer than `chunk_size` go through the KV cache
    together only if they have the same number of chunks: so no chunk is padding alone. Windows on
    two sides of a switch, which the model computes in different ways, never go together.

    Args:
        lengths: tokens of each window, (windows,).
        batch_tokens: tokens of a batch at most, padding included; a longer window is a batch by
            itself.
        chunk_size: tokens of a chunk.
        streamed_windows: windows longer than a chunk that may go together.
        switches: of the model.
        alike: a number for each window, (windows,): only those of one number go together; None: any
            may.

    Returns:
        The batches in the order in which they run.

    Examples:
        >>> [batch.lengths for batch in plan_batches(np.array([3, 900, 5, 4]), 64, 512)]
        [(900,), (5, 4, 3)]
    """

    def joins(length: int, longest: int, windows: int, tokens: int) -> bool:
        if windows * longest - tokens > PASS_TOKENS:
            return False
        if ways(switches, length) != ways(switches, longest):
            return False
        if longest > chunk_size:
            return windows <= streamed_windows and -(-length // chunk_size) == -(
                -longest // chunk_size
            )
        return windows * longest <= batch_tokens

    kinds = np.zeros(len(lengths), "<i8") if alike is None else alike
    order = np.lexsort((kinds, -lengths)).tolist()  # which is stable
    batches: list[Batch] = []
    group: list[int] = []
    tokens = 0
    for window in order:
        length = int(lengths[window])
        longest = int(lengths[group[0]]) if group else 0
        if group and not (
            kinds[window] == kinds[group[0]]
            and joins(length, longest, len(group) + 1, tokens + length)
        ):
            batches.append(_batch(group, lengths))
            group, tokens = [], 0
        group.append(window)
        tokens += length
    if group:
        batches.append(_batch(group, lengths))
    return batches


def smaller(
    batch: Batch,
    batch_tokens: int,
    chunk_size: int,
    streamed_windows: int,
    planned: np.ndarray | None = None,
) -> list[Batch]:
    """Split a batch by the limits of another plan.

    Args:
        batch: the batch.
        batch_tokens: as of `plan_batches`.
        chunk_size: as of `plan_batches`.
        streamed_windows: as of `plan_batches`.
        planned: tokens by which each window of the shard is planned, (windows,), where these are
            not its own: of a decoder's source, if that is longer; None: its own.

    Returns:
        Batches of the same windows; the batch itself if it is within the limits.

    Examples:
        >>> smaller(Batch((0, 1), (3, 2)), 8, 8, 1)
        [Batch(windows=(0, 1), lengths=(3, 2))]
        >>> smaller(Batch((0, 1), (3, 2)), 8, 8, 1, planned=np.array([5, 6]))
        [Batch(windows=(1,), lengths=(2,)), Batch(windows=(0,), lengths=(3,))]
    """
    own = dict(zip(batch.windows, batch.lengths, strict=True))
    counted = np.array(batch.lengths) if planned is None else planned[list(batch.windows)]
    parts = plan_batches(counted, batch_tokens, chunk_size, streamed_windows)
    found = [[batch.windows[w] for w in part.windows] for part in parts]
    if planned is not None:  # the longest target first, as before
        place = {window: number for number, window in enumerate(batch.windows)}
        found = [sorted(windows, key=place.__getitem__) for windows in found]
    return [Batch(tuple(windows), tuple(own[w] for w in windows)) for windows in found]


def of_lengths(batches: Sequence[Batch], lengths: np.ndarray) -> list[Batch]:
    """The same batches with other lengths of their windows: a decoder's, whose batches are planned
    by source or target, whichever is longer.

    Args:
        batches: as planned.
        lengths: tokens of each window, (windows,).

    Returns:
        The batches in their order, the windows of each longest first.

    Examples:
        >>> of_lengths([Batch((0, 1), (9, 8))], np.array([2, 5]))
        [Batch(windows=(1, 0), lengths=(5, 2))]
    """
    ordered = [sorted(b.windows, key=lambda w: (-int(lengths[w]), w)) for b in batches]
    return [_batch(windows, lengths) for windows in ordered]


def largest(batches: Sequence[Batch], first: int, chunk_size: int) -> set[int]:
    """The batches that may take the most memory.

    Args:
        batches: of a shard.
        first: number of the first batch to consider.
        chunk_size: tokens of a chunk.

    Returns:
        The numbers of the batch with the largest KV cache, and of the one with most tokens in one
        forward step: one or two numbers, none if no batch is left.
    """
    left = range(first, len(batches))
    if not left:
        return set()
    cached = max(left, key=lambda n: batches[n].tokens if batches[n].width > chunk_size else 0)
    return {cached, max(left, key=lambda n: batches[n].step(chunk_size))}


def _batch(windows: list[int], lengths: np.ndarray) -> Batch:
    return Batch(tuple(windows), tuple(int(lengths[w]) for w in windows))


def positions_in(ids: "torch.Tensor") -> int:
    """The positions of a batch, with its padding.

    Args:
        ids: of `padded`.

    Returns:
        Windows times width, whether a position is a token id or several codes.

    Examples:
        >>> import torch
        >>> positions_in(torch.zeros(2, 5)), positions_in(torch.zeros(2, 5, 4))
        (10, 10)
    """
    return int(ids.shape[0] * ids.shape[1])


def padded(batch: Batch, input_ids: np.ndarray, window_offset: np.ndarray) -> "torch.Tensor":
    """The token ids of a batch, padded on the right with token 0.

    In a causal model no token sees what is to its right, so any id will do, and no attention mask
    is needed.

    Args:
        batch: the batch.
        input_ids: of the shard, (tokens,); of codes (tokens, codebooks).
        window_offset: first token of each window, (windows + 1,).

    Returns:
        (windows, width) int64; of codes (windows, width, codebooks).
    """
    import torch

    ids = np.zeros((len(batch.windows), batch.width, *input_ids.shape[1:]), "<i8")
    for row, (window, length) in enumerate(zip(batch.windows, batch.lengths, strict=True)):
        start = int(window_offset[window])
        ids[row, :length] = input_ids[start : start + length]
    return torch.from_numpy(ids)
