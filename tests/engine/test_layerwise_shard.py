"""Whole runs layer by layer: the data of resident runs, kills included, and what is said where
nothing fits.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest
import theloom
import torch
from layerwise_support import KEPT_EVERY, extract_with_small_commits
from support import ROOT, build_tiny, forked, stages
from theloom.devices import host
from theloom.devices.host import DeviceMemory
from theloom.engine.layerwise import runner
from theloom.errors import MemoryPlanError, ModelError, StoppedError
from theloom.store import commit_log, file_format
from transformers.models.llama.modeling_llama import LlamaMLP

SMALL = "corpus.max_tokens=3000 corpus.context_length=200 extraction.shards=2"


def figures_of(file):
    with h5py.File(file) as opened:
        return dict(zip(file_format.METRICS, opened["metrics"][:].tolist(), strict=True))


def data_of(run):
    acts = theloom.open(run.activations)
    stored = {hook: [r.numpy(...).tobytes() for r in acts[hook].on_disk] for hook in acts.hooks}
    return stored | {"hash": acts.window_hash.tobytes()}


@pytest.fixture(scope="module")
def resident(tmp_path_factory, quick_llama):
    requested = f"{SMALL} extraction.execution=resident"
    return stages(tmp_path_factory.mktemp("resident"), quick_llama, requested).all()


@pytest.fixture(scope="module")
def blockwise(tmp_path_factory, quick_llama):
    requested = f"{SMALL} extraction.execution=layerwise"
    return stages(tmp_path_factory.mktemp("layerwise"), quick_llama, requested).all()


def test_the_finished_data_are_those_of_a_resident_run(resident, blockwise):
    assert data_of(blockwise) == data_of(resident)
    for run, execution in ((blockwise, "layerwise"), (resident, "resident")):
        assert execution in theloom.open(run.activations).attributes["execution"]


def test_a_layerwise_run_is_verified(blockwise):
    blockwise.verify()


def test_figures_of_the_sweep_are_stored_and_nothing_else_is_left(blockwise):
    for file in blockwise.shards:
        metrics = figures_of(file)
        assert metrics["tokens_forwarded"] >= metrics["tokens"] >= 260
        assert 0 < metrics["seconds_waiting_for_weights"] < metrics["seconds_total"]
        assert metrics["bytes_of_weights"] > 10**5
    assert {f.suffix for f in (blockwise.folder / "shards").iterdir()} == {".h5"}


def test_auto_is_resident_where_it_fits_and_layer_by_layer_where_not(
    tmp_path, quick_llama, monkeypatch, caplog
):
    run = stages(tmp_path / "fits", quick_llama, SMALL)
    run.prepare()
    with h5py.File(run.folder / "model.h5") as file:
        assert file.attrs["execution"] == "resident"
    monkeypatch.setattr(
        host, "memory", lambda: DeviceMemory(30_000_000, 30_000_000, "a small cgroup")
    )
    run = stages(tmp_path / "too-large", quick_llama, f"{SMALL} memory.memory_warning_threshold=1")
    with pytest.raises(
        MemoryPlanError, match=r"a small cgroup.*and layer by layer the run needs at least"
    ):
        run.prepare()
    monkeypatch.setattr(
        host, "memory", lambda: DeviceMemory(55_000_000, 55_000_000, "a small cgroup")
    )
    run.prepare()
    assert "it goes layer by layer" in caplog.text
    # what a process takes beside the tensors differs from one moment to the next
    monkeypatch.undo()
    run.extract()
    run.merge()
    run.verify()
    monkeypatch.setattr(
        host, "memory", lambda: DeviceMemory(55_000_000, 55_000_000, "a small cgroup")
    )
    run = stages(tmp_path / "resident", quick_llama, f"{SMALL} extraction.execution=resident")
    with pytest.raises(
        MemoryPlanError, match=r"cpu has 55\.0 MB of 55\.0 MB free, limited by a small cgroup"
    ):
        run.prepare()


def rows_of(run):
    acts = theloom.open(run.activations)
    return {hook: acts[hook][:] for hook in acts.hooks}


def test_where_memory_runs_out_the_job_goes_on_with_fewer_windows_at_once(
    tmp_path, resident, quick_llama, monkeypatch, caplog
):
    requested = f"{SMALL} extraction.execution=layerwise extraction.batch_tokens=800"
    run = stages(tmp_path / "run", quick_llama, requested)
    run.prepare()
    run.extract(0)  # of one window a batch
    real, left = runner.LayerwiseRunner._through_block, [3]

    def through_block(self, block, number, ids, *others):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 1 byte"
            )
        return real(self, block, number, ids, *others)

    monkeypatch.setattr(runner.LayerwiseRunner, "_through_block", through_block)
    run.extract(1)
    run.merge()
    assert "resuming from the last committed row with batches of" in caplog.text
    assert theloom.open(run.activations).metrics["oom_level"] == 1
    for hook, rows in rows_of(resident).items():
        torch.testing.assert_close(rows_of(run)[hook], rows, rtol=1e-4, atol=1e-5)


def test_a_sweep_requested_to_stop_ends_after_its_batch_and_is_resumed(
    tmp_path, resident, quick_llama, monkeypatch
):
    run = stages(tmp_path / "run", quick_llama, f"{SMALL} extraction.execution=layerwise")
    run.prepare()
    real, left = runner.LayerwiseRunner._through_block, [3]

    def through_block(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(runner.LayerwiseRunner, "_through_block", through_block)
    with pytest.raises(
        StoppedError, match=r"stopped by SIGTERM in block \d of \d; run again to resume"
    ):
        run.extract()
    (partial,) = run.folder.glob("shards/*.partial")
    with h5py.File(partial) as file:
        assert commit_log.committed(file["commit_log"][:]) > 0
    run.extract()
    run.merge()
    assert data_of(run) == data_of(resident)


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory, quick_llama):
    folder = build_tiny(
        "llama", tmp_path_factory.mktemp("deep"), vocab_size=49152, num_hidden_layers=BLOCKS
    )
    for file in quick_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


BLOCKS = 10


def reached(partial):
    """Units that are committed, and blocks whose residuals a checkpoint keeps."""
    try:
        with h5py.File(partial) as file:
            done = commit_log.committed(file["commit_log"][:])
            batches = len(file["commit_log"]) // BLOCKS
    except (OSError, KeyError):
        return 0, 0, 1
    manifest = partial.with_name(partial.name.replace(".partial", ".residuals.json"))
    blocks = json.loads(manifest.read_text())["blocks"] if manifest.exists() else 0
    return done, blocks, batches


def far_enough(partial, units):
    """Whether so many units are committed, or all but a few."""
    done, _, batches = reached(partial)
    return 0 < min(units, BLOCKS * batches - 3) <= done


@pytest.mark.parametrize(("spilled", "stored_as"), [(False, "fp8_e4m3"), (True, "auto")])
def test_killed_jobs_end_with_the_same_data_and_repeat_few_blocks(
    tmp_path, deep_llama, spilled, stored_as
):
    """`THELOOM_KILLS=50` kills as often; by default a few times."""
    kills = int(os.environ.get("THELOOM_KILLS", "2" if spilled else "3"))
    points = "memory.activation_cache_filter=[blocks.*.hook_resid_post]"
    points += f" store.dtype={stored_as}"
    requested = f"corpus.max_tokens=2500 corpus.context_length=200 extraction.shards=1 {points}"
    whole = stages(
        tmp_path / "whole", deep_llama, f"{requested} extraction.execution=resident"
    ).all()
    run = stages(tmp_path / "killed", deep_llama, f"{requested} extraction.execution=layerwise")
    run.prepare()
    partial = run.folder / "shards/00000-of-00001.h5.partial"
    choose, states, killed = random.Random(3), [(0, 0)], 0
    while not run.shards:
        job = forked(extract_with_small_commits, run.folder, spilled)
        if killed == kills:
            job.join()
            assert job.exitcode == 0
            break
        if killed % 5 < 4:  # once it has got some way; else at any moment
            further = states[-1][0] + choose.randint(1, max(2, 200 // kills))
            while job.is_alive() and not far_enough(partial, further):
                time.sleep(0.01)
            job.join(choose.uniform(0, 0.02))
        else:
            job.join(choose.uniform(0, 3))
        killed += job.is_alive()
        job.kill()
        job.join()
        if not run.shards:
            done, blocks, batches = reached(partial)
            assert done >= states[-1][0]
            if done < BLOCKS * batches:  # else all rows are there, and residuals are needed no more
                assert blocks >= states[-1][1]  # nothing that was kept is lost
                assert done // batches - blocks <= KEPT_EVERY  # blocks to repeat
            states.append((done, blocks))
    print(f"{killed} kills, states: {states}")
    assert max(blocks for _, blocks in states) > 0
    assert not list((run.folder / "shards").glob("*residuals*"))
    run.merge()
    assert data_of(run) == data_of(whole)


def test_a_job_takes_no_more_than_load_model_and_the_plan_foretell(tmp_path, smollm2_part):
    """Each stage in a process of its own, as in the pipeline."""
    requested = (
        "extraction.execution=layerwise extraction.shards=1 extraction.batch_tokens=2048 "
        "corpus.max_tokens=2600 "
    )
    requested += "corpus.context_length=256 memory.streaming_chunk_size=256 "
    run = stages(
        tmp_path,
        smollm2_part.folder,
        requested + "memory.activation_cache_filter=[blocks.5.hook_resid_post]",
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    host.reuse_freed_blocks(environment)
    for stage in ("prepare", "extract"):
        body = f"import pathlib, support; support.Stages(pathlib.Path({str(tmp_path)!r})).{stage}()"
        subprocess.run([sys.executable, "-c", body], env=environment, check=True)
    metrics = figures_of(run.folder / "shards/00000-of-00001.h5")
    ratio = metrics["peak_memory"] / metrics["predicted_memory"]
    assert 0.6 < ratio < 1.03


def test_rows_that_depend_on_the_batch_stop_the_job(tmp_path, quick_llama, monkeypatch, caplog):
    """As of a model of which nothing was known that makes its rows depend on other documents."""
    forward = LlamaMLP.forward
    requested = "corpus.max_tokens=1500 corpus.context_length=60 extraction.shards=1"
    run = stages(tmp_path, quick_llama, f"{requested} extraction.execution=layerwise")
    run.prepare()
    with caplog.at_level("INFO"):
        run.extract()
    assert "recomputed alone: " in caplog.text
    run.shards[0].unlink()
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * (1 + (len(x) > 2)))
    for _ in range(2):  # a job that is started once more does not pass over it
        with pytest.raises(ModelError, match="depend on what runs beside"):
            run.extract()
        assert not list(run.folder.rglob("*.partial"))
        assert not list(run.folder.rglob("*.residuals*"))
