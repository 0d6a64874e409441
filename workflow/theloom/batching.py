"""Which windows go through the model together.

Short windows of like length share one forward pass; a window longer than the chunk size goes alone, chunk by chunk. The
order is fixed by the lengths alone, longest first, so that the largest need of memory comes at the start, and so that a
resumed run goes on where the first one stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Windows that are forwarded together: their numbers in the shard and their lengths in tokens, longest first."""

    windows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest window: the width of the padded batch."""
        return self.lengths[0]


def plan_batches(lengths: np.ndarray, batch_tokens: int, chunk_size: int) -> list[Batch]:
    """All windows in batches of at most `batch_tokens` tokens, padding included (one window may be more by itself).

    Windows are sorted by length, longest first and then by number. One longer than `chunk_size` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda w: (-int(lengths[w]), w))
    batches: list[Batch] = []
    group: list[int] = []
    for window in order:
        full = group and (len(group) + 1) * int(lengths[group[0]]) > batch_tokens
        if group and (full or lengths[group[0]] > chunk_size):
            batches.append(_batch(group, lengths))
            group = []
        group.append(window)
    if group:
        batches.append(_batch(group, lengths))
    return batches


def largest(batches: Sequence[Batch], first: int, chunk_size: int) -> set[int]:
    """The numbers of the batches, from `first` on, one of which takes the most memory: one or two of them.

    They are the longest window, whose KV cache is the largest, and the batch of most tokens in one forward step.
    """
    step = {n: len(batches[n].windows) * min(batches[n].width, chunk_size) for n in range(first, len(batches))}
    return {first, max(step, key=lambda n: step[n])} if step else set()


def _batch(windows: list[int], lengths: np.ndarray) -> Batch:
    return Batch(tuple(windows), tuple(int(lengths[w]) for w in windows))


def padded(batch: Batch, input_ids: np.ndarray, window_offset: np.ndarray) -> "torch.Tensor":
    """The token ids of a batch, (windows, width) int64, padded on the right with token 0.

    A causal model's real tokens cannot see what is to their right, so any id will do and no attention mask is needed.
    """
    import torch

    ids = np.zeros((len(batch.windows), batch.width), "<i8")
    for row, (window, length) in enumerate(zip(batch.windows, batch.lengths, strict=True)):
        start = int(window_offset[window])
        ids[row, :length] = input_ids[start : start + length]
    return torch.from_numpy(ids)
