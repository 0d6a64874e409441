"""Unfinished shards: where they are, and what a job that resumes one reads from it."""

from pathlib import Path
from typing import Any

import h5py

from theloom.store import commit_log


def read_partial(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The attributes of a shard's unfinished file.

    Args:
        path: the shard's final file.
        fingerprint: of the job; a file with another one cannot be resumed.

    Returns:
        The attributes; None if there is no file that can be resumed.
    """
    try:
        with h5py.File(partial_of(path), "r") as file:
            return dict(file.attrs) if file.attrs.get("shard_fingerprint") == fingerprint else None
    except OSError:
        return None


def committed_batches(path: Path, fingerprint: str) -> int:
    """How many batches a shard's unfinished file claims to have committed; their rows are not read.

    Args:
        path: the shard's final file.
        fingerprint: of the job; a file with another one cannot be resumed.

    Returns:
        The number of batches; 0 if there is no file that can be resumed.
    """
    try:
        with h5py.File(partial_of(path), "r") as file:
            return (
                commit_log.committed(file["commit_log"][:])
                if file.attrs.get("shard_fingerprint") == fingerprint
                else 0
            )
    except (OSError, KeyError):
        return 0


def partial_of(path: Path) -> Path:
    """The path of a shard's unfinished file.

    Args:
        path: of the finished shard.

    Returns:
        The same with `.partial` at its end.

    Examples:
        >>> partial_of(Path("shards/0.h5")).name
        '0.h5.partial'
    """
    return path.with_name(path.name + ".partial")
