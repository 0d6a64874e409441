"""The replay of the CUDA caching allocator: cases worked out by hand, a slow second implementation,
and a GPU.
"""

import gc
import random

import pytest
import torch
from support import lines_run
from theloom.devices.workspace import cublas_workspace
from theloom.memory import trace
from theloom.memory.caching_allocator import Block, CachingAllocator, Usage, in_turn, replay
from theloom.memory.cuda_allocator import KIB, MIB
from theloom.memory.sizes import Workload
from theloom.model.fake import fake_model
from transformers import AutoConfig, AutoModel

LLAMA = {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([1], Usage(512, 2 * MIB)),
        ([512, 513], Usage(512 + 1024, 2 * MIB)),
        # the small pool: requests up to 1 MiB share segments of 2 MiB
        ([MIB, MIB], Usage(2 * MIB, 2 * MIB)),
        ([MIB, MIB, 512], Usage(2 * MIB + 512, 4 * MIB)),
        # it splits off whatever is left, were it 512 bytes
        ([MIB, MIB - 512, 512], Usage(2 * MIB, 2 * MIB)),
        # more than 1 MiB: segments of 20 MiB
        ([MIB + 1], Usage(MIB + 512, 20 * MIB)),
        ([9 * MIB, 9 * MIB], Usage(18 * MIB, 20 * MIB)),
        ([9 * MIB, 9 * MIB, 3 * MIB], Usage(21 * MIB, 40 * MIB)),
        # a rest of 1 MiB stays with its block and counts, one of 1 MiB + 512 bytes is split off
        ([9 * MIB, 10 * MIB - 1], Usage(20 * MIB, 20 * MIB)),
        ([9 * MIB, 10 * MIB - 512], Usage(19 * MIB - 512, 20 * MIB)),
        # 10 MiB and more: a segment of its own, rounded to 2 MiB
        ([10 * MIB], Usage(10 * MIB, 10 * MIB)),
        ([11 * MIB], Usage(12 * MIB, 12 * MIB)),
        ([11 * MIB - 512], Usage(11 * MIB - 512, 12 * MIB)),
        # what is left of it serves other large requests, and never small ones
        ([11 * MIB - 512, MIB + 512], Usage(12 * MIB, 12 * MIB)),
        ([11 * MIB - 512, 512], Usage(11 * MIB, 14 * MIB)),
    ],
)
def test_requests_are_rounded_and_packed_by_their_pool(
    requests: list[int], expected: Usage
) -> None:
    assert replay(requests, []) == expected
    assert replay([], [(number, nbytes) for number, nbytes in enumerate(requests)]) == expected


def test_a_freed_block_is_reused_and_the_smallest_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (40, 16, 60, 16)]
    for block in blocks:
        allocator.release(block)
    assert (
        allocator.allocate(15 * MIB).address == blocks[1].address
    )  # of two that fit alike, the lower address
    assert allocator.allocate(39 * MIB).address == blocks[0].address
    assert allocator.reserved == (40 + 16 + 60 + 16) * MIB
    assert allocator.allocated == (16 + 40) * MIB  # neither rest is more than 1 MiB


def test_freed_neighbours_become_one_block_from_either_side() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = CachingAllocator()
        blocks = [allocator.allocate(6 * MIB) for _ in range(3)]
        for number in order:
            allocator.release(blocks[number])
        assert [(b.address, b.size) for b in allocator.free_blocks.values()] == [(0, 20 * MIB)]
        allocator.allocate(20 * MIB)
        assert allocator.reserved == 20 * MIB


def test_free_blocks_of_different_segments_are_not_joined() -> None:
    first_two = [(0, 20 * MIB), (1, 20 * MIB), (0, -20 * MIB), (1, -20 * MIB)]
    assert replay([], [*first_two, (2, 40 * MIB)]) == Usage(40 * MIB, 80 * MIB)


def test_memory_fragments_where_a_living_block_lies_between_free_ones() -> None:
    events = [(0, 8 * MIB), (1, 4 * MIB), (2, 8 * MIB), (0, -8 * MIB), (2, -8 * MIB)]
    assert replay([], [*events, (3, 9 * MIB)]) == Usage(
        20 * MIB, 40 * MIB
    )  # 16 MiB are free, in two halves
    assert replay([], [*events, (1, -4 * MIB), (3, 16 * MIB)]) == Usage(20 * MIB, 20 * MIB)


