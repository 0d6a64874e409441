"""Memory of simulated devices: blocks from a caching allocator, poison, pinned pages, a limit.

What the host frees may be given out again while work that uses it is still queued, as on a GPU: by
the next allocation on the same stream. The poison that stands for the next owner's values comes
there, in the order of that stream and of no other.
"""

import bisect
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from theloom.memory.caching_allocator import Block, CachingAllocator

from simulated_cuda.streams import LOCK, Mark, Schedule, Stream

NAME, CAPABILITY = "Simulated GPU", (9, 0)


def poison(memory: torch.Tensor, most: int | None = None) -> None:
    """NaN in every float, -1 in every signed integer; over the whole storage of a CPU tensor, or
    so many bytes of it.
    """
    with torch.inference_mode(), torch._C._DisableTorchDispatch():
        torch.empty(0, dtype=torch.uint8).set_(memory.untyped_storage())[:most].fill_(0xFF)


class _FullError(Exception):
    """The driver has no room for another segment."""


class _Pool(CachingAllocator):
    """The blocks of one stream, whose segments the device must have room for."""

    def __init__(self, device: "Device") -> None:
        super().__init__(device.expandable)
        self._device = device

    def _hold(self, nbytes: int) -> None:
        if self._device.reserved + nbytes > self._device.limit:
            raise _FullError
        super()._hold(nbytes)


@dataclass
class Owned:
    """A block while tensors own it. `streams` are those that record_stream named."""

    device: "Device"
    stream: Stream
    memory: torch.Tensor
    block: Block | None
    streams: set[Stream] = field(default_factory=set)


class Memory:
    """What all tensors that share a block refer to; with the last of them the block is freed."""

    def __init__(self, owned: Owned) -> None:
        self.owned = owned

    def __del__(self) -> None:
        # any thread, at any moment: it is freed before anything else is queued
        self.owned.device.ended.append(self.owned)


class Device:
    """One GPU. Bytes as torch.cuda counts them; `total` is what the driver shows, `fraction` of
    which this process may take. `fail` says of an allocation, by number and bytes, that it fails.
    """

    def __init__(self, schedule: Schedule, index: int, total: int) -> None:
        self.index, self.total, self.fraction = index, total, 1.0
        settings = torch._C._accelerator_getAllocatorSettings()
        self.expandable = "expandable_segments:True" in settings
        self.schedule, self.stream = schedule, Stream(schedule, index, is_default=True)
        self._pools: dict[Stream, _Pool] = {}
        self._freed: dict[Stream, list[torch.Tensor]] = {}
        self.ended: deque[Owned] = deque()
        self._deferred: list[tuple[Owned, list[Mark]]] = []
        self.peak_allocated = self.peak_reserved = self.allocations = self.failures = 0
        self.fail: Callable[[int, int], bool] = lambda number, nbytes: False

    @property
    def limit(self) -> int:
        return int(self.total * self.fraction)

    @property
    def allocated(self) -> int:
        self.collect()
        waiting = sum(owned.block.size for owned, _ in self._deferred if owned.block)
        return sum(pool.allocated for pool in self._pools.values()) - waiting

    @property
    def reserved(self) -> int:
        return sum(pool.reserved for pool in self._pools.values())

    def give(self, memory: torch.Tensor, stream: Stream, written: bool) -> Memory:
        """A block for a tensor; poisoned now and, unless what comes next on the stream writes all
        of it, also in the order of the stream. Raises torch.OutOfMemoryError.
        """
        nbytes = memory.untyped_storage().nbytes()
        if nbytes == 0:
            return Memory(Owned(self, stream, memory, None))
        self.collect(events=True)
        self.allocations += 1
        try:
            block = self._block(nbytes, stream)
        except _FullError:
            self.failures += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes / 2**20:.2f} MiB. GPU {self.index} "
                f"has a total capacity of {self.total / 2**20:.2f} MiB of which "
                f"{(self.limit - self.reserved) / 2**20:.2f} MiB is free."
            ) from None
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        for freed in self._freed.pop(stream, ()):  # whose memory this may be
            stream.push(partial(poison, freed))
        poison(memory)
        if not written:
            stream.push(lambda: poison(memory))
        return Memory(Owned(self, stream, memory, block))

    def _block(self, nbytes: int, stream: Stream) -> Block:
        pool = self._pools.setdefault(stream, _Pool(self))
        if self.fail(self.allocations, nbytes):
            raise _FullError
        try:
            return pool.allocate(nbytes)
        except _FullError:  # what is cached goes back to the driver, once its work is done
            self.empty_cache()
            return pool.allocate(nbytes)

    def collect(self, events: bool = False) -> None:
        """Free what tensors have let go. What another stream still uses is freed by the next
        allocation after that stream is through, which looks at `events`.
        """
        with LOCK:
            while self.ended:
                owned = self.ended.popleft()
                if owned.block is not None:
                    others = [s.mark() for s in owned.streams if s is not owned.stream]
                    if others:
                        self._deferred.append((owned, others))
                    else:
                        self._free(owned)
            if events:
                deferred, self._deferred = self._deferred, []
                for owned, others in deferred:
                    if all(mark.done for mark in others):
                        self._free(owned)
                    else:
                        self._deferred.append((owned, others))

    def _free(self, owned: Owned) -> None:
        assert owned.block is not None
        self._pools[owned.stream].release(owned.block)
        self._freed.setdefault(owned.stream, []).append(owned.memory)

    def empty_cache(self) -> None:
        """Give segments that nothing uses back to the driver, which waits for the device."""
        with LOCK:
            self.finish()
            self.collect(events=True)
            for freed in (memory for several in self._freed.values() for memory in several):
                poison(freed)
            self._freed.clear()
            for pool in self._pools.values():
                pool.trim()

    def finish(self) -> None:
        """Run all that is queued."""
        for stream in self.schedule.streams:
            if stream.device.index == self.index:
                stream.wait_on_host()

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved


class Pinned:
    """Page-locked memory of the host: from torch's caching allocator, which takes powers of two,
    or registered by address.
    """

    def __init__(self) -> None:
        self._storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = (
            weakref.WeakValueDictionary()
        )
        self._registered: dict[int, int] = {}
        self.peak = 0

    @property
    def taken(self) -> int:
        """Bytes that are pinned now, as they are really taken."""
        sizes = [s.nbytes() for s in list(self._storages.values())]
        return sum(1 << (n - 1).bit_length() for n in sizes if n) + sum(self._registered.values())

    def made(self, memory: torch.Tensor) -> torch.Tensor:
        """Mark a new host tensor as pinned."""
        storage = memory.untyped_storage()
        self._storages[storage._cdata] = storage
        self.peak = max(self.peak, self.taken)
        return memory

    def register(self, address: int, nbytes: int) -> int:
        self._registered[address] = nbytes
        self.peak = max(self.peak, self.taken)
        return 0

    def unregister(self, address: int) -> int:
        return 0 if self._registered.pop(address, None) is not None else 1

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor's memory is pinned."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return True
        starts = sorted(self._registered)
        at = bisect.bisect_right(starts, storage.data_ptr()) - 1
        end = starts[at] + self._registered[starts[at]] if at >= 0 else 0
        return storage.data_ptr() + storage.nbytes() <= end
