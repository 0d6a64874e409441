"""Files from somebody else: what would lead out of their folder is refused, and sizes are checked
before a map.
"""

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import theloom
import torch
import zstandard
from crashes import flip
from support import ROOT, lines_run, stages
from theloom.cli import main
from theloom.errors import StoreError
from theloom.store import checksums, index
from theloom.store.hdf5 import objects

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


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny_llama):
    requested = "extraction.shards=2 corpus.max_tokens=300 store.compression=zstd"
    return stages(tmp_path_factory.mktemp("packed"), tiny_llama, requested).all()


def virtual_over(source):
    def change(file):
        shape, kind = file[HOOK].shape, file[HOOK].dtype
        del file[HOOK]
        sources = h5py.VirtualLayout(shape, kind)
        sources[:] = h5py.VirtualSource(source, HOOK, shape)
        file.create_virtual_dataset(HOOK, sources)

    return change


@pytest.mark.parametrize("source", [".", "activations.h5", "shards/../activations.h5"])
def test_a_file_is_no_source_of_itself(copy, source):
    forge(copy / "activations.h5", virtual_over(source))
    with pytest.raises(StoreError, match="activations refers to the file itself"):
        theloom.open(copy / "activations.h5")


def test_a_table_of_sources_that_names_the_file_itself_is_refused(copy):
    def refer(file):
        names = file["sources/file"][:]
        del file["sources/file"]
        file["sources/file"] = np.array([b"activations.h5", *names[1:]], "S40")

    forge(copy / "activations.h5", refer)
    with pytest.raises(StoreError, match="it refers to the file itself"):
        theloom.open(copy / "activations.h5")


def nested(file):
    group = file
    for _ in range(3000):
        group = group.create_group("g")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nested, "is deeper than any group"),
        (lambda file: file.__setitem__("again", file["/"]), "again has another name"),
        (lambda file: file.__setitem__("again", file["metrics"]), "has another name"),
        (lambda file: file["tokens"].create_dataset("a/b/c", data=1), "deeper than any group"),
        (lambda file: file.__setitem__("type", np.dtype("i4")), "neither a group nor a dataset"),
    ],
    ids=["3000 groups", "a circle", "two names", "four deep", "a type"],
)
def test_groups_that_no_file_of_theloom_has_are_refused_soon(copy, change, words):
    shard = sorted(copy.glob("shards/*.h5"))[0]
    with h5py.File(shard, "a") as file:
        change(file)

    def refuse() -> None:
        with pytest.raises(StoreError, match=words) as refused:
            theloom.open(shard)
        assert shard.name in str(refused.value)

    assert lines_run(refuse, "") < 15_000  # each of 3000 groups takes some


def test_more_objects_than_any_file_has_are_refused_soon(copy, monkeypatch):
    monkeypatch.setattr(objects, "MOST_OBJECTS", 500)
    shard = sorted(copy.glob("shards/*.h5"))[0]
    with h5py.File(shard, "a") as file:
        for number in range(500):
            file.create_group(f"g{number}")
    with pytest.raises(StoreError, match="more objects"):
        theloom.open(shard)


def test_a_table_with_a_size_beyond_the_file_is_refused(copy):
    def declare(file):
        del file["documents/offset"]
        file.create_dataset("documents/offset", (1 << 50,), "<i8", chunks=(1 << 20,))

    shard = sorted(copy.glob("shards/*.h5"))[0]
    forge(shard, declare)
    with pytest.raises(StoreError, match="documents/offset is not stored as TheLoom does it"):
        theloom.open(shard)


def test_an_index_of_another_form_is_refused(copy):
    shard = sorted(copy.glob("shards/*.h5"))[0]
    for text in (
        b"[" * 100_000,
        b"{}",
        b'{"attributes": {}, "datasets": {"a": [[1e400], "", 1, []]}}',
    ):
        with h5py.File(shard, "a") as file:
            del file["index"]
            file["index"] = np.frombuffer(text, "u1")
        with pytest.raises(StoreError, match="is damaged"):
            theloom.open(shard)


