"""A Hugging Face hub on loopback: the requests by which huggingface_hub commits files to a dataset,
reads them by ranges and downloads those of a repository, as its documentation and the LFS batch API
have them.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

TEXTS = (".md", ".json")


class Hub(ThreadingHTTPServer):
    """One dataset or model, `user/name`; a large file is a link to where its bytes are, as on the
    hub. Commits are those of the branch main, but for what `tag` keeps.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.revisions = {"main": "0" * 40}  # commits by branch or tag
        self.tagged: dict[str, dict[str, bytes]] = {}  # files by commit
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.commits, self.ranges, self.unknown = 0, 0, list[str]()
        self.lock = threading.Lock()

    def add(self, folder: Path) -> None:
        """Take all files of a folder, in place of those that were there."""
        files = [file for file in folder.rglob("*") if file.is_file()]
        self.files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in self.files.values()}

    def tag(self, name: str) -> str:
        """Keep the files as they are under a tag; its commit."""
        self.revisions[name] = f"{len(self.tagged) + 1:040x}"
        self.tagged[self.revisions[name]] = dict(self.files)
        return self.revisions[name]


class Handler(BaseHTTPRequestHandler):
    """The answers."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def route(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(size), unquote(self.path.partition("?")[0])
        path, self.commit = self._on_main(path)
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self._object(found[1], body)
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif not re.match(r"(/api)?(/datasets|/models)?/user/name(/|$|\.git/)", path):
            self.answer_json({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        elif re.fullmatch(r"/api/(datasets|models)/user/name(/revision/main)?", path):
            files = [{"rfilename": name} for name in self._files]
            found = {"id": "user/name", "sha": self.commit, "siblings": files, "private": False}
            self.answer_json(found)
        elif re.match(r"/api/(datasets|models)/user/name/revision/", path):
            self.answer_json({"error": "none"}, 404, X_Error_Code="RevisionNotFound")
        elif path.endswith("/preupload/main"):
            self.answer_json({"files": [self._mode(f["path"]) for f in json.loads(body)["files"]]})
        elif path.endswith("/objects/batch"):
            self._batch(json.loads(body))
        elif path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
        elif path.endswith("/paths-info/main"):
            names = parse_qs(body.decode())["paths"]
            self.answer_json([self._info(n) for n in names if n in self._files])
        elif "/resolve/main/" in path:
            self._resolve(path.partition("/resolve/main/")[2])
        elif "/tree/main" in path:
            self._tree(path.partition("/tree/main")[2].strip("/"))
        else:
            self.server.unknown.append(f"{self.command} {path}")
            self.answer_json({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815

    @property
    def _files(self) -> dict[str, bytes]:
        return self.server.tagged.get(self.commit, self.server.files)

    def _on_main(self, path: str) -> tuple[str, str]:
        """The path as it is on the branch main, and the commit of the revision that it names."""
        known = self.server.revisions
        for name, commit in [*known.items(), *((commit, commit) for commit in known.values())]:
            for what in ("revision", "resolve", "tree", "paths-info"):
                if f"/{what}/{name}" in path:
                    return path.replace(f"/{what}/{name}", f"/{what}/main", 1), commit
        return path, known["main"]

    def _mode(self, path: str) -> dict[str, object]:
        mode = "regular" if path.endswith(TEXTS) else "lfs"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _batch(self, requested: dict) -> None:
        objects = []
        for one in requested["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            more = {} if one["oid"] in self.server.objects else {"actions": upload}
            objects.append({**one, **more})
        self.answer_json({"transfer": "basic", "objects": objects})

    def _object(self, oid: str, body: bytes) -> None:
        if self.command != "PUT":
            self._bytes(self.server.objects[oid])
        elif hashlib.sha256(body).hexdigest() != oid:
            self.answer_json({"error": "another hash"}, 400)
        else:
            self.server.objects[oid] = body
            self.answer(b"")

    def _commit(self, lines: list[dict]) -> None:
        with self.server.lock:
            self.server.commits += 1
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.objects[value["oid"]]
            oid = f"{self.server.commits:040x}"
        url = f"{self.server.url}/datasets/user/name/commit/{oid}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def _info(self, name: str) -> dict[str, object]:
        data = self._files[name]
        found = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
        if not name.endswith(TEXTS):
            sha256 = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return found

    def _tree(self, folder: str) -> None:
        below = [n for n in self._files if not folder or n.startswith(f"{folder}/")]
        if not below:
            self.answer_json({"error": "none"}, 404, X_Error_Code="EntryNotFound")
            return
        start = len(folder) + 1 if folder else 0
        found = []
        for part in dict.fromkeys(n[start:].partition("/")[0] for n in below):
            name = f"{folder}/{part}" if folder else part
            is_file = name in self._files
            place = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            found.append(self._info(name) if is_file else place)
        self.answer_json(found)

    def _resolve(self, name: str) -> None:
        if name not in self._files:
            self.answer_json({"error": "none"}, 404, X_Error_Code="EntryNotFound")
            return
        data = self._files[name]
        if name.endswith(TEXTS):
            self._bytes(data, ETag=f'"{_git_oid(data)}"', X_Repo_Commit=self.commit)
            return
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {"X_Linked_Etag": sha256, "X_Linked_Size": str(len(data))}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # on the hub another host
        place = f"{elsewhere}/lfs/{sha256}"
        self.answer(b"", 302, Location=place, X_Repo_Commit=self.commit, **linked)

    def _bytes(self, data: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None:
            self.answer(data, **headers)
            return
        self.server.ranges += 1
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        span = f"bytes {first}-{last}/{len(data)}"
        self.answer(data[first : last + 1], 206, Content_Range=span, **headers)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """Start the server."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_on(server: Hub, home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with a hub and a cache of its own: huggingface_hub reads where they are when it is
    imported.
    """
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "hf_none"}
    settings["HF_HUB_DISABLE_XET"] = "1"
    own = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, own))
    environment = {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"} | settings
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=1800
    )


# of arguments: a folder, a model, and settings; and so on, one run after another
RUN_STAGES = """
import sys
from pathlib import Path
from support import stages
from theloom.pipeline.stage_model import stage
for folder, model, words in zip(*[iter(sys.argv[1:])] * 3, strict=True):
    run = stages(Path(folder), Path(model), words)
    stage(run.config("source"), Path(folder) / "source.json")
    run.all().verify()
"""
