"""The Kubernetes profile: the jobs that Snakemake's real executor sends, to an API server that
writes them down.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from slurm import install_packages

SECRET = "hf_notARealTokenButSecret"


class ApiServer(ThreadingHTTPServer):
    """Takes secrets and jobs, and reports each job's pod as failed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.jobs: list[dict] = []
        self.secrets: list[dict] = []


class Answer(BaseHTTPRequestHandler):
    server: ApiServer

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (self.server.jobs if self.path.endswith("/jobs") else self.server.secrets).append(body)
        self._answer(body)

    def do_GET(self) -> None:
        if "/pods" in self.path:
            self._answer({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": []})
        else:
            self._answer({"metadata": {"name": "job"}, "status": {"failed": 1}})

    def do_DELETE(self) -> None:
        self._answer({"kind": "Status", "status": "Success"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    running = ApiServer()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [
            {"name": "here", "cluster": {"server": f"http://127.0.0.1:{running.server_port}"}}
        ],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield running
    running.shutdown()
    running.server_close()


def test_a_shard_s_pod_asks_for_what_is_planned_and_carries_no_token(
    server, project, tmp_path, monkeypatch
):
    if missing := install_packages(["rsync"], ["rsync"]):
        pytest.skip(missing)  # Snakemake's storage plugin copies with it
    run = "results/7b+shards=3"
    storage = tmp_path / "volume"
    for name in (
        "config/extract.json",
        "config/tokens.json",
        "estimate.h5",
        "model.h5",
        "tokens.h5",
    ):
        (storage / run / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / run / name).write_text("{}")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--profile",
        "workflow/profiles/kubernetes",
        "--retries",
        "0",
    ]
    command += [
        "--default-storage-prefix",
        str(storage),
        "--envvars",
        "HF_TOKEN",
        "--rerun-triggers",
        "mtime",
    ]
    command += ["--seconds-between-status-checks", "1", "--allowed-rules", "extract_shard"]
    command += [
        "--config",
        "profiles=7b",
        "set=extraction.shards=3 resources.gpu=2",
        "--",
        f"{run}/shards/00001-of-00003.h5",
    ]
    done = subprocess.run(
        command, cwd=project.folder, capture_output=True, text=True, timeout=1800, env=os.environ
    )
    assert len(server.jobs) == 1, done.stdout + done.stderr
    (container,) = server.jobs[0]["spec"]["template"]["spec"]["containers"]
    requested = container["resources"]
    assert requested["requests"]["nvidia.com/gpu"] == requested["limits"]["nvidia.com/gpu"] == "2"
    assert requested["requests"]["memory"] == requested["limits"]["memory"]
    assert 5000 < int(requested["limits"]["memory"].removesuffix("M")) < 15_000
    assert int(requested["requests"]["ephemeral-storage"].removesuffix("M")) > 1000
    assert container["image"] == "registry.example.com/theloom:0.1.0"
    assert {"name": "theloom", "mountPath": "/theloom"} in container["volumeMounts"]
    assert SECRET not in json.dumps(server.jobs)
    assert [e["name"] for e in container["env"] if e["name"] == "HF_TOKEN"] == ["HF_TOKEN"]
    assert SECRET not in done.stdout + done.stderr
