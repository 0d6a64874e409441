"""Reading: every way to index, against the shards' own bytes; and files that are missing, cut short
or foreign.
"""

import pickle
import shutil

import h5py
import numpy as np
import pytest
import theloom
import torch
from support import stages
from theloom.errors import HookError, StoreError
from theloom.store import checksums
from theloom.store.index import write_index

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, "extraction.shards=3").all()


@pytest.fixture(scope="module")
def truth(run):
    """All rows of the hook, by plain h5py from the shards."""
    parts = []
    for shard in run.shards:
        with h5py.File(shard) as file:
            parts.append(file[f"hooks/{HOOK}/activations"][:])
    return np.concatenate(parts)


@pytest.fixture
def copy(run, tmp_path):
    """The run's folder, moved to another place."""
    return shutil.copytree(run.folder, tmp_path / "elsewhere")


INDICES = [
    slice(None),
    slice(100, 200),
    slice(-5, None),
    slice(1990, 5000),
    slice(50, 40),
    slice(None, None, 7),
    slice(None, None, -1),
    0,
    -1,
    1999,
    [3, 1, 1999, 3],
    [],
    [-1, 0],
    np.array([[0, 1], [2, 1500]]),
    np.arange(2000) % 3 == 0,
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_numpy_s(run, truth, index):
    got = theloom.open(run.activations)[HOOK][index]
    expected = truth[np.array(index, int) if isinstance(index, list) else index]
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert np.array_equal(got.numpy(), expected)


def test_tensors_index_too(run, truth):
    rows = theloom.open(run.activations)[HOOK]
    assert np.array_equal(rows[torch.tensor([5, 1200])].numpy(), truth[[5, 1200]])
    assert np.array_equal(rows[...].numpy(), truth)


@pytest.mark.parametrize("index", [2000, -2001, [0, 2000], np.ones(3, bool)], ids=str)
def test_rows_that_are_not_there_are_an_index_error(run, index):
    with pytest.raises(IndexError):
        theloom.open(run.activations)[HOOK][index]


def test_plain_h5py_reads_the_virtual_dataset(run, truth):
    with h5py.File(run.activations) as file:
        stored = file[f"hooks/{HOOK}/activations"]
        assert stored.is_virtual
        assert np.array_equal(stored[:], truth)
        assert file["tokens/input_ids"].shape == (2000,)


def test_documents_by_number_and_by_id(run, truth):
    acts = theloom.open(run.activations)
    assert len(acts) == 2000
    assert sum(len(acts.document(i)) for i in range(len(acts.documents))) == 2000
    for number in (0, 1, -1):
        document = acts.document(number)
        assert document.id == acts.documents[number]
        assert acts.document(document.id).rows == document.rows
        assert np.array_equal(document[HOOK].numpy(), truth[document.rows])
        assert set(acts.document_of.numpy(document.rows)) == {number % len(acts.documents)}
        assert np.array_equal(document.input_ids, acts.input_ids.numpy(document.rows))
    with pytest.raises(IndexError, match=r"it has .*, from 0"):
        acts.document(len(acts.documents))
    with pytest.raises(KeyError, match=r"nowhere.*acts\.documents lists them"):
        acts.document("nowhere")


def test_the_reader_says_what_it_has(run):
    acts = theloom.open(run.activations)
    assert acts.hooks == [
        f"blocks.{b}.{v}" for b in range(3) for v in ("hook_resid_pre", "hook_resid_post")
    ]
    assert HOOK in acts
    assert "2,000 tokens of" in repr(acts)
    assert "(6 in all): row of 64" in repr(acts)
    assert acts[HOOK].shape == (2000, 64)
    with pytest.raises(HookError, match=r"no hook point 'x' in .*blocks\.0\.hook_resid_pre"):
        acts["x"]


def test_a_single_shard_opens_too(run):
    assert len(theloom.open(run.shards[0])[HOOK]) == len(theloom.open(run.shards[0]))


def test_a_moved_folder_reads_the_same(run, copy, truth):
    assert np.array_equal(theloom.open(copy / "activations.h5")[HOOK][:].numpy(), truth)


def test_a_link_to_the_file_or_to_its_folder_reads_the_same(run, tmp_path, truth):
    (tmp_path / "latest.h5").symlink_to(run.activations)
    (tmp_path / "again.h5").symlink_to("latest.h5")
    (tmp_path / "folder").symlink_to(run.folder)
    for path in ("latest.h5", "again.h5", "folder/activations.h5"):
        with h5py.File(tmp_path / path) as file:
            assert np.array_equal(file[f"hooks/{HOOK}/activations"][:], truth)
        assert np.array_equal(theloom.open(tmp_path / path)[HOOK][:].numpy(), truth)


def test_a_physical_merge_holds_the_same_bytes_by_itself(run, tmp_path, truth):
    from theloom.dataset.merge import merge_shards

    merge_shards(run.shards, "physical", tmp_path / "activations.h5")
    acts, virtual = theloom.open(tmp_path / "activations.h5"), theloom.open(run.activations)
    for hook in acts.hooks:
        assert torch.equal(acts[hook][:], virtual[hook][:])
    assert np.array_equal(acts.window_hash, virtual.window_hash)
    assert np.array_equal(acts.window_offset, virtual.window_offset)
    assert acts.documents == virtual.documents
    assert np.array_equal(acts.position.numpy(...), virtual.position.numpy(...))
    assert not list(tmp_path.glob("*.partial"))
    with h5py.File(tmp_path / "activations.h5") as file:
        assert np.array_equal(file[f"hooks/{HOOK}/activations"][:], truth)


def test_an_open_dataset_can_be_pickled(run, truth):
    acts = pickle.loads(pickle.dumps(theloom.open(run.activations)))
    assert np.array_equal(acts[HOOK][7:9].numpy(), truth[7:9])


def test_missing_and_spoilt_files_are_refused_by_name(copy):
    middle = sorted(copy.glob("shards/*.h5"))[1]
    aside = middle.rename(middle.with_suffix(".aside"))
    with pytest.raises(StoreError, match=rf"{middle.name}, which is missing"):
        theloom.open(copy / "activations.h5")
    middle.write_bytes(aside.read_bytes()[:-1000])
    with pytest.raises(StoreError, match=rf"{middle.name}: has .* bytes"):
        theloom.open(copy / "activations.h5")
    shutil.copy(aside, middle)
    with h5py.File(middle, "a") as file:
        file.attrs["shard_fingerprint"] = "x" * len(file.attrs["shard_fingerprint"])
        write_index(file)
    checksums.write_checksums(
        middle, checksums.METADATA, checksums.TABLES, checksums.RESULTS
    )  # a whole shard, of another run
    middle.write_bytes(
        middle.read_bytes()[: aside.stat().st_size].ljust(aside.stat().st_size, b"\0")
    )
    with pytest.raises(StoreError, match=rf"{middle.name}: is not the shard"):
        theloom.open(copy / "activations.h5")


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all"])
def test_what_is_not_hdf5_is_refused(tmp_path, content):
    (tmp_path / "x.h5").write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.h5: cannot be read as HDF5"):
        theloom.open(tmp_path / "x.h5")


def test_what_is_not_there_or_of_another_format_is_refused(run, tmp_path):
    with pytest.raises(StoreError, match="no file"):
        theloom.open(tmp_path / "nothing.h5")
    with pytest.raises(
        StoreError, match=r"not a file of theloom\.activations version 1, found theloom\.tokens"
    ):
        theloom.open(run.folder / "tokens.h5")
    later = shutil.copy(run.shards[0], tmp_path / "later.h5")
    with h5py.File(later, "a") as file:
        file.attrs["format_version"] = 3
    with pytest.raises(StoreError, match="version 3"):
        theloom.open(later)
