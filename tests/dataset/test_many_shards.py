"""Many small shards as one dataset: what merging and reading them takes, and that every row is
right.

`THELOOM_MANY_SHARDS=10000 pytest -s tests/dataset/test_many_shards.py` prints the figures of
workflow/docs/clusters.md.
"""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import theloom
import torch
from shards import spec
from theloom.dataset import maps
from theloom.dataset.merge import merge_shards
from theloom.hooks.points import residual_points
from theloom.store import checksums, compression, index
from theloom.store.writer import ShardWriter

SHARDS = int(os.environ.get("THELOOM_MANY_SHARDS", "300"))
ROWS = 4
(HOOK, *_) = (point.name for point in residual_points(1, 8))


def value(row: int) -> torch.Tensor:
    return torch.full((8,), float(row))


def write_shard(path: Path, number: int, compression: str) -> None:
    """A shard by the writer itself."""
    first = number * ROWS
    one = spec(fingerprint=f"run-{number}", lengths=[ROWS], compression=compression)
    one = dataclasses.replace(one, tokens=dataclasses.replace(one.tokens, first_row=first))
    one.attributes.update(
        shard=number, first_row=first, batch_tokens=ROWS, chunk_size=ROWS, run_fingerprint="run"
    )
    with ShardWriter(path, one) as writer:
        for point in one.points:
            writer.write(0, point.name, 0, torch.stack([value(first + row) for row in range(ROWS)]))
        writer.batch_done(ROWS, last=True)
        writer.finish()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Copies of one shard with other rows: the syncs of a writer would take most of the time."""
    folder = tmp_path_factory.mktemp("many")
    found = [folder / f"{number:05d}-of-{SHARDS:05d}.h5" for number in range(SHARDS)]
    write_shard(found[0], 0, "none")
    for number, path in enumerate(found[1:], start=1):
        shutil.copyfile(found[0], path)
        with h5py.File(path, "r+") as file:
            for name, new in {
                "shard": number,
                "first_row": number * ROWS,
                "shard_fingerprint": f"run-{number}",
            }.items():
                file.attrs[name] = new
            file[f"hooks/{HOOK}/activations"][:] += number * ROWS
            index.write_index(file)
        checksums.write_checksums(path, checksums.METADATA, checksums.TABLES, checksums.RESULTS)
    return found


@pytest.mark.parametrize("mode", ["virtual", "physical"])
def test_every_row_of_many_shards_is_read_below_any_soft_limit_of_files(shards, mode):
    activations = shards[0].parent / f"{mode}.h5"
    times = {}

    def timed(name: str, work):
        started, used = time.perf_counter(), time.process_time()
        result = work()
        times[name] = (
            f"{time.perf_counter() - started:.2f} s ({time.process_time() - used:.2f} s of CPU)"
        )
        return result

    timed("merge", lambda: merge_shards(shards, mode, activations))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(256, soft), hard)
    )  # fewer than there are shards
    try:
        acts = timed("open", lambda: theloom.open(activations))
        picked = np.random.default_rng(0).choice(len(acts), 200)
        rows = timed("200 rows, here and there", lambda: acts[HOOK][picked])
        everything = timed("all rows", lambda: acts[HOOK][:])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(256, soft)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(rows[:, 0], torch.from_numpy(picked).float())
    assert torch.equal(everything[:, 7], torch.arange(SHARDS * ROWS).float())
    with h5py.File(activations) as file:
        data = timed("h5py: all rows", lambda: file[f"hooks/{HOOK}/activations"][:])
    right = int((data[:, 0] == np.arange(SHARDS * ROWS)).sum())
    size = activations.stat().st_size / 1e6
    print(f"\n{mode}, {SHARDS} shards, {size:.1f} MB, soft limit of open files {soft}:")
    print(
        ", ".join(f"{name} {took}" for name, took in times.items()), f"(h5py: {right} rows right)"
    )
    if mode == "physical":
        assert right == SHARDS * ROWS


def test_a_dataset_of_many_files_takes_few_descriptors(shards):
    activations = shards[0].parent / "few.h5"
    merge_shards(shards, "virtual", activations)
    script = (
        "import os, resource, sys, theloom\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "acts = theloom.open(sys.argv[1])\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "rows = [acts[hook][:] for hook in acts.hooks]\n"
        "batches = sum(len(batch) for batch in acts.batches(acts.hooks[0], 256, shuffle=True))\n"
        "assert batches == len(acts) == len(rows[0])\n"
        "print(len(os.listdir('/proc/self/fd')) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(activations)], capture_output=True, text=True
    )
    assert done.stdout == "0\n", done.stderr


def test_few_packed_files_stay_open_and_few_of_their_chunks_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "_OPEN", 2)
    monkeypatch.setattr(compression, "_CACHED_CHUNKS", 3)
    packed = [tmp_path / f"{number:05d}-of-00005.h5" for number in range(5)]
    for number, path in enumerate(packed):
        write_shard(path, number, "zstd")
    merge_shards(packed, "virtual", tmp_path / "packed.h5")
    acts = theloom.open(tmp_path / "packed.h5")
    for _ in range(2):
        assert torch.equal(acts[HOOK][:][:, 0], torch.arange(5.0 * ROWS))
    assert len(acts._maps._open) == 2
    assert [len(cache._chunks) for cache in acts._maps._chunks.values()] == [3]
