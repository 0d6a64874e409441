"""Packed files: the same rows, read by us and by HDF5's own filters, merged either way."""

import shutil
import threading
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  registers HDF5's zstd filter
import numpy as np
import pytest
import theloom
import torch
from support import stages
from theloom.dataset.merge import merge_shards
from theloom.errors import StoreError
from theloom.store import compression

HOOK = "blocks.1.hook_resid_post"
INDICES = [
    slice(None),
    slice(190, 1203),
    slice(None, None, -7),
    0,
    -1,
    [3, 1, 1999, 3],
    [],
    np.arange(2000) % 3 == 0,
]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runs(request, tmp_path_factory, tiny_llama):
    """The same run plain and packed."""
    requested = f"extraction.shards=3 store.dtype={request.param} store.compression="
    return [
        stages(tmp_path_factory.mktemp(how), tiny_llama, requested + how).all()
        for how in ("none", "zstd")
    ]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("mode", ["virtual", "physical"])
def test_a_packed_run_reads_as_a_plain_one(runs, tmp_path, index, mode):
    plain, packed = runs
    merge_shards(packed.shards, mode, packed.folder / f"{mode}.h5")
    acts = theloom.open(packed.folder / f"{mode}.h5")
    truth = theloom.open(plain.activations)
    assert torch.equal(acts[HOOK][index], truth[HOOK][index])
    assert torch.equal(acts[HOOK][:].float(), truth[HOOK][:].float())
    assert np.array_equal(acts.window_hash, truth.window_hash)
    assert np.array_equal(acts.statistics[HOOK].mean, truth.statistics[HOOK].mean)


@pytest.mark.parametrize("mode", ["virtual", "physical"])
def test_hdf5_s_own_filters_read_it(runs, mode):
    plain, packed = runs
    merge_shards(packed.shards, mode, packed.folder / f"{mode}.h5")
    with h5py.File(packed.folder / f"{mode}.h5") as file:
        stored = file[f"hooks/{HOOK}/activations"][:].astype("f4")
    assert np.array_equal(stored, theloom.open(plain.activations)[HOOK][:].float().numpy())


def test_nothing_is_left_beside_a_packed_shard(runs):
    folder = runs[1].folder / "shards"
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in runs[1].shards)


def test_packing_holds_no_lock_that_its_threads_may_need(runs, tmp_path, monkeypatch):
    """A garbage collection in a thread may free an object of h5py, which takes its lock."""
    pack, done = compression._packed, []

    def with_h5py(rows: np.ndarray, step: int) -> bytes:
        h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        return pack(rows, step)

    monkeypatch.setattr(compression, "_packed", with_h5py)
    source = shutil.copy(runs[0].shards[0], tmp_path / "shard.h5.partial")

    def work() -> None:
        compression.pack_shard(Path(source), tmp_path / "shard.h5")
        done.append(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(600)
    assert done


def test_a_damaged_chunk_is_an_error_not_other_rows(runs):
    shard = runs[1].shards[0]
    with h5py.File(shard) as file:
        chunks = []
        file[f"hooks/{HOOK}/activations"].id.chunk_iter(chunks.append)
    raw = bytearray(shard.read_bytes())
    sound = bytes(raw)
    raw[chunks[0].byte_offset + chunks[0].size // 2] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(StoreError, match="rows from 0 on are damaged"):
        theloom.open(shard)[HOOK][:]
    shard.write_bytes(sound)
