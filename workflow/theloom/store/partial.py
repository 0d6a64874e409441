"""Unfinished shards: where they lie, and what a job that resumes one needs of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from theloom.store import commit_log

if TYPE_CHECKING:
    pass


def begun(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The attributes of the unfinished file of a shard, None where there is none that can be gone
    on with.
    """
    try:
        with h5py.File(partial_of(path), "r") as file:
            return dict(file.attrs) if file.attrs.get("shard_fingerprint") == fingerprint else None
    except OSError:
        return None


def batches_logged(path: Path, fingerprint: str) -> int:
    """The batches that the unfinished file of a shard vouches for, unread; 0 where there is none to
    be gone on with.
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
    """Where the unfinished file of a shard is."""
    return path.with_name(path.name + ".partial")
