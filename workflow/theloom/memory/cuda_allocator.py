"""Numbers of PyTorch's CUDA caching allocator.

`caching_allocator` replays its rules.
"""

Event = tuple[int, int]  # of LiveStorages: the number of a storage, its bytes; negative at its end

KIB, MIB = 1 << 10, 1 << 20

# c10/core/AllocatorConfig.h
ROUNDING = 512  # every block is a multiple of this
SMALL = MIB  # the largest request that the small pool serves
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # of requests under LARGEST_SHARED; larger ones get a segment of their own
LARGEST_SHARED = 10 * MIB
SEGMENT_ROUNDING = 2 * MIB
