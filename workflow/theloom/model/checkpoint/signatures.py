"""By what a model's files are known again: their contents, or their names, sizes and times."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from theloom.model.adapters.files import AdapterFiles
from theloom.model.checkpoint.conversion import content_hash
from theloom.model.files import ModelFiles


def files_fingerprint(files: ModelFiles) -> str:
    """XXH3-128 over the names and contents of a model's weight files and config, and over its
    adapters in their order.

    Args:
        files: of the model; all of them are read.

    Returns:
        32 hex digits.
    """
    state = _hashed(files.weight_files())
    for adapter in files.adapters:
        state.update(f"adapter {adapter_hash(adapter)}\n".encode())
    return state.hexdigest()


def adapter_hash(adapter: AdapterFiles) -> str:
    """XXH3-128 over the names and contents of an adapter's config and weights.

    Args:
        adapter: the adapter; all of its files are read.

    Returns:
        32 hex digits.
    """
    return _hashed(adapter.files).hexdigest()


def _hashed(files: Iterable[Path]) -> xxhash.xxh3_128:
    state = xxhash.xxh3_128()
    for file in files:
        state.update(f"{file.name} {content_hash(file)}\n".encode())
    return state


def files_signature(files: ModelFiles) -> str:
    """Names, sizes and times of a model's files: the same signature means that nobody has changed
    them.

    Args:
        files: of the model, none of which is read.

    Returns:
        The signature as JSON.
    """
    return json.dumps(list(_stats(files)))


def _stats(files: ModelFiles) -> Iterator[tuple[str, int, int]]:
    adapters = [file for adapter in files.adapters for file in adapter.files]
    for file in [*files.weight_files(), *adapters]:
        stat = file.stat()
        yield file.name, stat.st_size, stat.st_mtime_ns