@pytest.mark.parametrize("stated", [1 << 50, 1 << 20, 8])
def test_a_chunk_that_states_another_size_is_damage(packed, tmp_path, stated):
    copy = shutil.copytree(packed.folder, tmp_path / "run")
    shard = sorted(copy.glob("shards/*.h5"))[0]
    frame = zstandard.ZstdCompressor().compress(bytes(stated if stated < 1 << 30 else 8))
    if stated >= 1 << 30:  # a header of eight bytes of size
        frame = frame[:4] + bytes([0b11100000]) + stated.to_bytes(8, "little") + frame[6:]
    with h5py.File(shard, "a") as file:
        file[HOOK].id.write_direct_chunk((0, 0), frame)
    checksums.write_checksums(shard, checksums.METADATA)
    rows = theloom.open(shard)["blocks.1.hook_resid_post"]
    with pytest.raises(
        StoreError, match=rf"rows from 0 on are damaged \(a chunk of {stated} bytes"
    ):
        rows[:]


def test_chunks_of_another_shape_are_refused(packed, tmp_path):
    copy = shutil.copytree(packed.folder, tmp_path / "run")
    shard = sorted(copy.glob("shards/*.h5"))[0]

    def reshape(file):
        rows = np.zeros(file[HOOK].shape, file[HOOK].dtype)
        del file[HOOK]
        file.create_dataset(HOOK, data=rows, chunks=(1, 1))

    forge(shard, reshape)
    with pytest.raises(StoreError, match="chunk"):
        theloom.open(shard)["blocks.1.hook_resid_post"][:]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_file_replaced_after_it_was_opened_is_an_error(run, packed, tmp_path, compression):
    made = run if compression == "none" else packed
    copy = shutil.copytree(made.folder, tmp_path / "run")
    shard, hook = sorted(copy.glob("shards/*.h5"))[0], "blocks.1.hook_resid_post"
    acts, alone, early = (theloom.open(p) for p in (copy / "activations.h5", shard, shard))
    expected = early[hook][:]
    other = shutil.copy(shard, tmp_path / "other.h5")
    with h5py.File(other, "a") as file:  # of the same size
        file["windows/hash"][0, 0] += 1
        if compression == "none":
            file[HOOK][0] += 1
    checksums.write_checksums(other, checksums.METADATA, checksums.TABLES, checksums.RESULTS)
    assert other.stat().st_size == shard.stat().st_size
    Path(other).replace(shard)
    for opened in (acts, alone, pickle.loads(pickle.dumps(early))):
        with pytest.raises(StoreError, match="was replaced after it was opened"):
            opened[hook][:]
    with pytest.raises(StoreError, match="was replaced after it was opened"):
        alone.statistics  # noqa: B018
    shard.unlink()
    assert torch.equal(early[hook][:], expected)  # its map, or its descriptor, is the old file's
    with pytest.raises(StoreError, match="is missing"):
        acts[hook][:]


def test_a_shard_other_than_the_first_is_read_by_itself(run):
    whole, alone = theloom.open(run.activations), theloom.open(run.shards[1])
    first = len(whole.documents) - len(alone.documents)
    assert first > 0
    frame, expected = alone.to_dataframe(), whole.to_dataframe()[first:]
    assert frame["id"].tolist() == alone.documents == expected["id"].tolist()
    assert frame["tokens"].tolist() == expected["tokens"].tolist()
    assert frame["windows"].tolist() == expected["windows"].tolist()
    tokens = alone.to_dataframe("tokens")
    assert tokens.groupby("document").size().tolist() == frame["tokens"].tolist()


def test_a_damaged_shard_other_than_the_first_gets_a_verdict(copy, capsys):
    shard = sorted(copy.glob("shards/*.h5"))[1]
    with h5py.File(shard) as file:
        place = file[HOOK].id.get_offset()
    flip(shard, place + 5, 2)
    assert main.main(["verify", str(shard)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rows of 1 windows are not those that were written" in error


def test_a_changed_metric_is_found(copy, capsys):
    shard = sorted(copy.glob("shards/*.h5"))[0]
    with h5py.File(shard) as file:
        place = file["metrics"].id.get_offset()
    flip(shard, place + 5, 2)
    assert main.main(["verify", str(shard)]) == 1
    assert "its metrics" in capsys.readouterr().err


def test_a_file_of_the_first_version_states_that_its_metrics_have_no_checksum(capsys):
    (old,) = (ROOT / "tests/released").glob("*-1-bf16.h5")
    assert main.main(["verify", str(old)]) == 0
    assert "metrics (seconds, bytes) have no checksum" in capsys.readouterr().out
