"""The peak of memory within a block of code."""

import pytest
import torch
from support import touch
from theloom.devices import gpu
from theloom.devices.peak_memory import PeakMemory


def test_it_sees_what_was_freed_again():
    with PeakMemory(torch.device("cpu")) as peak:
        touch(64 << 20)
    assert 60 << 20 < peak.growth < 90 << 20


@pytest.mark.gpu
def test_that_of_a_gpu_is_the_allocator_s():
    device = gpu.choose_device("cuda")
    with PeakMemory(device) as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8, device=device)
        del block
    assert peak.growth == 64 << 20
    assert gpu.device_memory(device).total == torch.cuda.get_device_properties(device).total_memory
    assert gpu.compute_capability(device) >= (5, 0)
