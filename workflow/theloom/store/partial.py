"""Unfinished shards, and finished ones of an unfinished job: where they are, and what a job that
resumes reads from them.

Snakemake removes the outputs of a job that fails or is started again. A job of several shards
therefore gives none its final name before all are finished.
"""

from pathlib import Path
from typing import Any

import h5py

from theloom.store import commit_log, file_format


def read_partial(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The attributes of a shard's unfinished file.

    Args:
        path: the shard's final file.
        fingerprint: of the job; a file with another one cannot be resumed.

    Returns:
        The attributes; None if there is no file that can be resumed.
    """
    return _attributes(partial_of(path), fingerprint)


def _attributes(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """A shard's attributes; None where no file can be read, or it is another job's."""
    try:
        with h5py.File(path, "r") as file:
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


def finished_of(path: Path) -> Path:
    """The path of a finished shard whose job has other shards to finish.

    Args:
        path: of the finished shard.

    Returns:
        The same with `.finished` at its end.

    Examples:
        >>> finished_of(Path("shards/0.h5")).name
        '0.h5.finished'
    """
    return path.with_name(path.name + ".finished")


def is_finished(path: Path, fingerprint: str) -> bool:
    """Whether an earlier job has finished a shard and not given it its final name.

    Args:
        path: the shard's final file.
        fingerprint: of the job; a file with another one does not count.

    Returns:
        True where `finished_of` the path is such a file.
    """
    return _attributes(finished_of(path), fingerprint) is not None


def set_aside(path: Path) -> None:
    """Rename a finished shard, so that it stays where its job fails later.

    Args:
        path: the shard's final file.
    """
    path.replace(finished_of(path))
    file_format.sync(path.parent)


def name_finished(paths: list[Path]) -> None:
    """Give finished shards their final names, all at once.

    Args:
        paths: the final files.
    """
    for path in paths:
        finished_of(path).replace(path)
    for folder in {path.parent for path in paths}:
        file_format.sync(folder)
