"""The device of a run and its memory; what needs a GPU is marked so.

Where a test is of several GPUs, of MIG or of a driver that fails, NVIDIA's driver and torch's CUDA
are stood in for, by what their documentation says that they answer; nothing of TheLoom is.
"""

import logging
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import fake_nvml
import pynvml
import pytest
import torch
from fake_nvml import GIB, Board
from theloom.devices import accelerator, gpu, host
from theloom.devices.host import DeviceMemory
from theloom.errors import ConfigError

CPU = torch.device("cpu")


def test_the_cpu_is_there():
    assert gpu.choose_device("cpu") == CPU
    assert gpu.compute_capability(CPU) is None
    assert accelerator.name(CPU).startswith("CPU")


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"extraction\.device: cuda:99 is not there"):
        gpu.choose_device("cuda:99")


def test_memory_of_the_host():
    memory = gpu.device_memory(CPU)
    assert 0 < memory.free < memory.total
    assert memory.used == memory.total - memory.free


def test_a_warning_names_the_share_in_use(monkeypatch, caplog):
    monkeypatch.setattr(host, "memory", lambda: DeviceMemory(10 * 10**9, 10**9))
    with caplog.at_level(logging.WARNING):
        gpu.warn_above(0.95, CPU)
        assert not caplog.records
        gpu.warn_above(0.85, CPU)
    assert "90.0% in use (9.00 of 10.00 GB)" in caplog.text


@pytest.fixture
def cuda(monkeypatch):
    """Puts a driver with boards in place of the real one, and has torch see some of them, in an
    order of its own.

    What torch's CUDA functions give there is set by keyword: `reserved`, `allocated` and `peak` of
    each device.
    """

    def install(boards: list[Board], seen: list[Board], names=None, errors=None, **figures: int):
        fake_nvml.install(monkeypatch, boards, names, errors)
        properties = [
            SimpleNamespace(
                name=board.name,
                major=board.capability[0],
                minor=board.capability[1],
                total_memory=board.total - board.reserved,
                uuid=board.uuid.removeprefix("GPU-").removeprefix("MIG-"),
            )
            for board in seen
        ]
        calls: list[str] = []

        def mem_get_info(device: torch.device) -> tuple[int, int]:
            calls.append("mem_get_info")
            board = seen[device.index]
            total = board.total - board.reserved
            return total - board.used, total

        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        functions = {
            "is_available": lambda: bool(seen),
            "device_count": lambda: len(seen),
            "get_device_properties": properties.__getitem__,
            "mem_get_info": mem_get_info,
            "memory_reserved": lambda index: figures.get("reserved", 0),
            "memory_allocated": lambda index: figures.get("allocated", 0),
            "max_memory_allocated": lambda index: figures.get("peak", 0),
            "reset_peak_memory_stats": lambda index: calls.append(f"reset {index.index}"),
            "empty_cache": lambda: calls.append("empty_cache"),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        return calls

    return install


def test_without_a_gpu_the_manager_answers_for_the_cpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    manager = gpu.GPUManager()
    info = manager.get_gpu_info()
    assert isinstance(info, gpu.GPUInfo)
    assert (info.index, info.name, info.uuid, info.compute_capability, info.processes) == (
        0,
        "CPU",
        "",
        None,
        (),
    )
    assert info.used_memory_gb + info.free_memory_gb == pytest.approx(info.total_memory_gb)
    assert 0.05 < info.own_memory_gb <= info.peak_memory_gb < info.total_memory_gb
    assert info.note.startswith("no GPU: ")
    assert manager.get_gpu_info(0).total_memory_gb == info.total_memory_gb
    assert manager.can_allocate(required_memory_gb=info.free_memory_gb / 2)
    assert not manager.can_allocate(required_memory_gb=info.total_memory_gb + 1)
    assert gpu.other_processes() == ""
    manager.empty_cache()


def test_the_snippets_of_the_documentation(capsys):
    for info in found if isinstance(found := gpu.GPUManager().get_gpu_info(), list) else [found]:
        print(f"GPU {info.index}: {info.used_memory_gb:.1f}/{info.total_memory_gb:.1f} GB")
        print(f"  Peak: {info.peak_memory_gb:.1f} GB")
    assert capsys.readouterr().out.startswith("GPU 0: ")
    for warning in gpu.GPUManager().check_memory_threshold(threshold=1e-6)["warnings"]:
        assert f"{warning['device']} at {warning['usage_percent']:.1f}%".startswith("0 at ")


def test_a_cgroup_s_limit_is_the_cpu_s_memory(monkeypatch):
    limited = DeviceMemory(2 * 10**9, 10**9, "the cgroup /job (2.0 GB)")
    monkeypatch.setattr(host, "memory", lambda: limited)
    assert gpu.device_memory(CPU) == limited
    if not torch.cuda.is_available():
        info = gpu.GPUManager().get_gpu_info()
        assert (info.total_memory_gb, info.free_memory_gb) == (2, 1)
        assert info.note.endswith("memory bound by the cgroup /job (2.0 GB)")
        assert not gpu.GPUManager().can_allocate(1.5)


def test_the_cpu_s_peak_can_be_reset():
    if torch.cuda.is_available() or not host.reset_peak_resident():
        pytest.skip("there is a GPU, or this kernel does not let a process reset its peak")
    manager = gpu.GPUManager()
    # The kernel's own pages: malloc may keep what a tensor frees, and the peak would stay.
    with mmap.mmap(-1, 128 << 20) as block:
        block.write(b"1" * len(block))
        peak = manager.get_gpu_info().peak_memory_gb
    manager.reset_peak_memory()
    assert peak - manager.get_gpu_info().peak_memory_gb > 0.1


def test_a_cpu_build_of_torch_says_which_gpus_there_are(monkeypatch):
    fake_nvml.install(monkeypatch, [Board("GPU-aa")])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    note = gpu.GPUManager().get_gpu_info().note
    assert (
        f"torch {torch.__version__} is built without CUDA; the driver shows NVIDIA A100-SXM4-80GB"
        in note
    )


def test_gpus_that_the_environment_hides(monkeypatch, cuda):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cuda([Board("GPU-aa")], [])
    note = gpu.GPUManager().get_gpu_info().note
    assert "torch finds no GPU that it can use; the driver shows NVIDIA A100-SXM4-80GB" in note
    assert "of which CUDA_VISIBLE_DEVICES='' may hide some" in note


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError])
def test_cuda_that_cannot_start(monkeypatch, cuda, kind):
    cuda([Board("GPU-aa")], [Board("GPU-aa")])

    def fail(index: int) -> None:
        raise kind("Cannot re-initialize CUDA in forked subprocess.\nMore.")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    info = gpu.GPUManager().get_gpu_info()
    assert info.name == "CPU"
    assert "torch cannot use CUDA: Cannot re-initialize CUDA in forked subprocess.;" in info.note


