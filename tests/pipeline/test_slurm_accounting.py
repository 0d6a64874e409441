"""What is done about Snakemake's Slurm executor where Slurm keeps no accounts, and left alone where
it does.
"""

import sys
import types
from pathlib import Path

import pytest
from theloom.pipeline import slurm


@pytest.fixture
def executor(monkeypatch):
    found = types.SimpleNamespace(is_query_tool_available=lambda tool: True)
    monkeypatch.setitem(sys.modules, "snakemake_executor_plugin_slurm", found)
    return found


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
    plugin = pytest.importorskip("snakemake_executor_plugin_slurm")
    assert plugin.is_query_tool_available("sh")


def test_without_the_executor_nothing_is_requested(monkeypatch):
    monkeypatch.delitem(sys.modules, "snakemake_executor_plugin_slurm", raising=False)
    assert not slurm.keep_to_squeue()
