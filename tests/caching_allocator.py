"""CUDA caching allocator, replayed."""

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
    """The blocks of one GPU. `allocated` and `reserved` are bytes at this moment."""

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self._most = 0  # of `allocated`
        self.free_blocks: dict[int, Block] = {}  # by address
        self._pools: dict[bool, list[tuple[int, int]]] = {
            True: [],
            False: [],
        }  # small or not: sorted (size, address)
        self._end = 0  # the address of the next segment

    @property
    def peak(self) -> Usage:
        return Usage(self._most, self.reserved)  # segments are kept

    def allocate(self, nbytes: int) -> Block:
        """The block that a request of so many bytes, more than 0, is given."""
        size = -(-nbytes // ROUNDING) * ROUNDING
        small = size <= SMALL
        pool = self._pools[small]
        best = bisect_left(pool, (size, 0))
        block = self._take(pool[best]) if best < len(pool) else self._segment(size, small)
        rest = block.size - size
        # a rest of 1 MiB or less is not split off in the large pool: it counts as given out
        if rest >= ROUNDING if small else rest > SMALL:
            remainder = Block(block.address + size, rest, small, block, block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._put(remainder)
        block.free = False
        self.allocated += block.size
        self._most = max(self._most, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free a block that was given out, and merge it with its neighbours that are free."""
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
        """Give segments that are free as a whole back to the driver."""
        for block in list(self.free_blocks.values()):
            if block.before is None and block.after is None:
                self._take((block.size, block.address))
                self.reserved -= block.size

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            length = SMALL_SEGMENT
        elif size < LARGEST_SHARED:
            length = LARGE_SEGMENT
        else:
            length = -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        block = Block(self._end, length, small, None, None)
        self._end += length
        self.reserved += length
        return block

    def _put(self, block: Block) -> None:
        insort(self._pools[block.small], (block.size, block.address))
        self.free_blocks[block.address] = block

    def _take(self, entry: tuple[int, int]) -> Block:
        block = self.free_blocks.pop(entry[1])
        pool = self._pools[block.small]
        del pool[bisect_left(pool, entry)]
        return block

    @staticmethod
    def _merge(first: Block, second: Block) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first


def replay(weights: Sequence[int], events: Sequence[Event], warmed_up: bool = False) -> Usage:
    """The peaks of a model's life: its weights first, which stay, then the births and ends of
    storages, in order.

    `weights` are bytes of each storage in the order of loading; what else stays for good is one
    more of them, such as the cuBLAS workspace. `warmed_up`: all of their bytes are requested at
    once and let go before the first is loaded, as transformers 5 does where `from_pretrained` has a
    device_map; weights then lie close together. Raises ValueError where a storage ends that was not
    born.
    """
    allocator = CachingAllocator()
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
    """The events of several traces, one after another, as those of one: batches of different
    shapes, in their order.

    What a pass still holds at its end is let go there.
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