def test_devices_are_torch_s_and_their_figures_nvml_s_matched_by_uuid(monkeypatch, cuda):
    """The driver lists by PCI bus; CUDA_VISIBLE_DEVICES reverses the order and omits one."""
    slow = Board("GPU-aa", "NVIDIA T4", (7, 5), 15 * GIB, used=GIB)
    hidden = Board("GPU-bb", used=70 * GIB)
    fast = Board("GPU-cc", used=20 * GIB, reserved=GIB, processes=[(os.getpid(), 2 * GIB)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-cc,GPU-aa")
    calls = cuda([slow, hidden, fast], [fast, slow], peak=GIB, reserved=2 * GIB)
    first, second = gpu.GPUManager().get_gpu_info()
    assert (first.index, first.uuid, first.name) == (0, "GPU-cc", "NVIDIA A100-SXM4-80GB")
    assert (second.index, second.uuid, second.compute_capability) == (1, "GPU-aa", (7, 5))
    assert first.total_memory_gb * 1e9 == pytest.approx(79 * GIB)
    assert first.used_memory_gb * 1e9 == pytest.approx(20 * GIB)
    assert first.free_memory_gb * 1e9 == pytest.approx(59 * GIB)
    assert (first.peak_memory_gb * 1e9, first.own_memory_gb * 1e9) == pytest.approx((GIB, 2 * GIB))
    assert second.used_memory_gb * 1e9 == pytest.approx(GIB)
    assert gpu.GPUManager().get_gpu_info(1) == second
    assert first.other_processes == ()
    assert "mem_get_info" not in calls  # no context was made


def test_a_mig_instance_is_a_device(monkeypatch, cuda):
    instance = Board("MIG-22", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", total=9 * GIB, used=GIB)
    refused = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NO_PERMISSION}
    parent = Board("GPU-aa", mig=[Board("MIG-11", total=39 * GIB), instance], errors=refused)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-22")
    for seen in (instance, parent):  # CUDA gives the UUID of the instance, or of the GPU
        calls = cuda([parent], [seen])
        info = gpu.GPUManager().get_gpu_info()
        assert (info.uuid, info.total_memory_gb * 1e9) == ("MIG-22", pytest.approx(9 * GIB))
        assert not gpu.GPUManager().can_allocate(9.0)
        assert "mem_get_info" not in calls


def test_a_board_that_shares_the_host_s_memory_has_the_host_s(monkeypatch, cuda):
    monkeypatch.setattr(
        host, "memory", lambda: DeviceMemory(100 * 10**9, 60 * 10**9, "the cgroup /job (100.0 GB)")
    )
    board = Board(
        "GPU-aa",
        "NVIDIA GB10",
        (12, 1),
        errors={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED},
    )
    calls = cuda([board], [board])
    info = gpu.GPUManager().get_gpu_info()
    assert (info.name, info.total_memory_gb, info.free_memory_gb) == ("NVIDIA GB10", 100, 60)
    assert info.note == "its memory is the host's, bound by the cgroup /job (100.0 GB)"
    assert "mem_get_info" not in calls


@pytest.mark.parametrize(
    ("errors", "note"),
    [
        (
            {"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND},
            "no NVIDIA driver here",
        ),  # as under ROCm
        (
            {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NO_PERMISSION},
            "memory: the NVIDIA driver gives this user no",
        ),
        (
            {"nvmlDeviceGetHandleByIndex(0)": pynvml.NVML_ERROR_NO_PERMISSION},
            "GPU 0 of the driver's list: ",
        ),
    ],
)
def test_where_nvml_does_not_tell_cuda_is_requested(cuda, errors, note):
    board = Board("GPU-aa", used=10 * GIB)
    calls = cuda([board], [board], errors=errors)
    info = gpu.GPUManager().get_gpu_info()
    assert (info.total_memory_gb * 1e9, info.used_memory_gb * 1e9) == pytest.approx(
        (80 * GIB, 10 * GIB)
    )
    assert info.note.startswith(note)
    assert info.note.endswith("its total and free memory are CUDA's")
    assert calls == ["mem_get_info"]


def test_a_gpu_too_full_for_a_context_has_nothing_free(monkeypatch, cuda):
    board = Board("GPU-aa")
    cuda([board], [board], errors={"nvmlInit": pynvml.NVML_ERROR_NO_PERMISSION})

    def full(index: int) -> None:
        raise torch.OutOfMemoryError("CUDA error: out of memory\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    info = gpu.GPUManager().get_gpu_info()
    assert (info.free_memory_gb, info.usage_percent) == (0, 100)
    assert (
        info.note
        == "the NVIDIA driver gives this user no permission; CUDA: CUDA error: out of memory"
    )


def test_what_other_processes_use_cannot_be_had(cuda):
    board = Board(
        "GPU-aa", used=70 * 10**9, total=80 * 10**9, processes=[(999_999_999, 70 * 10**9)]
    )
    cuda([board], [board])
    assert gpu.GPUManager().can_allocate(10.0)
    assert not gpu.GPUManager().can_allocate(10.1)


def test_what_this_process_s_allocator_holds_unused_can_be_had(cuda):
    board = Board(
        "GPU-aa", used=70 * 10**9, total=80 * 10**9, processes=[(os.getpid(), 70 * 10**9)]
    )
    cuda([board], [board], reserved=69 * 10**9, allocated=40 * 10**9)
    assert gpu.GPUManager().can_allocate(39.0, device=0)
    assert not gpu.GPUManager().can_allocate(39.1, device=0)


@pytest.mark.parametrize("device", [2, -1])
def test_a_device_that_is_not_there(cuda, device):
    boards = [Board("GPU-aa"), Board("GPU-bb", "NVIDIA T4")]
    cuda(boards, boards)
    manager = gpu.GPUManager()
    for method in (
        manager.get_gpu_info,
        manager.reset_peak_memory,
        lambda d: manager.can_allocate(1.0, d),
    ):
        with pytest.raises(
            ConfigError, match=rf"GPU {device} is not there, found GPU 0 .*, GPU 1 \(NVIDIA T4\)$"
        ):
            method(device)


def test_a_gpu_beside_the_cpu_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"^GPU 1 is not there, found CPU \(torch .*\)$"):
        gpu.GPUManager().can_allocate(1.0, device=1)


def test_a_full_gpu_is_warned_of_with_who_fills_it(cuda, caplog):
    processes = [(os.getpid(), 10 * 10**9), (999_999_998, 61_200_000_000), (999_999_999, None)]
    full = Board("GPU-aa", total=80 * 10**9, used=72_960_000_000, processes=processes)
    half = Board("GPU-bb", total=80 * 10**9, used=40 * 10**9, processes=[(1, 40 * 10**9)])
    names = {999_999_998: "VLLM::EngineCore", 999_999_999: "python"}
    cuda([full, half], [half, full], names)
    with caplog.at_level(logging.WARNING):
        status = gpu.GPUManager().check_memory_threshold(threshold=0.85)
    assert status["threshold"] == 0.85
    assert [(d["device"], round(d["usage_percent"], 1)) for d in status["devices"]] == [
        (0, 50.0),
        (1, 91.2),
    ]
    (warning,) = status["warnings"]
    assert warning == {
        "device": 1,
        "usage_percent": pytest.approx(91.2),
        "used_memory_gb": pytest.approx(72.96),
        "total_memory_gb": 80,
        "processes": [
            {
                "pid": 999_999_998,
                "name": "VLLM::EngineCore",
                "used_memory_gb": 61.2,
                "is_vllm": True,
            },
            {"pid": 999_999_999, "name": "python", "used_memory_gb": None, "is_vllm": False},
        ],
    }
    (line,) = caplog.messages
    assert line == (
        "GPU 1 (NVIDIA A100-SXM4-80GB): 91.2% of the memory in use (72.96 of 80.00 GB), above the "
        "threshold 0.85; "
        "other processes: VLLM::EngineCore (pid 999999998, vLLM) 61.2 GB (76%), python (pid "
        "999999999); "
        "vLLM takes 90% of a GPU by default: start it with a lower gpu_memory_utilization, or on "
        "another GPU"
    )


def test_no_warning_below_the_threshold(cuda, caplog):
    board = Board("GPU-aa", total=100, used=85)
    cuda([board], [board])
    with caplog.at_level(logging.WARNING):
        assert gpu.GPUManager().check_memory_threshold(threshold=0.85)["warnings"] == []
    assert not caplog.records


@pytest.mark.parametrize("threshold", [0, -0.1, 85])
def test_a_threshold_that_is_no_share(threshold):
    with pytest.raises(ConfigError, match="is not a share of the memory"):
        gpu.GPUManager().check_memory_threshold(threshold)


def test_other_processes_in_words(cuda):
    processes = [(os.getpid(), GIB), (999_999_998, 61_200_000_000)]
    board = Board("GPU-aa", used=70 * 10**9, processes=processes)
    cuda([board], [board], {999_999_998: "VLLM::EngineCore"})
    assert gpu.other_processes(0) == "VLLM::EngineCore (pid 999999998, vLLM) 61.2 GB"


def test_peaks_are_reset_and_the_cache_emptied_where_requested(cuda):
    boards = [Board("GPU-aa"), Board("GPU-bb")]
    calls = cuda(boards, boards, reserved=1)
    manager = gpu.GPUManager()
    manager.reset_peak_memory()
    manager.reset_peak_memory(1)
    manager.empty_cache()
    assert calls == ["reset 0", "reset 1", "reset 1", "empty_cache"]


def test_an_empty_cache_makes_no_context(cuda):
    board = Board("GPU-aa")
    calls = cuda([board], [board])
    gpu.GPUManager().empty_cache()
    assert calls == []


@pytest.mark.gpu
def test_the_manager_agrees_with_cuda_on_a_real_gpu():
    manager = gpu.GPUManager()
    for index in range(torch.cuda.device_count()):
        info, properties = manager.get_gpu_info(index), torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        assert info.uuid.endswith(str(properties.uuid))
        assert info.compute_capability == (properties.major, properties.minor)
        assert info.total_memory_gb * 1e9 == pytest.approx(total, rel=0.01)
        assert info.free_memory_gb * 1e9 == pytest.approx(free, abs=1 << 30)


@pytest.mark.gpu
def test_an_allocation_shows_as_own_and_peak_and_its_cache_can_be_had_again():
    manager = gpu.GPUManager()
    manager.empty_cache()
    manager.reset_peak_memory(0)
    before = manager.get_gpu_info(0)
    block = torch.ones(1 << 30, dtype=torch.uint8, device="cuda:0")
    during = manager.get_gpu_info(0)
    assert during.used_memory_gb - before.used_memory_gb > 1
    assert during.own_memory_gb - before.own_memory_gb == pytest.approx(1.07, abs=0.05)
    assert during.peak_memory_gb >= 1.07
    del block
    cached = manager.get_gpu_info(0)
    assert cached.own_memory_gb > 1
    assert manager.can_allocate(cached.free_memory_gb + 1.0)
    assert not manager.can_allocate(during.total_memory_gb + 1)
    manager.empty_cache()
    assert manager.get_gpu_info(0).own_memory_gb < cached.own_memory_gb


@pytest.mark.gpu(real="the driver")
def test_a_manager_makes_no_context():
    source = """
import ctypes
from theloom.gpu import GPUManager
manager = GPUManager()
manager.get_gpu_info(0), manager.can_allocate(1.0)
manager.check_memory_threshold(), manager.reset_peak_memory()
manager.empty_cache()
cuda, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
print(active.value)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "0"
