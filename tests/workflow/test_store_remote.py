"""A run whose shards go to S3 while it is extracted, and are there alone, through snakemake."""

import json
import shutil

import h5py
import numpy as np
import pytest
import theloom
import torch
from remote_support import DROP, SLOW_DOWN, Bucket, s3_server
from support import copy_project
from theloom.config.frozen import load_frozen
from theloom.errors import StoreError
from theloom.pipeline.push import remove_shards


@pytest.fixture(scope="module")
def server():
    with s3_server() as found:
        yield found


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, tiny_profile, server):
    """A run that was pushed while connections failed."""
    project = copy_project(tmp_path_factory.mktemp("pushed"))
    tiny_profile(project)
    bucket, proxy = Bucket(server[0], "runs"), server[1]
    proxy.fault = lambda number: (DROP, SLOW_DOWN)[number // 4 % 2] if number % 4 == 0 else None
    done = project.snakemake(profiles="tiny", overrides=f"store.remote={bucket.url}/here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*proxy.faults} == {DROP, SLOW_DOWN}
    return project, bucket


def test_shards_are_pushed_and_the_manifest_comes_once_the_run_is_verified(pushed):
    project, bucket = pushed
    folder = project.results("tiny")
    assert len(list(folder.glob("pushed/*.json"))) == 2
    recorded = json.loads((folder / "pushed.json").read_text())
    assert recorded["url"] == f"{bucket.url}/here/tiny"
    remote, local = theloom.open(recorded["url"]), theloom.open(folder / "activations.h5")
    assert len(remote) == len(local) == 3000
    for hook in local.hooks:
        assert torch.equal(remote[hook][:], local[hook][:])
    assert project.jobs(profiles="tiny", overrides=f"store.remote={bucket.url}/here") == {}


def test_local_shards_go_once_they_are_read_back_and_nothing_makes_them_anew(pushed, tmp_path):
    project, bucket = pushed
    folder, requested = project.results("tiny"), f"store.remote={bucket.url}/here"
    shutil.copytree(folder, tmp_path / "whole")
    truth = theloom.open(tmp_path / "whole/activations.h5")
    requested += " store.keep_local=false"
    assert project.jobs(profiles="tiny", overrides=requested).keys() == {
        "freeze_config",
        "remove_shards",
    }
    key = "here/tiny/shards/00000-of-00002.h5"
    right = bucket.get(key)
    bucket.put(key, right[:-1] + bytes([right[-1] ^ 1]))
    failed = project.snakemake(profiles="tiny", overrides=requested)
    printed = failed.stdout + failed.stderr
    assert failed.returncode != 0
    assert "are not those that were pushed" in printed
    assert "Traceback" not in printed
    assert len(list(folder.glob("shards/*.h5"))) == 2  # nothing goes whose copy is not right
    bucket.put(key, right)
    done = project.snakemake(profiles="tiny", overrides=requested)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its rows are at s3://runs/here/tiny, and no more here" in done.stderr
    assert not list(folder.glob("shards/*.h5"))
    url = json.loads((folder / "removed.json").read_text())["url"]
    remote = theloom.open(url)
    assert len(remote) == len(truth) == 3000
    for hook in truth.hooks:
        assert torch.equal(remote[hook][:], truth[hook][:])
    assert project.jobs(profiles="tiny", overrides=requested) == {}

    with pytest.raises(StoreError, match=f"removed once it was pushed; open {url}") as error:
        theloom.open(folder / "activations.h5")
    assert "\n" not in str(error.value)
    with h5py.File(folder / "activations.h5") as file:  # to a plain reader, too
        rows = file[f"hooks/{truth.hooks[0]}/activations"].astype("f4")[:]
        assert np.isnan(rows).all()

    # killed after the first shard: the next job goes on
    (folder / "shards").mkdir(exist_ok=True)
    shutil.copy2(tmp_path / "whole/shards/00001-of-00002.h5", folder / "shards")
    (folder / "removed.json").unlink()
    assert project.jobs(profiles="tiny", overrides=requested).keys() == {"remove_shards"}
    config = load_frozen(folder / "config/remove.json")
    other = folder / "shards/00001-of-00002.h5"
    shutil.copy(tmp_path / "whole/shards/00000-of-00002.h5", other)
    with pytest.raises(StoreError, match="is not the shard that was pushed"):
        remove_shards(config, folder / "pushed.json", folder / "removed.json")
    assert other.exists()
    shutil.copy(tmp_path / "whole/shards/00001-of-00002.h5", other)
    remove_shards(config, folder / "pushed.json", folder / "removed.json")
    assert not list(folder.glob("shards/*.h5"))


def test_a_bucket_that_is_not_there_is_one_line(project, tiny_profile, server):
    tiny_profile(project)
    bucket, proxy = Bucket(server[0], "more-runs"), server[1]
    proxy.fault = lambda number: None
    nowhere = bucket.url.replace("more-runs", "no-such-bucket")
    done = project.snakemake(profiles="tiny", overrides=f"store.remote={nowhere}")
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in printed
    errors = {line for line in printed.splitlines() if line.startswith("error: ")}
    assert errors
    assert all("no-such-bucket" in line for line in errors), errors
    assert not (project.results("tiny") / "pushed.json").exists()


def test_a_job_of_several_shards_pushes_and_removes_each_of_them(project, tiny_profile, server):
    tiny_profile(project)
    bucket, proxy = Bucket(server[0], "grouped-runs"), server[1]
    proxy.fault = lambda number: None
    cut = "extraction.shards=3 resources.shards_per_job=2 verify.documents=1"
    requested = f"name=grouped {cut} store.remote={bucket.url}/here"
    done = project.snakemake(profiles="tiny", overrides=f"{requested} store.keep_local=false")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project.results("grouped")
    logs = {file.name for file in (folder / "logs/extract_shard").iterdir()}
    assert logs == {"00000-to-00001-of-00003.log", "00002-to-00002-of-00003.log"}
    assert not list(folder.glob("shards/*"))
    assert project.jobs(profiles="tiny", overrides=f"{requested} store.keep_local=false") == {}

    alone = "name=alone extraction.shards=3 resources.shards_per_job=1"
    done = project.snakemake("--until", "merge_shards", profiles="tiny", overrides=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    local = theloom.open(project.results("alone") / "activations.h5")
    remote = theloom.open(f"{bucket.url}/here/grouped")
    assert len(remote) == len(local) == 3000
    for hook in local.hooks:
        assert torch.equal(remote[hook][:], local[hook][:])
