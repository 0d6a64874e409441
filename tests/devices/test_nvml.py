"""NVML: what it tells, and the reason in words for each thing that it does not."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_nvml
import pynvml
import pytest
from fake_nvml import GIB, Board
from theloom.devices import nvml


def test_this_machine_is_read_without_an_error():
    machine = nvml.read()
    assert machine.devices or machine.note
    assert "\n" not in machine.note


def test_a_machine_s_devices(monkeypatch):
    boards = [
        Board("GPU-aa", reserved=GIB, used=10 * GIB, processes=[(os.getpid(), 10 * GIB)]),
        Board("GPU-bb", "NVIDIA GeForce GTX 1080", (6, 1), 8 * GIB),
    ]
    driver = fake_nvml.install(monkeypatch, boards, {os.getpid(): "/usr/bin/python3"})
    machine = nvml.read()
    first, second = machine.devices
    assert (first.uuid, first.name, first.compute_capability) == (
        "GPU-aa",
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
    )
    assert (first.total, first.used, first.free) == (79 * GIB, 10 * GIB, 69 * GIB)
    assert first.processes == (nvml.Process(os.getpid(), "python3", 10 * GIB, is_vllm=False),)
    assert (second.name, second.total, second.used, second.processes) == (
        "NVIDIA GeForce GTX 1080",
        8 * GIB,
        0,
        (),
    )
    assert first.note == second.note == machine.note == ""
    assert driver.times_open() == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver here"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "kernel module is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "different versions"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "no permission"),
        (pynvml.NVML_ERROR_OPERATING_SYSTEM, "bars the GPU"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML: Unknown Error"),
    ],
)
def test_why_nothing_can_be_requested(monkeypatch, code, words):
    fake_nvml.install(monkeypatch, [Board("GPU-aa")], errors={"nvmlInit": code})
    machine = nvml.read()
    assert machine.devices == ()
    assert words in machine.note
    assert "\n" not in machine.note


def test_pynvml_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py cannot be imported" in nvml.read().note


def test_a_driver_without_gpus(monkeypatch):
    fake_nvml.install(monkeypatch, [])
    assert nvml.read().note == "the NVIDIA driver shows no GPU"


def test_nvml_is_shut_down_whatever_fails(monkeypatch):
    driver = fake_nvml.install(
        monkeypatch, [Board("GPU-aa")], errors={"nvmlDeviceGetCount": pynvml.NVML_ERROR_UNKNOWN}
    )
    assert nvml.read().note == "NVML: Unknown Error"
    assert driver.times_open() == 0


def test_one_gpu_that_is_lost_does_not_hide_the_others(monkeypatch):
    errors = {"nvmlDeviceGetHandleByIndex(0)": pynvml.NVML_ERROR_GPU_IS_LOST}
    fake_nvml.install(monkeypatch, [Board("GPU-aa"), Board("GPU-bb")], errors=errors)
    machine = nvml.read()
    assert [d.uuid for d in machine.devices] == ["GPU-bb"]
    assert (
        machine.note
        == "GPU 0 of the driver's list: the GPU has fallen off the bus; restart the machine"
    )


def test_a_driver_that_has_the_first_version_of_the_memory_call_only(monkeypatch):
    old = {"nvmlDeviceGetMemoryInfo_v2": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
    fake_nvml.install(
        monkeypatch, [Board("GPU-aa", reserved=GIB, used=GIB, processes=[(1, GIB)], errors=old)]
    )
    (device,) = nvml.read().devices
    assert (device.total, device.free, device.note) == (80 * GIB, 78 * GIB, "")


def test_a_board_that_shares_the_host_s_memory(monkeypatch):
    shared = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}
    fake_nvml.install(monkeypatch, [Board("GPU-aa", "NVIDIA GB10", (12, 1), errors=shared)])
    (device,) = nvml.read().devices
    assert (device.total, device.free, device.used, device.unified) == (None, None, None, True)
    assert device.note == "its memory is the host's"


def test_memory_without_permission(monkeypatch):
    refused = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NO_PERMISSION}
    fake_nvml.install(monkeypatch, [Board("GPU-aa", errors=refused)])
    (device,) = nvml.read().devices
    assert (device.total, device.unified) == (None, False)
    assert device.note == "memory: the NVIDIA driver gives this user no permission"


def mig_board() -> Board:
    """A GPU of two instances and an empty slot, that may not be requested itself."""
    refused = dict.fromkeys(
        ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"),
        pynvml.NVML_ERROR_NO_PERMISSION,
    )
    lacking = {
        "nvmlDeviceGetCudaComputeCapability": pynvml.NVML_ERROR_NOT_SUPPORTED,
        "nvmlDeviceGetGraphicsRunningProcesses": pynvml.NVML_ERROR_NOT_SUPPORTED,
    }
    slots = [
        Board(
            "MIG-11",
            "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
            total=39 * GIB,
            used=GIB,
            processes=[(7, GIB)],
        ),
        None,
        Board("MIG-22", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", total=9 * GIB),
    ]
    for slot in slots:
        if slot:
            slot.errors = lacking
    return Board("GPU-aa", mig=slots, errors=refused)


def test_mig(monkeypatch):
    fake_nvml.install(monkeypatch, [mig_board(), Board("GPU-bb")])
    parent, plain = nvml.read().devices
    assert (parent.mig, plain.mig, plain.instances) == (True, False, ())
    assert parent.note == "in MIG mode: programs run on its instances"
    first, second = parent.instances
    assert (first.uuid, first.total, first.used, first.compute_capability) == (
        "MIG-11",
        39 * GIB,
        GIB,
        (8, 0),
    )
    assert (second.uuid, second.total, second.note) == ("MIG-22", 9 * GIB, "")
    assert first.processes[0].pid == 7


def test_mig_without_instances(monkeypatch):
    fake_nvml.install(monkeypatch, [Board("GPU-aa", mig=[None])])
    assert nvml.read().devices[0].note == "in MIG mode, and no instance is made"


@pytest.mark.parametrize(
    ("uuid", "visible", "found"),
    [
        ("bb", "", "GPU-bb"),  # as CUDA gives it
        ("GPU-BB", "1", "GPU-bb"),
        ("22", "MIG-22", "MIG-22"),
        ("aa", "MIG-22", "MIG-22"),  # the GPU's UUID, where an instance of it was requested
        ("aa", "MIG-2", "MIG-22"),  # CUDA takes the beginning of one
        ("aa", "0", "MIG-11"),
        ("aa", "", "MIG-11"),
        ("cc", "", None),
        ("", "", None),
    ],
)
def test_devices_are_found_by_uuid(monkeypatch, uuid, visible, found):
    fake_nvml.install(monkeypatch, [mig_board(), Board("GPU-bb")])
    device = nvml.read().find(uuid, visible)
    assert (device.uuid if device else None) == found


def test_a_container_where_no_process_is_listed(monkeypatch):
    for nothing in ([], None):
        fake_nvml.install(monkeypatch, [Board("GPU-aa", used=30 * 10**9, processes=nothing)])
        (device,) = nvml.read().devices
        assert device.processes == ()
        assert device.note.startswith(
            "30.0 GB are in use by processes that the driver does not list"
        )


def test_a_driver_that_does_not_tell_each_process_s_memory(monkeypatch):
    fake_nvml.install(
        monkeypatch, [Board("GPU-aa", used=30 * GIB, processes=[(999_999_999, None)])]
    )
    (device,) = nvml.read().devices
    assert device.processes == (nvml.Process(999_999_999, "unknown process", None, is_vllm=False),)
    assert device.note == "the driver does not tell how much memory each process has"


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND),
        pynvml.NVMLLibraryMismatchError("unversioned"),
    ],
)
def test_a_driver_too_old_to_list_processes(monkeypatch, error):
    fake_nvml.install(
        monkeypatch, [Board("GPU-aa")], errors={"nvmlDeviceGetComputeRunningProcesses": error}
    )
    (device,) = nvml.read().devices
    assert (device.processes, device.note) == (
        (),
        "processes: the NVIDIA driver is too old to tell",
    )


def test_processes_that_compute_and_draw_are_counted_once_the_largest_first(monkeypatch):
    board = Board(
        "GPU-aa",
        used=4 * GIB,
        processes=[(1, GIB), (2, 2 * GIB)],
        graphics=[(1, GIB), (3, GIB // 2)],
    )
    fake_nvml.install(
        monkeypatch, [board], {1: "/usr/bin/blender", 2: "python", 3: "/usr/lib/xorg/Xorg"}
    )
    (device,) = nvml.read().devices
    assert [(p.name, p.used) for p in device.processes] == [
        ("python", 2 * GIB),
        ("blender", GIB),
        ("Xorg", GIB // 2),
    ]


def test_a_process_without_a_name_of_the_driver_s_has_the_system_s(monkeypatch):
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    for errors in ({}, {"nvmlSystemGetProcessName": undecodable}):
        board = Board("GPU-aa", used=GIB, processes=[(os.getpid(), GIB)])
        fake_nvml.install(monkeypatch, [board], errors=errors)
        assert "py" in nvml.read().devices[0].processes[0].name


@pytest.fixture
def server(tmp_path: Path) -> Iterator[list[int]]:
    """Real processes that are started as vLLM is: the server itself, and a worker that it starts
    under no name.
    """
    package = tmp_path / "vllm/entrypoints/openai"
    package.mkdir(parents=True)
    worker = "import time; time.sleep(60)"
    (package / "api_server.py").write_text(
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {worker!r}])\n"
        "print(worker.pid, flush=True)\n"
        "sys.stdin.read()\n"
        "worker.kill()\n"
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "x"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "."},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield [process.pid, int(process.stdout.readline())]
        process.stdin.close()
        process.wait(10)


def test_vllm_is_known_by_its_command_and_its_workers_by_their_parent(monkeypatch, server):
    fake_nvml.install(
        monkeypatch, [Board("GPU-aa", used=GIB, processes=[(pid, GIB) for pid in server])]
    )
    assert [p.is_vllm for p in nvml.read().devices[0].processes] == [True, True]


def test_vllm_is_known_by_the_title_that_it_gives_itself(monkeypatch):
    board = Board("GPU-aa", used=GIB, processes=[(999_999_999, GIB)])
    fake_nvml.install(monkeypatch, [board], {999_999_999: "VLLM::EngineCore"})
    (process,) = nvml.read().devices[0].processes
    assert (process.name, process.is_vllm) == ("VLLM::EngineCore", True)


@pytest.mark.parametrize(
    ("command", "vllm"),
    [
        (["/venv/bin/python", "/venv/bin/vllm", "serve", "x"], True),
        (["/venv/bin/vllm", "serve", "x"], True),
        (["python", "-m", "vllm.entrypoints.openai.api_server"], True),
        (["VLLM::Worker_TP0"], True),
        (["python", "train.py", "--output", "vllm"], False),
        (["python", "/home/me/vllm/train.py"], False),
        (["python", "-m"], False),
        ([], False),
    ],
)
def test_commands_of_vllm(command, vllm):
    assert nvml._starts_vllm(command) == vllm


@pytest.mark.gpu(real="the driver")
def test_the_real_driver_is_requested_in_milliseconds_and_agrees_with_nvidia_smi():
    start = time.perf_counter()
    machine = nvml.read()
    assert time.perf_counter() - start < 2
    fields = "uuid,name,memory.total,memory.reserved,memory.free,compute_cap"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    assert [d.uuid for d in machine.devices] == [row[0] for row in rows]
    for device, (_, name, total, reserved, free, capability) in zip(
        machine.devices, rows, strict=True
    ):
        assert device.name == name
        assert ".".join(str(part) for part in device.compute_capability) == capability
        if not device.mig and total.isdigit():
            assert device.total == pytest.approx((int(total) - int(reserved)) << 20, abs=2 << 20)
            assert device.free == pytest.approx(int(free) << 20, abs=256 << 20)
