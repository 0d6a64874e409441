"""Shards are merged only when they are whole, of one run, and in order."""

import shutil

import h5py
import pytest
from support import stages
from theloom.errors import StoreError
from theloom.merge import merge


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    run = stages(tmp_path_factory.mktemp("run"), tiny_llama, "extraction.shards=3 corpus.max_tokens=600")
    run.prepare()
    run.extract()
    return run


@pytest.fixture
def shards(finished, tmp_path):
    return [shutil.copy(s, tmp_path / s.name) for s in finished.shards]


@pytest.mark.parametrize("mode", ["virtual", "physical"])
def test_a_missing_shard_is_named(shards, tmp_path, mode):
    shards[1].unlink()
    with pytest.raises(StoreError, match=rf"no file .*{shards[1].name}"):
        merge(shards, mode, tmp_path / "activations.h5")
    assert not (tmp_path / "activations.h5").exists()


def test_a_shard_cut_short_is_named(shards, tmp_path):
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(StoreError, match=shards[1].name):
        merge(shards, "virtual", tmp_path / "activations.h5")


def test_an_uncommitted_shard_is_named(shards, tmp_path):
    with h5py.File(shards[2], "a") as file:
        log = file["commit_log"][:]
        log["check"] = 0
        file["commit_log"][:] = log
    with pytest.raises(StoreError, match=rf"{shards[2].name}: only 0 of its"):
        merge(shards, "virtual", tmp_path / "activations.h5")


def test_a_shard_of_another_run_is_named(shards, tmp_path, tiny_llama):
    other = stages(
        tmp_path / "other", tiny_llama, "extraction.shards=3 corpus.max_tokens=600 memory.streaming_chunk_size=32"
    )
    other.prepare()
    other.extract()
    with pytest.raises(StoreError, match=r"its run_identity is not that of"):
        merge([shards[0], other.shards[1], shards[2]], "virtual", tmp_path / "activations.h5")


def test_shards_out_of_order_are_refused(shards, tmp_path):
    with pytest.raises(StoreError, match="is not shard 0"):
        merge([shards[1], shards[0], shards[2]], "virtual", tmp_path / "activations.h5")
