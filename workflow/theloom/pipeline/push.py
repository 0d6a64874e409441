"""The stages push_shard and push_run: a run goes to `store.remote` while it is extracted; and
remove_shards, with which it is there alone.
"""

import json
import logging
from pathlib import Path
from typing import Any

from theloom.config.schema import Config
from theloom.errors import ConfigError, StoreError
from theloom.remote.blocks import RemoteFile
from theloom.remote.folder import RemotePath, find
from theloom.remote.manifest import own_checksums
from theloom.remote.places import Store, join
from theloom.remote.push import push, push_file

log = logging.getLogger(__name__)

_AT_ONCE = 1 << 24  # bytes that are read back


def push_shard(config: Config, shard: Path, run: str, output: Path) -> None:
    """Push a finished shard, and its hashes. The folder cannot be opened before `push_run`.

    Args:
        config: The config of the stage.
        shard: The shard, in the folder `shards` of the run.
        run: Name of the run.
        output: The record, a JSON file.

    Raises:
        StoreError: The store cannot be reached, has no such bucket or forbids to write.
    """
    url, name = _url(config, run), f"{shard.parent.name}/{shard.name}"
    record, uploaded = push_file(Store(url), shard, url, name)
    log.info("%s: uploaded %d of %d bytes", join(url, name), uploaded, record.size)
    _write(output, {"url": join(url, name), "sha256": record.sha256})


def push_run(config: Config, activations: Path, run: str, output: Path) -> None:
    """Push the merged file, the data card and the manifest; shards that are there stay.

    Args:
        config: The config of the stage.
        activations: The merged file.
        run: Name of the run.
        output: The record, a JSON file.

    Raises:
        StoreError: As of `push_shard`; or a file of the run is missing or changed.
    """
    done = push(activations, _url(config, run))
    log.info("%s: uploaded %d of %d bytes", done.url, done.uploaded_bytes, done.bytes)
    of_folder = (
        "url",
        "main",
        "files",
        "bytes",
        "manifest_sha256",
    )  # the same, however often it ran
    _write(output, {name: getattr(done, name) for name in of_folder})


def remove_shards(config: Config, pushed: Path, output: Path) -> None:
    """Remove the local shards of a pushed run, each after all of it was read back and has its hash.

    A job that was killed goes on: what it removed was read back before.

    Args:
        config: The config of the stage.
        pushed: The record of `push_run`, in the folder of the run.
        output: The record, a JSON file, which tells readers of the local file where the shards are.

    Raises:
        ConfigError: `store.keep_local` is true.
        StoreError: A pushed shard is missing or changed, or is not the local one; no shard is
            removed that was not read back.
    """
    if config.store.keep_local:
        raise ConfigError("store.keep_local: is true, and shards were to be removed; set it false")
    url, removed = json.loads(pushed.read_text(encoding="utf-8"))["url"], 0
    folder = find(url).folder
    for record in sorted(pushed.parent.glob("pushed/*.json")):
        name = f"shards/{record.stem}.h5"
        remote, shard = RemotePath(folder, name), pushed.parent / name
        sha256 = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        if not remote.is_file() or folder.manifest.files[name].sha256 != sha256:
            raise StoreError(f"{remote}: is not the shard that was pushed; push the run again")
        if not shard.exists():
            continue
        if own_checksums(shard) != own_checksums(remote) or shard.stat().st_size != remote.size:
            raise StoreError(f"{shard}: is not the shard that was pushed; push the run again")
        _read_back(remote.open_bytes())
        shard.unlink()
        removed += 1
    log.info("%s: %d local shards are removed", url, removed)
    _write(output, {"url": url})


def _read_back(file: RemoteFile) -> None:
    """Read all of a file; each block is checked by its hash. Raises StoreError."""
    memory = memoryview(bytearray(_AT_ONCE))
    for start in range(0, file.size, _AT_ONCE):
        file.read_into(memory[: min(_AT_ONCE, file.size - start)], start)


def _url(config: Config, run: str) -> str:
    remote = config.store.remote
    if remote is None:
        raise ConfigError("store.remote: is null, and a push was requested; give a URL")
    return join(remote, run)


def _write(output: Path, record: dict[str, Any]) -> None:
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
