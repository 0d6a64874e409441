"""`hf://` by huggingface_hub's own file system, to a hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hub_support import hub
from support import stages

# huggingface_hub reads its settings when it is imported
PUSH_AND_READ = """
import json, sys
import theloom
from theloom.remote.push import push
run, url = sys.argv[1:]
first, again = push(f"{run}/activations.h5", url), push(f"{run}/activations.h5", url)
local, remote = theloom.open(f"{run}/activations.h5"), theloom.open(url)
same = all((remote[hook][:] == local[hook][:]).all() for hook in local.hooks)
some = (remote[local.hooks[0]][[5, 99, 7]] == local[local.hooks[0]][[5, 99, 7]]).all()
print(json.dumps([bool(same), bool(some), first.uploaded_files, again.uploaded_files]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    overrides = "extraction.shards=2 corpus.max_tokens=300"
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, overrides).all()


def python(server, *words: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1"}
    environment = {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"} | settings
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=1800
    )


def test_a_run_is_committed_to_the_hub_and_read_by_ranges(run):
    with hub() as server:
        done = python(server, "-c", PUSH_AND_READ, str(run.folder), "hf://user/name")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [True, True, 3, 0]
        assert server.unknown == []
        assert server.ranges
        for file in (run.activations, *run.shards):
            assert server.files[str(file.relative_to(run.folder))] == file.read_bytes()

        name = f"shards/{run.shards[0].name}"
        data = server.files[name]
        server.files[name] = changed = data[:-1] + bytes([data[-1] ^ 1])
        server.objects[hashlib.sha256(changed).hexdigest()] = changed
        verified = python(server, "-m", "theloom.cli", "verify", "hf://user/name")
        assert verified.returncode == 1
        assert "are not those that were pushed" in verified.stderr

        missing = python(server, "-m", "theloom.cli", "push", str(run.activations), "hf://no/one")
        assert missing.returncode == 1
        assert missing.stderr.startswith("error: ")
        assert missing.stderr.count("\n") == 1
        assert "no such bucket or repository" in missing.stderr
