"""Flipped bits and cut files: found by verification wherever they lie, and never read as if nothing
were wrong.
"""

import os
import random
import shutil

import h5py
import pytest
import theloom
from crashes import flip
from support import stages
from theloom.dataset import inspect
from theloom.errors import StoreError

FLIPS = 200 if os.environ.get("LONG_TESTS") else 24
AREAS = [
    "hooks/{hook}/activations",
    "tokens/input_ids",
    "tokens/document",
    "tokens/position",
    "commit_log",
]
AREAS += [
    "windows/hash",
    "windows/offset",
    "documents/offset",
    "documents/id",
    "statistics/mean",
    "windows/batch",
]


@pytest.fixture(scope="module", params=["none", "zstd"])
def run(request, tmp_path_factory, tiny_llama):
    requested = f"extraction.shards=2 corpus.max_tokens=600 store.compression={request.param}"
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, requested).all()


def found_wrong(path) -> bool:
    try:
        acts = theloom.open(path)
        return bool(inspect.damaged_parts(acts) or inspect.check_hashes(acts)[0])
    except StoreError:
        return True


def extents(file, name) -> list[tuple[int, int]]:
    dataset, found = file[name].id, []
    if dataset.get_create_plist().get_layout() == h5py.h5d.CHUNKED:
        dataset.chunk_iter(lambda chunk: found.append((chunk.byte_offset, chunk.size)))
        return found
    return [(dataset.get_offset(), dataset.get_storage_size())]


def test_a_sound_run_has_nothing_wrong(run):
    assert not found_wrong(run.activations)
    assert not found_wrong(run.shards[0])


def test_every_flipped_bit_of_data_tokens_tables_and_log_is_found(run):
    choose, shard = random.Random(0), run.shards[1]
    hooks = theloom.open(shard).hooks
    for number in range(FLIPS):
        name = AREAS[number % len(AREAS)].format(hook=choose.choice(hooks))
        with h5py.File(shard) as file:
            first, size = choose.choice(extents(file, name))
        offset, bit = first + choose.randrange(size), choose.randrange(8)
        flip(shard, offset, bit)
        assert found_wrong(run.activations), (name, offset, bit)
        assert found_wrong(shard), (name, offset, bit)
        flip(shard, offset, bit)
    assert not found_wrong(run.activations)


def test_a_flipped_bit_anywhere_is_found_or_in_the_figures(run):
    """At offsets of the whole file, metadata included; the seconds that a job took are the only
    thing without a hash.
    """
    choose, shard = random.Random(1), run.shards[0]
    with h5py.File(shard) as file:
        (metrics,) = extents(file, "metrics")
    for _ in range(FLIPS):
        offset, bit = choose.randrange(shard.stat().st_size), choose.randrange(8)
        flip(shard, offset, bit)
        if not found_wrong(shard):
            assert metrics[0] <= offset < sum(metrics)
        flip(shard, offset, bit)


def test_a_shard_cut_short_anywhere_is_refused(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    shard = sorted(copy.glob("shards/*.h5"))[1]
    whole, choose = shard.read_bytes(), random.Random(2)
    for _ in range(FLIPS // 2):
        shard.write_bytes(whole[: choose.randrange(len(whole))])
        with pytest.raises(StoreError, match=shard.name):
            theloom.open(copy / "activations.h5")
        assert found_wrong(shard)
