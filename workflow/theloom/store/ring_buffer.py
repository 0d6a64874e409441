"""Host memory in which rows wait on their way from the model to the file; it is allocated once.

Slots are given back in the order in which they were taken. So the memory of a run does not grow
with what it writes, and where the disk is slower than the model, the model waits.
"""

import threading
from collections import deque
from typing import TYPE_CHECKING

from theloom.devices import pinned

if TYPE_CHECKING:
    import torch


# Copies from a GPU that may be in flight at once; each keeps its value on the device until it is
# done.
IN_FLIGHT = 2

# Bytes of the ring: what a GPU, or a CPU, produces while a disk commits for a tenth of a second.
RING_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}

# Most bytes of the ring for what several GPUs have on their way.
MOST_AHEAD = 8 << 30

# Bytes of the writer next to the ring: its threads, and the tiles of rows for the statistics
# (measured: 17 to 23 MB).
WRITER_BYTES = 24 << 20

_ALIGNED = 64  # bytes: a cache line, and more than any element


def bytes_ahead(step: int, gpus: int) -> int:
    """Compute the bytes of the values that wait at once while each of a job's GPUs works at a
    forward step of its own: the model's thread is that far ahead of the last GPU.

    Args:
        step: bytes of the values of one step, all hook points.
        gpus: of the job.

    Returns:
        Bytes, at most `MOST_AHEAD`; 0 for one GPU.

    Examples:
        >>> bytes_ahead(1000, gpus=3)
        3000
    """
    return min(gpus * step, MOST_AHEAD) if gpus > 1 else 0


def ring_bytes(device: str, largest: int, ahead: int = 0) -> int:
    """Compute the size of the ring: the largest value fits in it twice.

    Args:
        device: `cpu`, or the type of a GPU.
        largest: bytes of the largest value.
        ahead: as `bytes_ahead`; no more is taken than may be pinned.

    Returns:
        Bytes.
    """
    least = max(RING_BYTES.get(device, RING_BYTES["cuda"]), 2 * (largest + _ALIGNED))
    return ahead if ahead > least and pinned.may_pin(ahead) else least


def bytes_on_device(device: str, largest: int) -> int:
    """Bytes of the device's memory for values on their way to the file.

    Args:
        device: `cpu`, whose memory holds ring and writer too, or `cuda`.
        largest: bytes of the largest value.

    Returns:
        Bytes.

    Examples:
        >>> bytes_on_device("cuda", 1000)
        2000
    """
    return ring_bytes(device, largest) + WRITER_BYTES if device == "cpu" else IN_FLIGHT * largest


class Ring:
    """A buffer from which one thread takes slots, and to which another gives them back, in order.

    Args:
        capacity: bytes.
        device: what copies into it; None: the CPU.

    Attributes:
        buffer: its memory, (capacity,) bytes.
    """

    def __init__(self, capacity: int, device: "torch.device | None" = None) -> None:
        import torch

        self.capacity = capacity
        self.buffer = pinned.pinned_empty(capacity, torch.uint8, device or torch.device("cpu"))
        # first byte and end of each slot, oldest first
        self._taken: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def take(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor | None":
        """Wait for room, and take a slot.

        Args:
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            An uninitialised tensor in the buffer; None if the ring was closed meanwhile.

        Raises:
            ValueError: the tensor is larger than the whole ring.
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
        return self.buffer[offset : offset + size].view(dtype).view(shape)

    def give_back(self) -> None:
        """Free the oldest slot."""
        with self._changed:
            self._taken.popleft()
            self._changed.notify()

    def close(self) -> None:
        """Stop waiting for room: `take` returns None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _room_for(self, size: int) -> int | None:
        """The offset of this many contiguous free bytes."""
        if not self._taken:
            return 0
        first, end = self._taken[0][0], self._taken[-1][1]
        if end > first:  # the slots are contiguous: there is room after them, and before them
            if end + size <= self.capacity:
                return end
            return 0 if size <= first else None
        return end if end + size <= first else None
