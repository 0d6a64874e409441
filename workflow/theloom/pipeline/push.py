"""The stages push_shard and push_run: a run goes to `store.remote` while it is extracted."""

import json
import logging
from pathlib import Path
from typing import Any

from theloom.config.schema import Config
from theloom.errors import ConfigError
from theloom.remote.places import Store, join
from theloom.remote.push import push, push_file

log = logging.getLogger(__name__)


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


def _url(config: Config, run: str) -> str:
    remote = config.store.remote
    if remote is None:
        raise ConfigError("store.remote: is null, and a push was requested; give a URL")
    return join(remote, run)


def _write(output: Path, record: dict[str, Any]) -> None:
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
