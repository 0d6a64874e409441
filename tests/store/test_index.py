"""The directory says of every file what HDF5 itself says, and a file without one is read all the
same.
"""

import shutil
from pathlib import Path

import h5py
import pytest
import theloom
import torch
from support import stages
from theloom.dataset import inspect
from theloom.dataset.merge import merge_shards
from theloom.store import checksums, index


@pytest.fixture(scope="module", params=["none", "zstd"])
def run(request, tmp_path_factory, tiny_llama):
    requested = f"extraction.shards=2 corpus.max_tokens=300 store.compression={request.param}"
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, requested).all()


@pytest.fixture
def files(run):
    physical = run.folder / "physical.h5"
    merge_shards(run.shards, "physical", physical)
    return [*run.shards, run.activations, physical]


def test_it_is_what_hdf5_says(files):
    for path in files:
        with h5py.File(path) as file:
            assert index.INDEX in file
            listed = index.read(file)
            assert listed == index.derive(file)
            for name, value in file.attrs.items():
                assert listed.attributes[name] == value
            for name, dataset in listed.datasets.items():
                assert file[name].shape == dataset.shape


def test_arrays_are_those_that_h5py_reads(run):
    with h5py.File(run.shards[0]) as file, run.shards[0].open("rb") as raw:
        listed = index.read(file)
        names = [
            n for n, d in listed.datasets.items() if d.type and d.layout == h5py.h5d.CONTIGUOUS
        ]
        assert {"documents/id", "commit_log", "windows/hash", "statistics/mean"} <= set(names)
        for name in names:
            assert listed.array(raw.fileno(), name).tobytes() == file[name][:].tobytes()


def test_a_file_without_one_is_read_and_merged(run, tmp_path):
    hook = theloom.open(run.activations).hooks[0]
    rows = theloom.open(run.activations)[hook][:]
    shards = [Path(shutil.copy(path, tmp_path)) for path in run.shards]
    for path in shards:
        with h5py.File(path, "a") as file:
            del file[index.INDEX]
        checksums.write_checksums(path, checksums.METADATA, checksums.TABLES, checksums.RESULTS)
    merge_shards(shards, "virtual", tmp_path / "activations.h5")
    acts = theloom.open(tmp_path / "activations.h5")
    assert torch.equal(acts[hook][:], rows)
    assert not inspect.damaged_parts(acts)
