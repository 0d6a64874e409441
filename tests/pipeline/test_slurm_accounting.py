"""Slurm without accounting, and a controller that is away when a job calls srun."""

import sys
import types
from pathlib import Path

import pytest
from theloom.pipeline import slurm


@pytest.fixture
def executor(monkeypatch):
    module = types.SimpleNamespace(is_query_tool_available=lambda tool: True)
    monkeypatch.setitem(sys.modules, "snakemake_executor_plugin_slurm", module)
    return module


def sacct(folder: Path, monkeypatch, script: str) -> None:
    (folder / "sacct").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_without_accounts_squeue_alone_is_requested(executor, tmp_path, monkeypatch):
    sacct(tmp_path, monkeypatch, "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm.keep_to_squeue()
    assert not executor.is_query_tool_available("sacct")
    assert executor.is_query_tool_available("squeue")


def test_an_sacct_that_does_not_answer_counts_as_none(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "_PATIENCE", 0.2)
    sacct(tmp_path, monkeypatch, "exec sleep 20")
    assert slurm.keep_to_squeue()


def test_with_accounts_nothing_is_changed(executor, tmp_path, monkeypatch):
    sacct(tmp_path, monkeypatch, "exit 0")
    assert not slurm.keep_to_squeue()
    assert executor.is_query_tool_available("sacct")


def test_the_executor_has_the_function_that_is_replaced():
    import snakemake_executor_plugin_slurm as plugin

    assert plugin.is_query_tool_available("sh")


def test_without_the_executor_nothing_is_requested(monkeypatch):
    monkeypatch.delitem(sys.modules, "snakemake_executor_plugin_slurm", raising=False)
    assert not slurm.keep_to_squeue()


def scontrol(folder: Path, monkeypatch, pings_until_up: int) -> Path:
    """A controller that is away for the first pings; returns the file that counts them."""
    count = folder / "pings"
    count.touch()
    (folder / "scontrol").write_text(
        f"#!/bin/sh\necho >> {count}\n"
        f"if [ $(wc -l < {count}) -lt {pings_until_up} ]; then state=DOWN; else state=UP; fi\n"
        'echo "Slurmctld(primary) at node is $state"\n'
    )
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_PINGS", 0.01)
    return count


def test_a_step_waits_until_the_controller_answers(tmp_path, monkeypatch):
    class Executor:
        def run_job(self, job):
            ran.append(job)

    ran: list[str] = []
    module = types.SimpleNamespace(Executor=Executor)
    monkeypatch.setitem(sys.modules, "snakemake_executor_plugin_slurm_jobstep", module)
    count = scontrol(tmp_path, monkeypatch, pings_until_up=4)
    assert slurm.wait_before_steps()
    Executor().run_job("job")
    assert ran == ["job"]
    assert len(count.read_text().splitlines()) == 4


def test_waiting_for_a_controller_ends(tmp_path, monkeypatch):
    scontrol(tmp_path, monkeypatch, pings_until_up=10**6)
    assert not slurm.wait_for_controller(0.1)


def test_outside_of_slurm_s_jobs_no_step_waits(monkeypatch):
    monkeypatch.delitem(sys.modules, "snakemake_executor_plugin_slurm_jobstep", raising=False)
    assert not slurm.wait_before_steps()


def test_the_step_s_executor_has_the_method_that_is_replaced():
    import snakemake_executor_plugin_slurm_jobstep as plugin

    assert callable(plugin.Executor.run_job)
