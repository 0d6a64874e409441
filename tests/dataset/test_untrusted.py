"""Files from somebody else: what would lead out of their folder is refused, and sizes are checked
before a map.
"""

import shutil

import h5py
import numpy as np
import pytest
import theloom
from support import stages
from theloom.errors import StoreError
from theloom.store import checksums, index

HOOK = "hooks/blocks.1.hook_resid_post/activations"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    return stages(
        tmp_path_factory.mktemp("run"), tiny_llama, "extraction.shards=2 corpus.max_tokens=300"
    ).all()


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run.folder, tmp_path / "run")


def forge(path, change) -> None:
    """Change a file as somebody would who checksums it again."""
    with h5py.File(path, "a") as file:
        change(file)
        index.write_index(file)
    checksums.write_checksums(path, checksums.METADATA, checksums.TABLES, checksums.RESULTS)


def test_an_external_link_is_refused(copy, run):
    def link(file):
        del file[HOOK]
        file[HOOK] = h5py.ExternalLink(str(run.shards[0]), HOOK)

    shard = sorted(copy.glob("shards/*.h5"))[0]
    forge(shard, link)
    with pytest.raises(StoreError, match=r"is a link to /.* outside of its folder"):
        theloom.open(shard)


def test_a_soft_link_is_refused(copy):
    shard = sorted(copy.glob("shards/*.h5"))[0]
    forge(shard, lambda file: file.__setitem__("more", h5py.SoftLink("/tokens")))
    with pytest.raises(StoreError, match="its more is a soft link"):
        theloom.open(shard)


def test_external_storage_is_refused(copy, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(1 << 20))

    def store(file):
        shape = file["tokens/position"].shape
        del file["tokens/position"]
        file.create_dataset(
            "tokens/position", shape, "<i4", external=[(str(tmp_path / "secret"), 0, 1 << 20)]
        )

    shard = sorted(copy.glob("shards/*.h5"))[0]
    forge(shard, store)
    with pytest.raises(StoreError, match=r"its tokens/position is stored in .*secret"):
        theloom.open(shard)


@pytest.mark.parametrize("where", ["../../elsewhere.h5", "/elsewhere.h5"])
def test_virtual_sources_outside_of_the_folder_are_refused_unless_allowed(copy, where):
    def refer(file):
        names = file["sources/file"][:]
        del file["sources/file"]
        file["sources/file"] = np.array([where.encode(), *names[1:]], "S40")

    forge(copy / "activations.h5", refer)
    with pytest.raises(
        StoreError, match=r"it refers to .*elsewhere\.h5, which is outside of its folder"
    ):
        theloom.open(copy / "activations.h5")
    with pytest.raises(StoreError, match=r"elsewhere\.h5, which is missing"):
        theloom.open(copy / "activations.h5", allow=[where])


def test_the_virtual_datasets_own_sources_are_looked_at_too(copy, run):
    def refer(file):
        shape, kind = file[HOOK].shape, file[HOOK].dtype
        del file[HOOK]
        sources = h5py.VirtualLayout(shape, kind)
        sources[:] = h5py.VirtualSource(str(run.shards[0]), HOOK, shape)
        file.create_virtual_dataset(HOOK, sources)

    forge(copy / "activations.h5", refer)
    with pytest.raises(StoreError, match=r"activations refers to /.* outside of its folder"):
        theloom.open(copy / "activations.h5")


def test_places_beyond_a_file_are_refused_before_anything_is_mapped(copy):
    forge(
        copy / "activations.h5",
        lambda file: file["sources/byte_offset"].__setitem__((0, 3), 1 << 40),
    )
    with pytest.raises(StoreError, match=r"refers to bytes that .* does not have"):
        theloom.open(copy / "activations.h5")


def test_more_rows_than_there_are_are_refused(copy):
    shard = sorted(copy.glob("shards/*.h5"))[0]
    forge(shard, lambda file: file.attrs.__setitem__("rows", file.attrs["rows"] + 1))
    with pytest.raises(StoreError, match="rows instead of"):
        theloom.open(shard)


def test_changed_metadata_is_refused(copy):
    shard = sorted(copy.glob("shards/*.h5"))[0]
    with h5py.File(shard, "a") as file:
        file.attrs["model_source"] = "another"
    with pytest.raises(StoreError, match="its metadata is not as it was written"):
        theloom.open(shard)
