"""The GPU lease: concurrent jobs hold distinct GPUs, whatever becomes of them. Real processes,
pretend GPUs.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_nvml
import pytest
from fake_nvml import Board
from theloom.devices import gpu_lease
from theloom.devices.gpu_lease import Candidate
from theloom.errors import ConfigError

TWO = ["GPU-0", "GPU-1"]
BATCH = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


@pytest.fixture(autouse=True)
def outside_of_a_scheduler(monkeypatch):
    for name in (*BATCH, "SGE_TASK_ID", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


def found(*uuids: str, free: int | None = None) -> list[Candidate]:
    return [Candidate(uuid, free) for uuid in uuids]


def shard(folder: Path, trials: int, seed: int) -> None:
    """A job that leases again and again, and writes to its GPU's diary while it has it."""
    rng = random.Random(seed)
    for trial in range(trials):
        with gpu_lease.leased(lambda: found(*TWO), 1, folder=folder, pause=0.002) as (uuid,):
            diary = os.open(folder / f"{uuid}.diary", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.write(diary, f"begin {seed}-{trial}\n".encode())
            for _ in range(rng.randrange(20)):
                os.write(diary, f"use {seed}-{trial}\n".encode())
                time.sleep(0.0002)
            os.write(diary, f"end {seed}-{trial}\n".encode())
            os.close(diary)


def assert_one_holder_at_a_time(diary: str) -> int:
    """Nobody writes after the next one has started: the dead do not write. Returns the number of
    leases.
    """
    holder, leases = "", 0
    for line in diary.splitlines():
        word, who = line.split()
        if word == "begin":
            holder, leases = who, leases + 1
        assert who == holder, f"{who} used the GPU while {holder} held it"
    return leases


def test_jobs_never_hold_the_same_gpu_in_200_trials_with_random_kills(tmp_path):
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    jobs: list = []
    killed = started = leases = 0
    diaries = [tmp_path / f"{uuid}.diary" for uuid in TWO]
    end = time.monotonic() + 900
    while (leases < 200 or killed < 20) and time.monotonic() < end:
        while len(jobs) < 3:  # one more than there are GPUs
            started += 1
            jobs.append(context.Process(target=shard, args=(tmp_path, 1000, started)))
            jobs[-1].start()
        time.sleep(rng.random() * 0.05)
        victim = rng.choice(jobs)
        os.kill(victim.pid, signal.SIGKILL)
        killed += 1
        victim.join()
        jobs.remove(victim)
        leases = sum(diary.read_text().count("begin") for diary in diaries if diary.exists())
    for job in jobs:
        job.kill()
        job.join()
    counts = [assert_one_holder_at_a_time(diary.read_text()) for diary in diaries]
    assert sum(counts) >= 200
    assert min(counts) > 0
    assert killed >= 20


def test_a_lease_of_several_takes_all_or_none(tmp_path):
    three = found("GPU-0", "GPU-1", "GPU-2")
    with gpu_lease.leased(lambda: three, 2, folder=tmp_path) as held:
        assert len(set(held)) == 2
        locks, busy = gpu_lease._attempt(three, 2, 0, tmp_path)
        assert locks == {}
        assert sorted(busy) == sorted(held)
        with gpu_lease.leased(lambda: three, 1, folder=tmp_path) as (other,):
            assert other not in held


def test_a_waiting_job_says_who_holds_the_gpu_and_gets_it_when_the_holder_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from theloom.devices import gpu_lease\n"
        "with gpu_lease.leased(lambda: [gpu_lease.Candidate('GPU-0')], 1, "
        "folder=Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []

    def look() -> list[Candidate]:
        if said:
            holder.kill()
        return found("GPU-0")

    gpu_lease.log.addFilter(lambda record: said.append(record.getMessage()) or True)
    gpu_lease.log.setLevel("INFO")
    with gpu_lease.leased(look, 1, folder=tmp_path, pause=0.01) as held:
        assert held == ("GPU-0",)
    holder.wait()
    gpu_lease.log.filters.clear()
    assert said[0] == f"waiting for 1 of 1 GPUs; they are held by pid {holder.pid} (GPU-0)"


def test_more_gpus_than_there_are_is_an_error_at_once(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"resources.gpu: 3 GPUs are requested, and 2 are here"),
        gpu_lease.leased(lambda: found(*TWO), 3, folder=tmp_path),
    ):
        pass


