"""Host memory that rows wait in on their way from the model to the file: taken once, and used over
and over.

A ring: what is taken first is given back first. So the memory of a run does not grow with what it
writes, and where the disk is slower than the model, the model waits.
"""

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Copies from a GPU that may be on their way at once, each of which holds its value on the device
# until it is done.
IN_FLIGHT = 2


# Bytes of the ring: what a GPU makes, or a CPU, while a disk takes a tenth of a second to commit.
RING_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


# Bytes of the writer beside it: its threads and their tiles of rows whose statistics are estimated
# (seen: 17 to 23 MB).
WRITER_BYTES = 24 << 20


_ALIGNED = 64  # bytes: a cache line, and more than any element


def ring_bytes(device: str, largest: int) -> int:
    """The size of the ring on a device (`cpu` or `cuda`) where the largest value has so many bytes:
    two of it fit.
    """
    return max(RING_BYTES[device], 2 * (largest + _ALIGNED))


def bytes_on_device(device: str, largest: int) -> int:
    """What values on their way to the file take of the device's memory: a CPU's has ring and writer
    in it.
    """
    return ring_bytes(device, largest) + WRITER_BYTES if device == "cpu" else IN_FLIGHT * largest


class Ring:
    """A buffer of `capacity` bytes, page-locked if `pinned`, so that a GPU can copy into it while
    it computes.

    One thread takes offsets and another gives them back, in the order in which they were taken.
    """

    def __init__(self, capacity: int, pinned: bool = False) -> None:
        import torch

        self.capacity = capacity
        self._buffer = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        self._taken: deque[tuple[int, int]] = (
            deque()
        )  # first byte and end of each offset, oldest first
        self._changed = threading.Condition()
        self._closed = False

    def take(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor | None":
        """A tensor to fill, once there is room for it; None if the ring was closed meanwhile.

        Raises ValueError for what is larger than the whole ring.
        """
        size = dtype.itemsize
        for n in shape:
            size *= n
        if size > self.capacity:
            raise ValueError(f"{size} bytes do not fit a ring of {self.capacity}")
        with self._changed:
            while (offset := self._room_for(size)) is None and not self._closed:
                self._changed.wait()
            if offset is None or self._closed:
                return None
            self._taken.append((offset, offset + max(_ALIGNED, -(-size // _ALIGNED) * _ALIGNED)))
        return self._buffer[offset : offset + size].view(dtype).view(shape)

    def give_back(self) -> None:
        """The oldest offset is free again."""
        with self._changed:
            self._taken.popleft()
            self._changed.notify()

    def close(self) -> None:
        """Nobody waits for room any more: `take` gives None."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _room_for(self, size: int) -> int | None:
        """Where that many bytes are free in one piece."""
        if not self._taken:
            return 0
        first, end = self._taken[0][0], self._taken[-1][1]
        if end > first:  # what is taken lies in one piece: there is room behind it, and before it
            if end + size <= self.capacity:
                return end
            return 0 if size <= first else None
        return end if end + size <= first else None
