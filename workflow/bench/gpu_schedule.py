"""How long a model over several GPUs takes, by the rules of its copies and waits, from the seconds
of each GPU's part: computed without a GPU, or with the seconds that one measured.

`python workflow/bench/gpu_schedule.py` prints the gain for a few numbers of GPUs and batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timeline:
    """Seconds from the first batch's start to the last one's end, and those each GPU works."""

    seconds: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of all GPUs' time in which they have nothing to do."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def together(parts: Sequence[float], batches: int, copy: float = 0.0) -> Timeline:
    """Each GPU at a batch of its own.

    A copy to the next GPU starts once that has done what was queued on it, and it goes on behind
    the copy. A GPU keeps what it has given away for as many batches as there are GPUs, and then
    waits for the copy.

    Args:
        parts: Seconds of a batch on each GPU.
        batches: How many, of the same size.
        copy: Seconds of the copy of a batch from one GPU to the next.

    Examples:
        >>> together([1.0, 1.0], 3).seconds
        4.0
    """
    free = [0.0] * len(parts)
    copied: list[list[float]] = [[] for _ in parts]
    for batch in range(batches):
        for gpu, seconds in enumerate(parts):
            starts = free[gpu]
            if batch >= len(parts) and gpu + 1 < len(parts):
                starts = max(starts, copied[gpu][batch - len(parts)])
            if gpu:
                starts = max(free[gpu - 1], starts) + copy
                copied[gpu - 1].append(starts)
            free[gpu] = starts + seconds
    return Timeline(max(free), tuple(batches * seconds for seconds in parts))


def in_turn(parts: Sequence[float], batches: int, copy: float = 0.0) -> Timeline:
    """One GPU after the other, as they work at a single batch.

    Examples:
        >>> in_turn([1.0, 1.0], 3).seconds
        6.0
    """
    each = sum(parts) + copy * (len(parts) - 1)
    return Timeline(batches * each, tuple(batches * seconds for seconds in parts))


def main() -> None:
    """Print a table."""
    print("| GPUs | batches | copy / part of a batch | gain | bubble |\n|---|---|---|---|---|")
    for gpus in (2, 3, 4, 8):
        for batches in (4, 16, 256):
            for copy in (0.0, 0.02):
                parts = [1.0] * gpus
                found, before = together(parts, batches, copy), in_turn(parts, batches, copy)
                print(
                    f"| {gpus} | {batches} | {copy:.0%} | {before.seconds / found.seconds:.2f} "
                    f"| {found.bubble:.1%} |"
                )


if __name__ == "__main__":
    main()
