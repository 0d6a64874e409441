"""AMD's GPUs: what their library tells, who holds them, and what users see of it."""

import os

import fake_amdsmi
import pytest
import torch
from fake_amdsmi import GIB, Board
from simulated_cuda import interface, simulated
from theloom.cli.main import main
from theloom.devices import amd, boards, gpu_lease
from theloom.devices.gpu import GPUManager
from theloom.devices.nvml import Process

FIRST, SECOND = "7f9e0cab12345678", "0123456789abcdef"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in (*amd.VISIBLE, "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_s_devices_are_in_hip_s_order(monkeypatch):
    users = [(os.getpid(), "/usr/bin/python3", 30 * GIB)]
    library = fake_amdsmi.install(
        monkeypatch,
        [
            Board(SECOND, hip_id=1, name="0x74a1"),
            Board(FIRST, hip_id=0, used=30 * GIB, busy=87, processes=users),
        ],
    )
    first, second = boards.read().devices
    assert (first.uuid, first.name, first.busy) == (f"GPU-{FIRST}", "AMD Instinct MI300X", 87)
    assert (first.total, first.used, first.free) == (192 * GIB, 30 * GIB, 162 * GIB)
    assert first.processes == (Process(os.getpid(), "python3", 30 * GIB, is_vllm=False),)
    assert (second.uuid, second.name, second.note) == (f"GPU-{SECOND}", "AMD GPU", "")
    assert library.times_open() == 0


def test_an_older_library_and_what_it_does_not_tell(monkeypatch):
    board = Board(FIRST, busy="N/A", used=50 * GIB)
    board.errors = {"amdsmi_get_gpu_process_list": fake_amdsmi.NO_PERM}
    fake_amdsmi.install(monkeypatch, [board], lacks=("amdsmi_get_gpu_enumeration_info",))
    (device,) = amd.read().devices
    assert (device.uuid, device.busy) == (f"GPU-{FIRST}", None)
    assert device.note == "processes: Permission Denied"
    board.errors["amdsmi_get_gpu_memory_usage"] = fake_amdsmi.NOT_SUPPORTED
    (device,) = amd.read().devices
    assert (device.total, device.free) == (None, None)
    assert "memory: Feature not supported" in device.note


def test_memory_that_no_listed_process_has_is_said_so(monkeypatch):
    fake_amdsmi.install(monkeypatch, [Board(FIRST, used=50 * GIB)])
    assert "53.7 GB are in use by processes that the driver does not list" in (
        amd.read().devices[0].note
    )


def test_why_nothing_can_be_requested(monkeypatch):
    assert amd.read().note == "the package amdsmi is not installed"
    code = fake_amdsmi.DRIVER_NOT_LOADED
    fake_amdsmi.install(monkeypatch, [Board(FIRST)], errors={"amdsmi_init": code})
    assert amd.read().note == "AMD's driver: Driver not loaded"
    fake_amdsmi.install(monkeypatch, [])
    assert amd.read().note == "AMD's driver: it shows no GPU"


def test_a_package_without_its_library_is_no_error(monkeypatch, tmp_path, capsys):
    package = tmp_path / "amdsmi"
    package.mkdir()
    (package / "__init__.py").write_text("print('Unable to find it')\nraise KeyError('so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert amd.read().note == "the package amdsmi cannot be imported ('so')"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [FIRST, SECOND]),
        ({"ROCR_VISIBLE_DEVICES": f"GPU-{SECOND}"}, [SECOND]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}, [SECOND]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [SECOND]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [FIRST]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_a_job_leases_one_of_those_that_it_may_see(monkeypatch, tmp_path, environment, expected):
    fake_amdsmi.install(monkeypatch, [Board(FIRST, 0), Board(SECOND, 1, used=GIB)])
    monkeypatch.setattr(gpu_lease, "_lock_folder", lambda: tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with gpu_lease.gpus(1) as held:
        assert held == tuple(f"GPU-{serial}" for serial in expected[:1])
        if expected:
            assert os.environ["ROCR_VISIBLE_DEVICES"] == held[0]
            assert "HIP_VISIBLE_DEVICES" not in os.environ
    assert {n: os.environ[n] for n in amd.VISIBLE if n in os.environ} == environment


def test_users_see_them_as_torch_numbers_them(monkeypatch, capsys):
    fake_amdsmi.install(
        monkeypatch, [Board(SECOND, 1, busy=5), Board(FIRST, 0, used=30 * GIB, busy=87)]
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    letters = [serial.encode().hex() for serial in (FIRST, SECOND)]
    monkeypatch.setattr(interface, "uuid", lambda index: letters[index])
    with simulated(devices=2):
        first, second = GPUManager().get_gpu_info()
        main(["gpus"])
    assert (first.name, first.uuid, first.compute_capability) == (
        "AMD Instinct MI300X",
        f"GPU-{FIRST}",
        None,
    )
    assert (first.used_memory_gb, first.busy_percent) == (pytest.approx(32.2, abs=0.1), 87)
    assert (second.used_memory_gb, second.busy_percent) == (0, 5)
    assert "87%" in capsys.readouterr().out
