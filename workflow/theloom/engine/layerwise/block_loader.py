"""The weights of one block after the other, read ahead of the computation by one thread into two
reused buffers.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from theloom.devices import host, streams
from theloom.devices.pinned import pinned_empty
from theloom.devices.streams import DONE, Mark, SideStreams
from theloom.engine.layerwise.quantize import OnDisk
from theloom.engine.layerwise.weights_index import Checkpoint, Stored
from theloom.model.quantization import with_scales

log = logging.getLogger(__name__)

READ_BYTES = 64 << 20


class BlockSource:
    """Attaches blocks to a model one at a time, while the next is on its way from disk.

    On a GPU with streams the buffers are pinned, and the next block is copied to the device next to
    the computation; the device holds two blocks. On the CPU parameters are views of the buffers.
    `waited` are the seconds for which the computation stood still for want of weights, `bytes_read`
    what came from the files. Pages read are dropped from the page cache where the blocks are more
    than half of what is free: they would be gone before the next sweep, and take others' room. Of a
    quantised model the thread makes the next block itself, tensor by tensor, each in memory of its
    own: the device holds two quantised blocks, the host one tensor as it is in its file.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, blocks: int) -> None:
        self._checkpoint, self._device, self._blocks = checkpoint, device, blocks
        self._files = {
            f: os.open(f, os.O_RDONLY) for f in {s.file for s in checkpoint.stored.values()}
        }
        self._sides = SideStreams()
        self._slots = self._new_slots()
        self.largest = max(checkpoint.room(block) for block in range(blocks))  # of the buffers
        total = sum(checkpoint.nbytes(block) for block in range(blocks))
        self._drop = hasattr(os, "posix_fadvise") and total > host.memory().free / 2
        self.waited = 0.0
        self.bytes_read = 0

    def close(self) -> None:
        """Close the files and let the buffers go."""
        for fd in self._files.values():
            os.close(fd)
        self._files, self._slots = {}, []

    def release(self) -> None:
        """Let the buffers go; the next sweep makes new ones."""
        self._slots = self._new_slots()

    def _new_slots(self) -> list["_Slot"]:
        return [_Slot(self._device, self._sides) for _ in range(2)]

    def __enter__(self) -> "BlockSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sweep(self, blocks: Sequence[int]) -> Iterator[int]:
        """Attach blocks in turn, while the next one is read.

        Args:
            blocks: their numbers.

        Yields:
            The number of each block; its weights stay attached until the next one is requested.

        Raises:
            ModelError: a tensor is missing.
            OSError: a file cannot be read.
        """
        ready: queue.Queue[Any] = queue.Queue()
        free, stop = threading.Semaphore(len(self._slots)), threading.Event()

        def read_ahead() -> None:
            try:
                for number, block in enumerate(blocks):
                    free.acquire()
                    if stop.is_set():
                        return
                    ready.put(self._read(block, self._slots[number % 2]))
            except BaseException as error:
                ready.put(error)

        reader = threading.Thread(target=read_ahead, name="block reader", daemon=True)
        reader.start()
        try:
            for number, block in enumerate(blocks):
                since = time.perf_counter()
                tensors = ready.get()
                self.waited += time.perf_counter() - since
                if isinstance(tensors, BaseException):
                    raise tensors
                slot = self._slots[number % 2]
                slot.arrived()
                try:
                    if self._checkpoint.quantized:
                        slot.used_here(tensors)
                        self._checkpoint.place(block, tensors)
                    else:
                        self._checkpoint.attach(block, tensors, self._device)
                    del tensors
                    yield block
                finally:
                    self._checkpoint.detach(block)
                    slot.done()
                    free.release()
        finally:
            stop.set()
            free.release()
            reader.join()

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read tensors, each into memory of its own on the host.

        Args:
            keys: of the checkpoint.

        Returns:
            Tensors by key, in the shape and dtype of the file.
        """
        tensors = {}
        for key in keys:
            stored = self._checkpoint.stored[key]
            shift = self._shift(stored)
            buffer = torch.empty(shift + stored.nbytes, dtype=torch.uint8)[shift:]
            self._fill(stored, buffer)
            tensors[key] = buffer.view(stored.dtype).view(stored.shape)
        return tensors

    def on_disk(self, keys: Sequence[str]) -> dict[str, OnDisk]:
        """Tensors that are read when they are requested.

        Args:
            keys: of the checkpoint.

        Returns:
            Such tensors by key.
        """
        stored = self._checkpoint.stored
        return {key: OnDisk(partial(self._read_alone, key), stored[key].dtype) for key in keys}

    def _read_alone(self, key: str) -> torch.Tensor:
        return self.read([key])[key]

    def mapped(self, key: str) -> torch.Tensor:
        """Map a tensor whose bytes stay in the file: only rows that are looked up are read.

        Args:
            key: of the checkpoint.

        Returns:
            A CPU tensor in the shape and dtype of the file.
        """
        stored = self._checkpoint.stored[key]
        pages = np.memmap(stored.file, "u1", mode="c", offset=stored.offset, shape=(stored.nbytes,))
        return torch.from_numpy(pages).view(stored.dtype).view(stored.shape)

    def _read(self, block: int, slot: "_Slot") -> dict[str, torch.Tensor]:
        keys = self._checkpoint.keys[block]
        if self._checkpoint.quantized:
            with slot.arriving():
                return self._checkpoint.load(block, self.on_disk(keys), self._device)
        buffer = slot.for_reading(self.largest)
        places, offset = {}, 0
        for key in keys:
            stored = self._checkpoint.stored[key]
            start = offset + self._shift(stored)
            self._fill(stored, buffer[start : start + stored.nbytes])
            places[key] = (start, stored)
            offset += stored.room
        on_device = slot.send(offset)
        return {
            key: on_device[start : start + stored.nbytes].view(stored.dtype).view(stored.shape)
            for key, (start, stored) in places.items()
        }

    def _shift(self, stored: Stored) -> int:
        return stored.shift if self._device.type == "cpu" else 0

    def _fill(self, stored: Stored, buffer: torch.Tensor) -> None:
        fd, view, done = self._files[stored.file], buffer.numpy().data, 0
        while done < stored.nbytes:
            got = os.preadv(fd, [view[done : done + READ_BYTES]], stored.offset + done)
            if not got:
                raise OSError(f"{stored.file.name} ended at byte {stored.offset + done}")
            done += got
        if self._drop:
            os.posix_fadvise(fd, stored.offset, stored.nbytes, os.POSIX_FADV_DONTNEED)
        self.bytes_read += stored.nbytes


class _Slot:
    """One reused buffer on the host, and on a GPU its twin there."""

    def __init__(self, device: torch.device, sides: SideStreams) -> None:
        self._device, self._sides = device, sides
        self._host = self._there = torch.empty(0, dtype=torch.uint8)
        self._copied = self._used = DONE

    def for_reading(self, size: int) -> torch.Tensor:
        """The host's buffer, once what was in it has been copied."""
        self._copied.synchronize()
        if self._host.numel() < size:
            self._host = self._there = pinned_empty(size, torch.uint8, self._device)
            if self._device.type != "cpu":
                self._there = torch.empty(size, dtype=torch.uint8, device=self._device)
                self._used = streams.mark(self._device)  # by what had this memory before
        return self._host

    def send(self, size: int) -> torch.Tensor:
        """The bytes where the block will be: the buffer itself on the CPU, a copy under way on a
        GPU, after what the block before the last still computes there.
        """
        if self._there is not self._host:
            self._copied = streams.copy_in(
                self._host[:size], self._there[:size], self._sides, self._used
            )
        return self._there

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """What is made within is made on the copies' stream of a GPU, once the computation is
        through with the block that the slot had: the device never holds a third one.
        """
        self._used.synchronize()
        side = self._sides.of(self._device)
        with streams.use(side):
            yield
        self._copied = DONE if side is None else Mark(side)

    def used_here(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have the memory of tensors made on the copies' stream given out again once the
        computation is through.
        """
        if self._sides.of(self._device) is not None:
            for tensor in (part for weight in tensors.values() for part in with_scales(weight)):
                streams.used_by_computation(tensor)

    def arrived(self) -> None:
        """Let the computation wait for the copy."""
        self._copied.before_next()

    def done(self) -> None:
        """Say that everything which reads the block has been queued."""
        self._used = streams.mark(self._device)
