"""The device of a run and its memory; what needs a GPU is marked so."""

import logging

import pytest
import torch
from theloom import gpu
from theloom.errors import ConfigError

CPU = torch.device("cpu")


def test_the_cpu_is_there():
    assert gpu.choose_device("cpu") == CPU
    assert gpu.compute_capability(CPU) is None
    assert gpu.device_name(CPU).startswith("CPU")


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"extraction\.device: cuda:99 is not there"):
        gpu.choose_device("cuda:99")


def test_memory_of_the_host():
    memory = gpu.device_memory(CPU)
    assert 0 < memory.free < memory.total
    assert memory.used == memory.total - memory.free


def test_a_cgroup_s_limit_counts(monkeypatch, tmp_path):
    limit, usage = tmp_path / "max", tmp_path / "current"
    limit.write_text("1000000\n")
    usage.write_text("400000\n")
    monkeypatch.setattr(gpu, "_cgroup_files", lambda: [(limit, usage)])
    assert gpu.device_memory(CPU) == gpu.DeviceMemory(1000000, 600000)
    limit.write_text("max\n")
    assert gpu.device_memory(CPU).total > 10**8


def test_a_warning_names_the_share_in_use(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "device_memory", lambda device: gpu.DeviceMemory(10 * 10**9, 10**9))
    with caplog.at_level(logging.WARNING):
        gpu.warn_above(0.95, CPU)
        assert not caplog.records
        gpu.warn_above(0.85, CPU)
    assert "90.0% in use (9.00 of 10.00 GB)" in caplog.text


def test_peak_memory_sees_what_was_freed_again():
    with gpu.PeakMemory(CPU) as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    assert 60 << 20 < peak.growth < 90 << 20


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_the_allocator_s():
    device = gpu.choose_device("cuda")
    with gpu.PeakMemory(device) as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8, device=device)
        del block
    assert peak.growth == 64 << 20
    assert gpu.device_memory(device).total == torch.cuda.get_device_properties(device).total_memory
    assert gpu.compute_capability(device) >= (5, 0)
