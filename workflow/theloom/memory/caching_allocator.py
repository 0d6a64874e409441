"""What PyTorch's CUDA caching allocator gives out and holds, replayed request by request.

Tensors do not get the bytes that they ask for. The allocator rounds each request, carves it out of
a segment that it got from the driver, keeps what is freed, and merges neighbours that are both
free. `allocated` is what `max_memory_allocated` shows, `reserved` what `max_memory_reserved` shows
and what must fit.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in torch 2.13, on one stream: blocks of any
size are split, and nothing is given back to the driver, which real programs do only when they would
run out. Of free blocks of one size the one at the lowest address is taken; the driver is taken to
hand out rising addresses. Expandable segments (`expandable_segments:True`) are one segment a pool
that grows at its end by pages: what is free at the end is then part of a larger request.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from theloom.memory.cuda_allocator import (
    LARGE_SEGMENT,
    LARGEST_SHARED,
    ROUNDING,
    SEGMENT_ROUNDING,
    SMALL,
    SMALL_SEGMENT,
    Event,
)

_SMALL_ADDRESSES = 1 << 60  # where the small pool's segment that grows begins


@dataclass(frozen=True)
class Usage:
    """Peaks in bytes: of the blocks that were given out, and of the segments that were held for
    them.
    """

    allocated: int
    reserved: int


class Block:
    """A part of a segment, given out or free, and its neighbours there."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(
        self, address: int, size: int, small: bool, before: "Block | None", after: "Block | None"
    ) -> None:
        self.address, self.size, self.small, self.free = address, size, small, True
        self.before, self.after = before, after