def test_weights_loaded_into_one_warm_segment_lie_close_together() -> None:
    weights = [11 * MIB, 11 * MIB, 11 * MIB, 512]
    assert replay(weights, []) == Usage(36 * MIB + 512, 38 * MIB)
    assert replay(weights, [], warmed_up=True) == Usage(34 * MIB + 512, 36 * MIB)


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([1], Usage(512, 2 * MIB)),
        ([MIB, MIB, 512], Usage(2 * MIB + 512, 4 * MIB)),
        # pages of 20 MiB in the large pool, of 2 MiB in the small one
        ([MIB + 1], Usage(MIB + 512, 20 * MIB)),
        ([11 * MIB], Usage(11 * MIB, 20 * MIB)),
        ([21 * MIB], Usage(21 * MIB, 40 * MIB)),
        # what is free at the end is part of a larger request
        ([15 * MIB, 25 * MIB], Usage(40 * MIB, 40 * MIB)),
        # any rest is split off
        ([9 * MIB, 11 * MIB - 512, MIB + 512], Usage(21 * MIB, 40 * MIB)),
    ],
)
def test_expandable_segments_grow_by_pages(requests: list[int], expected: Usage) -> None:
    assert replay(requests, [], expandable=True) == expected


def test_expandable_segments_take_a_hole_before_their_end() -> None:
    events = [(0, 19 * MIB), (1, 10 * MIB), (0, -19 * MIB), (2, 11 * MIB), (3, 8 * MIB)]
    # the end (11 MiB) fits best and is left alone, as long as a hole fits
    assert replay([], events, expandable=True) == Usage(29 * MIB, 40 * MIB)
    assert replay([], [*events, (4, 20 * MIB)], expandable=True) == Usage(49 * MIB, 60 * MIB)


def test_pages_that_are_free_at_the_end_go_back_to_the_driver() -> None:
    allocator = CachingAllocator(expandable=True)
    first, second = allocator.allocate(5 * MIB), allocator.allocate(70 * MIB)
    allocator.release(second)
    allocator.trim()
    assert allocator.reserved == 20 * MIB
    again = allocator.allocate(36 * MIB)
    assert (again.address, allocator.reserved) == (5 * MIB, 60 * MIB)
    for block in (first, again):
        allocator.release(block)
    allocator.trim()
    assert (allocator.reserved, allocator.allocated, allocator.peak.reserved) == (0, 0, 80 * MIB)
    assert allocator.allocate(1 * MIB + 1).address == 0


def test_longest_batch_first_holds_less_memory_than_shortest_first() -> None:
    config = AutoConfig.for_model(
        **LLAMA, hidden_size=256, num_hidden_layers=2, intermediate_size=704, vocab_size=512
    )
    fake = fake_model(config, "fp32")
    lengths = [256, 640, 1024, 1536, 2048]
    traces = {
        n: trace.trace(fake, Workload(8, n, n), fake.residuals, device="cuda")[1].events
        for n in lengths
    }
    alone = replay(fake.weights, traces[2048])
    longest_first = replay(fake.weights, in_turn([traces[n] for n in reversed(lengths)]))
    shortest_first = replay(fake.weights, in_turn([traces[n] for n in lengths]))
    assert longest_first.allocated == alone.allocated
    assert longest_first.reserved < 1.02 * alone.reserved
    assert shortest_first.reserved > 1.1 * alone.reserved


def test_passes_in_turn_let_go_what_they_still_hold_and_keep_their_storages_apart() -> None:
    once = [(0, 4 * MIB), (1, 2 * MIB), (0, -4 * MIB)]
    joined = in_turn([once, [], once])
    assert len({number for number, _ in joined}) == 4
    assert sum(nbytes for _, nbytes in joined) == 0
    assert replay([], joined) == replay([], once)


def test_an_end_without_a_birth_is_refused() -> None:
    with pytest.raises(ValueError, match="storage 7 ends"):
        replay([], [(7, -512)])


def test_the_workspace_of_cublas_grew_with_hopper_and_blackwell() -> None:
    assert cublas_workspace((8, 0)) == cublas_workspace((7, 5)) == 8320 * KIB
    assert (
        cublas_workspace((9, 0))
        == cublas_workspace((10, 0))
        == cublas_workspace((12, 0))
        == 32 * MIB
    )


