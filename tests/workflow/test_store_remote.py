"""A run whose shards go to S3 while it is extracted, through snakemake."""

import json

import pytest
import theloom
import torch
from remote_support import DROP, SLOW_DOWN, Bucket, s3_server


@pytest.fixture(scope="module")
def server():
    with s3_server() as found:
        yield found


def test_shards_are_pushed_and_the_manifest_comes_once_the_run_is_verified(
    project, tiny_profile, server
):
    tiny_profile(project)
    bucket, proxy = Bucket(server[0], "runs"), server[1]
    proxy.fault = lambda number: (DROP, SLOW_DOWN)[number // 4 % 2] if number % 4 == 0 else None
    done = project.snakemake(profiles="tiny", overrides=f"store.remote={bucket.url}/here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*proxy.faults} == {DROP, SLOW_DOWN}
    folder = project.results("tiny")
    assert len(list(folder.glob("pushed/*.json"))) == 2
    recorded = json.loads((folder / "pushed.json").read_text())
    assert recorded["url"] == f"{bucket.url}/here/tiny"
    remote, local = theloom.open(recorded["url"]), theloom.open(folder / "activations.h5")
    assert len(remote) == len(local) == 3000
    for hook in local.hooks:
        assert torch.equal(remote[hook][:], local[hook][:])
    assert project.jobs(profiles="tiny", overrides=f"store.remote={bucket.url}/here") == {}


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
