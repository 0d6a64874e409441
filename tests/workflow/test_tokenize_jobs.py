"""Snakemake shares a corpus among jobs, runs them again after a kill, and gathers their tokens."""

import json
import os
import shutil
import signal
import subprocess
import time

import h5py
from theloom.config.frozen import load_frozen
from theloom.corpus.tokens import tokenize


def test_killed_jobs_of_parts_run_again(project, tiny_profile, tmp_path):
    tiny_profile(project)
    rows = [{"text": f"é{n} " * (n % 30), "label": n % 3} for n in range(300)]
    corpus = tmp_path / "x.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    overrides = (
        f"corpus=text corpus.path={corpus} corpus.columns=[label] corpus.max_tokens=5000 "
        "name=shared resources.tokenize_jobs=3"
    )
    requested = {"profiles": "tiny", "overrides": overrides}
    results = project.results("shared")
    kill_a_part(project, results, requested)
    done = project.snakemake("--until", "tokenize_corpus", **requested)
    assert done.returncode == 0, done.stdout + done.stderr
    tokenize(load_frozen(results / "config/tokens.json"), tmp_path / "tokens.h5")
    with h5py.File(tmp_path / "tokens.h5") as right, h5py.File(results / "tokens.h5") as found:
        names: list[str] = []
        right.visit(names.append)
        datasets = [name for name in names if isinstance(right[name], h5py.Dataset)]
        assert len(datasets) > 10
        for name in datasets:
            assert found[name][()].tobytes() == right[name][()].tobytes(), name
        assert found.attrs["tokenize_jobs"] == 3
        assert found.attrs["config"] == right.attrs["config"]
    assert not list(results.glob("tokens/*"))
    assert len(list(results.glob("logs/tokenize_part/*-of-00003.log"))) == 3


def kill_a_part(project, results, requested):
    """Run until a part has begun, and kill the pipeline with its jobs."""
    command = project.command("--until", "tokenize_corpus", **requested)
    running = subprocess.Popen(command, cwd=project.folder, start_new_session=True)
    while not list(results.glob("logs/tokenize_part/*.log")) and running.poll() is None:
        time.sleep(0.01)
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (results / "tokens.h5").exists()
    shutil.rmtree(project.folder / ".snakemake/locks")