class Slow:
    """The same rules, written as a walk over every part of every segment."""

    def __init__(self) -> None:
        self.segments: list[
            tuple[bool, list[list]]
        ] = []  # small or not, and its parts: [bytes, owner or None]

    def grown(self, owner: int, nbytes: int) -> None:
        """As `allocate`, with one segment a pool that grows."""
        size = (nbytes + 511) // 512 * 512
        small = size <= MIB
        if not any(kind == small for kind, _ in self.segments):
            self.segments.append((small, []))
        (parts,) = (parts for kind, parts in self.segments if kind == small)
        holes = [(p[0], at) for at, p in enumerate(parts[:-1]) if p[1] is None and p[0] >= size]
        if holes:
            at = min(holes)[1]
        else:
            if not parts or parts[-1][1] is not None:
                parts.append([0, None])
            page = 2 * MIB if small else 20 * MIB
            while parts[-1][0] < size:
                parts[-1][0] += page
            at = len(parts) - 1
        rest = parts[at][0] - size
        parts[at : at + 1] = [[size, owner], *([[rest, None]] if rest else [])]

    def allocate(self, owner: int, nbytes: int) -> None:
        size = (nbytes + 511) // 512 * 512
        small = size <= MIB
        fitting = [
            (part[0], number, at)
            for number, (kind, parts) in enumerate(self.segments)
            for at, part in enumerate(parts)
            if kind == small and part[1] is None and part[0] >= size
        ]
        if not fitting:
            length = (
                2 * MIB
                if small
                else 20 * MIB
                if size < 10 * MIB
                else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            )
            self.segments.append((small, [[length, None]]))
            fitting = [(length, len(self.segments) - 1, 0)]
        length, number, at = min(fitting)
        parts = self.segments[number][1]
        if length - size >= (512 if small else MIB + 512):
            parts[at : at + 1] = [[size, owner], [length - size, None]]
        else:
            parts[at] = [length, owner]

    def release(self, owner: int) -> None:
        for number, (small, parts) in enumerate(self.segments):
            merged: list[list] = []
            for length, holder in parts:
                holder = None if holder == owner else holder
                if merged and holder is None and merged[-1][1] is None:
                    merged[-1][0] += length
                else:
                    merged.append([length, holder])
            self.segments[number] = (small, merged)

    def state(self) -> tuple[int, int, list[int]]:
        parts = [part for _, parts in self.segments for part in parts]
        free = sorted(length for length, owner in parts if owner is None)
        return sum(n for n, owner in parts if owner is not None), sum(n for n, _ in parts), free


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_requests_agree_with_the_slow_walk(seed: int, expandable: bool) -> None:
    draw = random.Random(seed)
    allocator, slow = CachingAllocator(expandable), Slow()
    place = slow.grown if expandable else slow.allocate
    alive: dict[int, tuple[int, Block]] = {}
    for number in range(1200):
        if alive and draw.random() < 0.48:
            owner = draw.choice(list(alive))
            allocator.release(alive.pop(owner)[1])
            slow.release(owner)
        else:
            nbytes = int(2 ** draw.uniform(4, 26))
            alive[number] = nbytes, allocator.allocate(nbytes)
            place(number, nbytes)
        free = sorted(block.size for block in allocator.free_blocks.values())
        assert (allocator.allocated, allocator.reserved, free) == slow.state()
        rounded = sum(-(-nbytes // 512) * 512 for nbytes, _ in alive.values())
        large = sum(nbytes > MIB for nbytes, _ in alive.values())
        assert rounded <= allocator.allocated <= rounded + large * MIB
        assert allocator.allocated <= allocator.reserved
    for _, block in alive.values():
        allocator.release(block)
    assert allocator.allocated == 0
    assert len(allocator.free_blocks) == len(slow.segments)
    assert sum(block.size for block in allocator.free_blocks.values()) == allocator.reserved


def test_an_event_takes_no_more_work_where_a_thousand_blocks_are_alive() -> None:
    draw = random.Random(0)
    events: list[tuple[int, int]] = []
    alive: list[tuple[int, int]] = []
    while len(events) < 10_000:
        if len(alive) > 1000:
            number, nbytes = alive.pop(draw.randrange(len(alive)))
            events.append((number, -nbytes))
        else:
            alive.append((len(events), int(2 ** draw.uniform(9, 26))))
            events.append(alive[-1])
    assert lines_run(lambda: replay([], events), "memory") < 100 * len(events)


@pytest.mark.gpu(real="kernels and their workspaces")
@pytest.mark.parametrize("tokens", [2048, 700])
def test_replay_of_a_trace_gives_the_peaks_of_a_gpu(tokens: int) -> None:
    config = AutoConfig.for_model(
        **LLAMA, hidden_size=2048, num_hidden_layers=8, intermediate_size=5632, vocab_size=32000
    )
    fake = fake_model(config, "bf16")
    live = trace.trace(fake, Workload(8, tokens, tokens), [], device="cuda")[1]
    expected = replay(
        [*fake.weights, cublas_workspace(torch.cuda.get_device_capability())], live.events
    )
    model = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before = Usage(torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    model.to("cuda")
    with torch.inference_mode():
        model(input_ids=torch.zeros(8, tokens, dtype=torch.int64, device="cuda"), use_cache=False)
    assert torch.cuda.max_memory_allocated() - before.allocated == pytest.approx(
        expected.allocated, rel=0.03
    )
    assert torch.cuda.max_memory_reserved() - before.reserved == pytest.approx(
        expected.reserved, rel=0.03
    )