class CachingAllocator:
    """The blocks of one stream. `allocated` and `reserved` are bytes at this moment."""

    def __init__(self, expandable: bool = False) -> None:
        self.expandable = expandable
        self.allocated = 0
        self.reserved = 0
        self._most = self._most_reserved = 0
        self.free_blocks: dict[int, Block] = {}  # by address
        self._pools: dict[bool, list[tuple[int, int]]] = {
            True: [],
            False: [],
        }  # small or not: sorted (size, address)
        self._end = 0  # the address of the next segment
        self._last: dict[bool, Block] = {}  # of a pool's segment that grows

    @property
    def peak(self) -> Usage:
        """The most bytes allocated, and reserved, so far."""
        return Usage(self._most, self._most_reserved)

    def allocate(self, nbytes: int) -> Block:
        """Allocate memory as CUDA's caching allocator does.

        Args:
            nbytes: the size of the request, more than 0.

        Returns:
            The block that it is given, of no fewer bytes.

        Examples:
            >>> CachingAllocator().allocate(1000).size
            1024
        """
        size = -(-nbytes // ROUNDING) * ROUNDING
        small = size <= SMALL
        block = self._fitting(size, small) or (
            self._grown(size, small) if self.expandable else self._segment(size, small)
        )
        rest = block.size - size
        # in the large pool a rest of 1 MiB or less is not split off, and counts as given out,
        # unless the segment grows
        if rest >= ROUNDING if small or self.expandable else rest > SMALL:
            remainder = Block(block.address + size, rest, small, block, block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.size = remainder, size
            if block is self._last.get(small):
                self._last[small] = remainder
            self._put(remainder)
        block.free = False
        self.allocated += block.size
        self._most = max(self._most, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free a block that was given out, and merge it with its neighbours that are free.

        Args:
            block: of `allocate`.
        """
        self.allocated -= block.size
        block.free = True
        before, after = block.before, block.after
        if after is not None and after.free:
            self._take((after.size, after.address))
            self._merge(block, after)
        if before is not None and before.free:
            self._take((before.size, before.address))
            self._merge(before, block)
            block = before
        self._put(block)

    def trim(self) -> None:
        """Give back to the driver what is free: segments as a whole, or pages of one that grows."""
        for block in list(self.free_blocks.values()):
            if self.expandable:
                page = SMALL_SEGMENT if block.small else LARGE_SEGMENT
                if block is self._last[block.small] and (pages := block.size // page * page):
                    self._take((block.size, block.address))
                    block.size -= pages
                    self.reserved -= pages
                    if block.size:
                        self._put(block)
                    elif block.before is None:
                        del self._last[block.small]
                    else:
                        block.before.after, self._last[block.small] = None, block.before
            elif block.before is None and block.after is None:
                self._take((block.size, block.address))
                self.reserved -= block.size

    def _fitting(self, size: int, small: bool) -> Block | None:
        """The smallest free block of that size or more, taken. The end of a segment that grows
        counts as larger than all others.
        """
        pool = self._pools[small]
        best = bisect_left(pool, (size, 0))
        if self.expandable and best + 1 < len(pool):
            best += self.free_blocks[pool[best][1]] is self._last[small]
        return self._take(pool[best]) if best < len(pool) else None

    def _hold(self, nbytes: int) -> None:
        """Get so much more from the driver."""
        self.reserved += nbytes
        self._most_reserved = max(self._most_reserved, self.reserved)

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            length = SMALL_SEGMENT
        elif size < LARGEST_SHARED:
            length = LARGE_SEGMENT
        else:
            length = -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        self._hold(length)
        block = Block(self._end, length, small, None, None)
        self._end += length
        return block

    def _grown(self, size: int, small: bool) -> Block:
        """The end of a pool's segment, which grows until it has that size."""
        last, page = self._last.get(small), SMALL_SEGMENT if small else LARGE_SEGMENT
        missing = size - (last.size if last is not None and last.free else 0)
        length = -(-missing // page) * page
        self._hold(length)
        if last is None or not last.free:
            start = last.address + last.size if last else (_SMALL_ADDRESSES if small else 0)
            block = Block(start, length, small, last, None)
            if last is not None:
                last.after = block
            self._last[small] = block
            return block
        self._take((last.size, last.address))
        last.size += length
        return last

    def _put(self, block: Block) -> None:
        insort(self._pools[block.small], (block.size, block.address))
        self.free_blocks[block.address] = block

    def _take(self, entry: tuple[int, int]) -> Block:
        block = self.free_blocks.pop(entry[1])
        pool = self._pools[block.small]
        del pool[bisect_left(pool, entry)]
        return block

    def _merge(self, first: Block, second: Block) -> None:
        if second is self._last.get(second.small):
            self._last[second.small] = first
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first


def replay(
    weights: Sequence[int],
    events: Sequence[Event],
    warmed_up: bool = False,
    expandable: bool = False,
) -> Usage:
    """Replay a model's life: its weights first, which stay, then the births and ends of storages.

    Args:
        weights: bytes of each storage in the order of loading; what else stays for good is one more
            of them, such as the cuBLAS workspace.
        events: births and ends, in order.
        warmed_up: all bytes of the weights are requested at once and freed before the first is
            loaded, as transformers 5 does where `from_pretrained` has a device_map; weights then
            lie close together.
        expandable: segments grow.

    Returns:
        The peaks, in bytes.

    Raises:
        ValueError: a storage ends that was not born.
    """
    allocator = CachingAllocator(expandable)
    total = sum(weights)
    if warmed_up and total > 0:
        allocator.release(allocator.allocate(total))
    for nbytes in weights:
        if nbytes:
            allocator.allocate(nbytes)
    blocks: dict[int, Block] = {}
    for number, nbytes in events:
        if nbytes > 0:
            blocks[number] = allocator.allocate(nbytes)
        elif nbytes < 0:
            if number not in blocks:
                raise ValueError(f"storage {number} ends and was not born before")
            allocator.release(blocks.pop(number))
    return allocator.peak


def in_turn(passes: Iterable[Sequence[Event]]) -> list[Event]:
    """Join the events of several traces, one after another: batches of different shapes.

    What a pass still holds at its end is freed there.

    Args:
        passes: the events of each, in their order.

    Returns:
        The events as those of one trace.
    """
    joined: list[Event] = []
    first = 0
    for events in passes:
        alive: dict[int, int] = {}
        for number, nbytes in events:
            joined.append((first + number, nbytes))
            if nbytes > 0:
                alive[number] = nbytes
            else:
                alive.pop(number, None)
        joined += [(first + number, -nbytes) for number, nbytes in alive.items()]
        first += 1 + max((number for number, _ in events), default=-1)
    return joined
