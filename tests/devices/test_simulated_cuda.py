"""The simulated CUDA does what CUDA's documentation says, so that it can tell right from wrong."""

import threading
import warnings

import pytest
import torch
from simulated_cuda import POLICIES, simulated

MIB = 1 << 20


@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_waits_gets_the_values_in_every_order(policy):
    found = {}
    for waits in (True, False):
        with simulated(policy=policy):
            side, host = torch.cuda.Stream(), torch.empty(4, pin_memory=True)
            value = torch.ones(4, device="cuda") * 5
            if waits:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                host.copy_(value, non_blocking=True)
                copied = side.record_event()
            copied.synchronize()
            found[waits] = host.tolist()
    assert found[True] == [5.0] * 4
    assert policy in ("compute_first", "eager", "random") or found[False] != found[True]


def test_a_copy_to_pageable_memory_waits_and_one_to_pinned_memory_does_not():
    with simulated() as world:
        value = torch.ones(4, device="cuda")
        pageable, pinned = torch.zeros(4), torch.zeros(4).pin_memory()
        pageable.copy_(value, non_blocking=True)
        assert pageable.tolist() == [1.0] * 4
        assert world.schedule.syncs["pageable memory"] == 1
        pinned.copy_(value * 2, non_blocking=True)
        assert pinned.tolist() == [0.0] * 4
        assert (value * 3).to("cpu", non_blocking=True).is_pinned()
        torch.cuda.synchronize()
        assert pinned.tolist() == [2.0] * 4


def test_a_pinned_source_is_read_when_the_copy_runs_a_pageable_one_at_once():
    with simulated():
        pageable, pinned = torch.ones(4), torch.ones(4).pin_memory()
        first, second = (t.to("cuda", non_blocking=True) for t in (pageable, pinned))
        pageable.zero_()
        pinned.zero_()
        assert first.tolist() == [1.0] * 4
        assert second.tolist() == [0.0] * 4


@pytest.mark.parametrize("recorded", [True, False])
def test_freed_memory_is_another_s_unless_its_stream_was_recorded(recorded):
    with simulated(policy="compute_first"):
        side, host = torch.cuda.Stream(), torch.empty(4, pin_memory=True)
        value = torch.ones(4, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        if recorded:
            value.record_stream(side)
        with torch.cuda.stream(side):
            host.copy_(value, non_blocking=True)
        del value
        torch.ones(4, device="cuda")
        torch.cuda.synchronize()
        assert bool(host.isnan().any()) is not recorded


def test_new_memory_is_written_only_after_the_stream_that_had_it():
    with simulated(policy="copies_first"):
        side, host = torch.cuda.Stream(), torch.ones(4).pin_memory()
        late, early = (torch.empty(4, device="cuda") for _ in range(2))
        with torch.cuda.stream(side):
            early.copy_(host, non_blocking=True)
            side.wait_stream(torch.cuda.default_stream())
            late.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        assert late.tolist() == [1.0] * 4
        assert early.isnan().all()


def test_the_allocator_rounds_keeps_segments_and_stops_at_the_limit():
    with simulated(total=24 * MIB) as world:
        small = torch.zeros(1, device="cuda")
        assert torch.cuda.memory_allocated() == 512
        assert torch.cuda.memory_reserved() == 2 * MIB
        large = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() == 22 * MIB
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(19 * MIB, dtype=torch.uint8, device="cuda")
        del large
        again = torch.zeros(19 * MIB, dtype=torch.uint8, device="cuda")  # what is cached goes back
        assert torch.cuda.max_memory_reserved() == 22 * MIB
        assert torch.cuda.mem_get_info() == (2 * MIB, 24 * MIB)
        assert world.devices[0].failures == 1
        del small, again
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated() == 0


def test_devices_do_not_mix_and_numbers_of_the_host_may():
    with simulated(devices=2):
        first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            first + second
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            first + torch.ones(2)
        assert (first + torch.tensor(2.0)).tolist() == [3.0, 3.0]
        assert (first.to("cuda:1") + second).tolist() == [2.0, 2.0]
        with torch.cuda.device(1):
            assert torch.empty(1, device="cuda").device == torch.device("cuda", 1)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.current_stream(2)


def test_a_thread_has_the_same_gpus_and_its_own_current_stream():
    seen = []

    def work() -> None:
        seen.append(torch.cuda.current_stream() is torch.cuda.default_stream())
        seen.append((torch.ones(2, device="cuda") + 1).tolist())

    with simulated(), torch.cuda.stream(torch.cuda.Stream()):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [True, [2.0, 2.0]]


def test_waits_are_counted_by_cause_and_the_debug_mode_names_them():
    with simulated() as world:
        value = torch.ones(2, device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value.sum().item()
            value.cpu()
            torch.cuda.Event(blocking=True).synchronize()  # never recorded: nothing to wait for
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.nonzero()
    assert len(caught) == 2
    assert world.schedule.syncs["blocking copy to the host"] == 1


def test_afterwards_torch_is_as_it_was():
    before = (torch.cuda.is_available, torch.Tensor.to, torch.Stream, torch.nn.Parameter.__new__)
    with simulated():
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
    after = (torch.cuda.is_available, torch.Tensor.to, torch.Stream, torch.nn.Parameter.__new__)
    assert before == after