def test_a_gpu_that_a_stranger_fills_is_passed_over(tmp_path, caplog):
    machine = [
        Candidate("GPU-0", 4 * 10**9, "VLLM::Worker (pid 7, vLLM)"),
        Candidate("GPU-1", 70 * 10**9),
    ]
    with gpu_lease.leased(lambda: machine, 1, 15 * 10**9, tmp_path) as held:
        assert held == ("GPU-1",)
    with gpu_lease.leased(
        lambda: machine[:1], 1, 15 * 10**9, tmp_path
    ) as held:  # the plan says what would make it fit
        assert held == ("GPU-0",)
    assert (
        "has 4.00 GB free, less than the 15.00 GB that the job needs; others on it: VLLM::Worker"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aaa1", "GPU-bbb2", "GPU-ccc3"]),
        ("2,0", ["GPU-ccc3", "GPU-aaa1"]),
        ("GPU-bb", ["GPU-bbb2"]),
        ("0,-1,2", ["GPU-aaa1"]),
        ("0,7,1", ["GPU-aaa1"]),
        ("", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(monkeypatch, visible, expected):
    fake_nvml.install(monkeypatch, [Board("GPU-aaa1"), Board("GPU-bbb2"), Board("GPU-ccc3")])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [c.uuid for c in gpu_lease.visible(gpu_lease._candidates())] == expected


def test_a_job_sees_its_gpus_alone_by_uuid(monkeypatch, tmp_path):
    fake_nvml.install(
        monkeypatch, [Board("GPU-aaa1"), Board("GPU-bbb2", used=70 << 30), Board("GPU-ccc3")]
    )
    monkeypatch.setattr(gpu_lease, "_lock_folder", lambda: tmp_path)
    with gpu_lease.gpus(2, 20 << 30) as held:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(held) == "GPU-aaa1,GPU-ccc3"
        assert gpu_lease.held() == held
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert gpu_lease.held() == ()


def test_the_gpu_that_the_config_names_keeps_its_number(monkeypatch, tmp_path):
    fake_nvml.install(monkeypatch, [Board("GPU-aaa1"), Board("GPU-bbb2")])
    monkeypatch.setattr(gpu_lease, "_lock_folder", lambda: tmp_path)
    with gpu_lease.gpus(1, device="cuda:1") as held:
        assert held == ("GPU-bbb2",)
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_mig_instances_are_leased_in_place_of_their_gpu(monkeypatch, tmp_path):
    halves = [Board("MIG-one", total=40 << 30), None, Board("MIG-two", total=40 << 30)]
    fake_nvml.install(monkeypatch, [Board("GPU-aaa1", mig=halves)])
    one, two = (gpu_lease.leased(gpu_lease._candidates, 1, folder=tmp_path) for _ in range(2))
    with one as first, two as second:
        assert {*first, *second} == {"MIG-one", "MIG-two"}


@pytest.mark.parametrize("scheduler", BATCH)
def test_what_a_scheduler_assigned_is_taken_as_it_is(monkeypatch, scheduler):
    monkeypatch.setenv(scheduler, "17")
    if scheduler == "JOB_ID":
        monkeypatch.setenv("SGE_TASK_ID", "undefined")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with gpu_lease.gpus(1, 10**12) as held:
        assert held == ("3",)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_what_a_scheduler_assigned_is_let_go_by_a_job_that_fails(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(MemoryError, match="0, 1"), gpu_lease.gpus(2):
        raise MemoryError(", ".join(gpu_lease.held()))
    assert gpu_lease.held() == ()


def test_job_id_alone_is_no_scheduler(monkeypatch, tmp_path):
    fake_nvml.install(monkeypatch, [Board("GPU-aaa1"), Board("GPU-bbb2")])
    monkeypatch.setattr(gpu_lease, "_lock_folder", lambda: tmp_path)
    monkeypatch.setenv("JOB_ID", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbb2")
    with gpu_lease.gpus(1) as held:
        assert held == ("GPU-bbb2",)
        assert (tmp_path / "GPU-bbb2.lock").exists()


def test_two_mig_instances_for_one_job_are_refused(monkeypatch, tmp_path):
    halves = [Board("MIG-one", total=40 << 30), Board("MIG-two", total=40 << 30)]
    monkeypatch.setattr(gpu_lease, "_lock_folder", lambda: tmp_path)
    fake_nvml.install(monkeypatch, [Board("GPU-aaa1", mig=halves), Board("GPU-bbb2")])
    refused = pytest.raises(ConfigError, match="MIG instances, of which a process can use one")
    with refused, gpu_lease.gpus(2):
        pass
    fake_nvml.install(monkeypatch, [Board("GPU-a", mig=halves), Board("GPU-b"), Board("GPU-c")])
    with gpu_lease.gpus(2) as held:
        assert sorted(held) == ["GPU-b", "GPU-c"]


def test_a_number_in_the_config_is_cuda_s_and_not_the_driver_s(monkeypatch, tmp_path):
    boards = [Board("GPU-slow", name="NVIDIA T4"), Board("GPU-fast", name="NVIDIA H100")]
    fake_nvml.install(monkeypatch, boards)
    monkeypatch.setattr(gpu_lease, "_lock_folder", lambda: tmp_path)
    fastest_first = subprocess.CompletedProcess([], 0, stdout="GPU-fast\nGPU-slow\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: fastest_first)
    with gpu_lease.gpus(1, device="cuda:0") as held:
        assert held == ("GPU-fast",)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with gpu_lease.gpus(1, device="cuda:0") as held:
        assert held == ("GPU-slow",)


def test_a_machine_without_gpus_and_a_job_without_need_lease_nothing(monkeypatch):
    fake_nvml.install(monkeypatch, [])
    with gpu_lease.gpus(1) as held:
        assert held == ()
    with gpu_lease.gpus(0) as held:
        assert held == ()
