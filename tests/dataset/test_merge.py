"""Shards are merged only when they are whole, of one run, and in order."""

import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import theloom
from support import stages
from theloom.dataset.merge import merge_shards
from theloom.errors import StoreError


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    run = stages(
        tmp_path_factory.mktemp("run"), tiny_llama, "extraction.shards=3 corpus.max_tokens=600"
    )
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
        merge_shards(shards, mode, tmp_path / "activations.h5")
    assert not (tmp_path / "activations.h5").exists()


def test_a_shard_cut_short_is_named(shards, tmp_path):
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(StoreError, match=shards[1].name):
        merge_shards(shards, "virtual", tmp_path / "activations.h5")


def test_an_uncommitted_shard_is_named(shards, tmp_path):
    with h5py.File(shards[2], "a") as file:
        log = file["commit_log"][:]
        log["checksum"] = 0
        file["commit_log"][:] = log
    with pytest.raises(StoreError, match=rf"{shards[2].name}: only 0 of its"):
        merge_shards(shards, "virtual", tmp_path / "activations.h5")


def test_a_shard_of_another_run_is_named(shards, tmp_path, tiny_llama):
    other = stages(
        tmp_path / "other",
        tiny_llama,
        "extraction.shards=3 corpus.max_tokens=600 extraction.attention=eager",
    )
    other.prepare()
    other.extract()
    with pytest.raises(StoreError, match=r"its run_fingerprint is not that of"):
        merge_shards(
            [shards[0], other.shards[1], shards[2]], "virtual", tmp_path / "activations.h5"
        )


def test_shards_out_of_order_are_refused(shards, tmp_path):
    with pytest.raises(StoreError, match="is not shard 0"):
        merge_shards([shards[1], shards[0], shards[2]], "virtual", tmp_path / "activations.h5")


@pytest.mark.parametrize("name", ["tokens/input_ids", "statistics/mean", "windows/hash"])
def test_a_shard_with_a_changed_table_is_named(shards, tmp_path, name):
    with h5py.File(shards[0], "a") as file:
        table = file[name][:]
        table.reshape(-1)[0] += 1
        file[name][:] = table
    with pytest.raises(
        StoreError, match=rf"{shards[0].name}: its .* were changed after it was written"
    ):
        merge_shards(shards, "physical", tmp_path / "activations.h5")


def test_a_merge_that_is_killed_leaves_no_file_and_the_next_one_is_whole(shards, tmp_path):
    output = tmp_path / "activations.h5"
    source = (
        "import sys, os\nfrom pathlib import Path\nfrom theloom.dataset.merge import merge_shards\n"
        "real, left = os.sendfile, [int(sys.argv[1])]\n"
        "def sendfile(*a):\n    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), 9)\n    return real(*a)\n"
        "os.sendfile = sendfile\n"
        "merge_shards([Path(p) for p in sys.argv[3:]], 'physical', Path(sys.argv[2]))"
    )
    for point in (0, 5, 17):  # of 18 copies: nine datasets, and two shards that have rows
        done = subprocess.run([sys.executable, "-c", source, str(point), output, *shards])
        assert done.returncode == -9
        assert not output.exists()
    merge_shards(shards, "physical", output)
    merge_shards(shards, "virtual", tmp_path / "virtual.h5")
    whole, virtual = theloom.open(output), theloom.open(tmp_path / "virtual.h5")
    for hook in whole.hooks:
        assert (whole[hook][:] == virtual[hook][:]).all()
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.lock"))


def test_statistics_of_the_whole_are_those_of_all_rows(shards, tmp_path):
    merge_shards(shards, "virtual", tmp_path / "activations.h5")
    acts = theloom.open(tmp_path / "activations.h5")
    for hook in acts.hooks:
        rows, found = acts[hook][:].double().numpy(), acts.statistics[hook]
        assert found.rows == len(rows) == 600
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=1e-5)
        assert found.norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-6)


def test_too_few_file_descriptors_are_an_error_not_zeros(shards, tmp_path):
    merge_shards(shards, "virtual", tmp_path / "activations.h5")
    source = (
        "import sys, os, resource, theloom, torch\nfrom theloom.errors import StoreError\n"
        "acts = theloom.open(sys.argv[1])\nacts.hooks\n"
        "opened = len(os.listdir('/proc/self/fd')) - 1\n"
        "for more in (0, 1):\n"
        "  resource.setrlimit(resource.RLIMIT_NOFILE, (opened + more, 64))\n"
        "  try: print(len(acts[acts.hooks[0]][:]) == len(acts), 'rows')\n"
        "  except StoreError as error: print(error)"
    )
    command = [sys.executable, "-c", source, tmp_path / "activations.h5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, read = done.stdout.splitlines()
    assert "files open at once; raise the limit (ulimit -n)" in refused
    assert read == "True rows"  # one shard after the other
