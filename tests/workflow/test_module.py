"""TheLoom as a module of another workflow: the docs' example, and what a module must not do."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import preloading
import pytest
import theloom
import torch
import yaml
from support import ROOT

EXAMPLE = ROOT / "workflow/docs/examples/module"


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """The example's folder, elsewhere."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "outer"))


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder,
        env=preloading.environment(),
        capture_output=True,
        text=True,
        timeout=1800,
    )


def dry_run(folder: Path, *arguments: str) -> str:
    done = snakemake(folder, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_example_runs_and_its_rule_reads_the_run(outer, tiny_llama):
    overrides = (
        f"name=first-run model.source={tiny_llama} extraction.device=cpu extraction.shards=1 "
        "corpus.max_tokens=600 memory.streaming_chunk_size=64"
    )
    config = {"theloom": {"profiles": "custom", "set": overrides}}
    (outer / "config.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(outer)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "localrules directive specifies" not in printed
    acts = theloom.open(outer / "theloom/results/first-run/activations.h5")
    (hook,) = acts.hooks
    expected = acts[hook][:].float().mean(dim=0)
    assert (np.load(outer / "means/first-run.npz")[hook] == expected.numpy()).all()
    assert len(acts) == 600
    frozen = outer / "theloom/results/first-run/config"
    assert {"resources.json", "extract.json"} <= {file.name for file in frozen.iterdir()}
    assert not (outer / "results").exists()
    assert "Nothing to be done" in dry_run(outer)

    # On a cluster a job parses the Snakefile again, and reads what onstart froze.
    (outer / "config.yaml").write_text("theloom: {profiles: no-such-profile}")
    target = "theloom/results/first-run/shards/00000-of-00001.h5"
    job = ["--mode", "remote", "--force", "--target-jobs"]
    name = "loom_extract_shard:run=first-run,shard=00000,shards=00001"
    done = snakemake(outer, target, *job, name, "--allowed-rules", "loom_extract_shard")
    assert "no-such-profile" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_module_keeps_the_outer_workflow_s_target_and_console(outer):
    printed = dry_run(outer)
    assert "loom_extract_shard" in printed
    assert "mean_state" in printed
    assert "loom_all" not in printed
    assert "Building DAG of jobs" in printed  # which TheLoom's own console leaves out


def test_a_module_without_a_prefix_takes_the_outer_config(outer):
    text = (outer / "Snakefile").read_text().replace('config["theloom"]', "config")
    text = text.replace('    prefix:\n        "theloom"\n', "").replace(
        "theloom/results", "results"
    )
    assert "prefix" not in text
    (outer / "Snakefile").write_text(text)
    (outer / "config.yaml").write_text("profiles: smollm2-135m\nset: name=first-run\nmine: 3\n")
    printed = dry_run(outer)
    assert "input: results/first-run/activations.h5, results/first-run/verification.h5" in printed


def test_a_mistake_in_a_module_s_config_is_one_line(outer):
    (outer / "config.yaml").write_text("theloom: {profiles: 7c}")
    done = snakemake(outer, "--dry-run")
    assert done.returncode != 0
    assert "error: unknown profile '7c'; choose from 13b, " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_s_job_extracts_several_shards(outer, tiny_llama):
    overrides = (
        f"name=first-run model.source={tiny_llama} extraction.device=cpu extraction.shards=3 "
        "resources.shards_per_job=2 corpus.max_tokens=900 memory.streaming_chunk_size=64"
    )
    config = {"theloom": {"profiles": "custom", "set": overrides}}
    (outer / "config.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(outer)
    assert done.returncode == 0, done.stdout + done.stderr
    run = outer / "theloom/results/first-run"
    logs = {file.name for file in (run / "logs/extract_shard").iterdir()}
    assert logs == {"00000-to-00001-of-00003.log", "00002-to-00002-of-00003.log"}
    assert "Nothing to be done" in dry_run(outer)
    acts = theloom.open(run / "activations.h5")
    assert len(acts) == 900
    before = {hook: acts[hook][:] for hook in acts.hooks}

    # a job on a cluster, which does not read the module's config
    (outer / "config.yaml").write_text("theloom: {profiles: no-such-profile}")
    shards = [f"theloom/results/first-run/shards/{n:05d}-of-00003.h5" for n in (0, 1)]
    written = [(outer / shard).stat().st_ino for shard in shards]
    rule = "loom_extract_shards_0_to_1_of_3"
    job = ["--mode", "remote", "--force", "--target-jobs", f"{rule}:run=first-run"]
    done = snakemake(outer, *shards, *job, "--allowed-rules", rule)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not {(outer / shard).stat().st_ino for shard in shards} & {*written}
    again = theloom.open(run / "activations.h5")
    for hook, rows in before.items():
        assert torch.equal(again[hook][:], rows)
