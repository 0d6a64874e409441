"""The files that hold a dataset's rows: each is checked before a byte of it is believed.

HDF5 reads a missing source, one that is cut short, or one that it has no file descriptor for, as
zeros. So nothing here is read through HDF5's virtual datasets: the merged file says where each
shard's bytes lie, and they are mapped.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom.errors import StoreError
from theloom.store import commit_log, file_format
from theloom.store.index import FileIndex

TOKENS = ("tokens/input_ids", "tokens/document", "tokens/position")


_AGAIN = "run the pipeline again, or fetch the file again"


@dataclass(frozen=True)
class Part:
    """Consecutive rows in one file: how many, and where each dataset's bytes begin; -1: packed, in
    chunks.
    """

    path: Path
    rows: int
    offsets: dict[str, int]


@dataclass(frozen=True)
class Source:
    """A shard that a virtual dataset refers to: its rows, its name from there, and what tells it
    from any other.
    """

    part: Part
    name: str
    size: int
    fingerprint: str
    checksums: list[int]
    checksums_offset: int


def names_of(attributes: dict[str, Any]) -> list[str]:
    """The datasets that have a row for each token: the token tables, then the hook points."""
    return [*TOKENS, *map(file_format.hook_path, json.loads(attributes["hooks"]))]


def own(fd: int, listed: FileIndex) -> Part:
    """An open file that holds its own rows, a shard or a physical merge: all of it there, and
    finished.

    Raises StoreError.
    """
    path, attributes = listed.path, listed.attributes
    rows, offsets, size = int(attributes["rows"]), {}, os.fstat(fd).st_size
    for name in names_of(attributes):
        dataset = listed.datasets[name]
        if dataset.shape[0] != rows:
            raise StoreError(
                f"{path}: its {name} has {dataset.shape[0]} rows instead of {rows}; {_AGAIN}"
            )
        if dataset.layout == h5py.h5d.CHUNKED and attributes.get("compression") == "zstd":
            offsets[name] = -1
        elif dataset.layout == h5py.h5d.CONTIGUOUS and (dataset.extents or 0 in dataset.shape):
            offsets[name] = dataset.extents[0][0] if dataset.extents else 0
        else:
            raise StoreError(f"{path}: its {name} is not laid out as theloom does it; {_AGAIN}")
        row = _row_bytes(name, dataset.shape, attributes["precision"])
        end = dataset.end if offsets[name] < 0 else offsets[name] + rows * row
        if size < end:
            raise StoreError(f"{path}: is cut short at {size} of {end} bytes; {_AGAIN}")
    if "commit_log" in listed.datasets:
        log = listed.array(fd, "commit_log")
        done = commit_log.committed(log)
        if done != len(log):
            raise StoreError(
                f"{path}: only {done} of its {len(log)} batches are committed; {_AGAIN}"
            )
    return Part(path, rows, offsets)


def referred(file: h5py.File, path: Path, allow: Collection[str]) -> list[Part]:
    """The shards of a virtual dataset: each there, of the size and the checksums that the merge saw.
    Raises StoreError.
    """
    names = names_of(dict(file.attrs))
    columns = ("file", "rows", "bytes", "checksums_offset")
    table = [file[f"sources/{column}"][:].tolist() for column in columns]
    checksum, offset = file["sources/checksums"][:], file["sources/byte_offset"][:]
    items = [_row_bytes(name, file[name].shape, file.attrs["precision"]) for name in names]
    ends = offset + np.array(table[1], "<i8")[:, None] * np.array(items, "<i8")
    beyond = ((offset < -1) | (ends > np.array(table[2], "<i8")[:, None])).any(axis=1)
    parts = []
    for number, (encoded, rows, size, checksums_offset) in enumerate(zip(*table, strict=True)):
        name = encoded.decode()
        check_reference(path, name, allow, "it refers to")
        shard = path.parent / name
        _check_referred(path, shard, size, checksums_offset, checksum[number].tobytes())
        if beyond[number]:
            raise StoreError(f"{path}: refers to bytes that {shard} does not have; {_AGAIN}")
        parts.append(Part(shard, rows, dict(zip(names, offset[number].tolist(), strict=True))))
    return parts


def _row_bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    """Bytes of a row of a token table or of a hook point."""
    return int(np.prod(shape[1:])) * (
        4 if name in TOKENS else file_format.bits_dtype(precision).itemsize
    )


def _check_referred(
    path: Path, shard: Path, size: int, checksums_offset: int, checksum: bytes
) -> None:
    """A shard is the one that the merge saw: by its size and its checksums, which go over all of it but
    the rows.
    """
    try:
        fd = os.open(
            shard, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe would wait for its writer
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise file_format.too_many_files(shard) from None
        what = (
            "is missing"
            if isinstance(error, FileNotFoundError)
            else f"cannot be opened ({error.strerror})"
        )
        raise StoreError(
            f"{path} refers to {shard}, which {what}; put it back, or run the pipeline again"
        ) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(
                f"{path} refers to {shard}, which is not a file; put it back, or run the pipeline again"
            )
        if found.st_size != size:
            raise StoreError(f"{shard}: has {found.st_size} bytes, {size} at the merge; {_AGAIN}")
        if os.pread(fd, len(checksum), checksums_offset) != checksum:
            raise StoreError(
                f"{shard}: is not the shard that {path.name} was merged from; {_AGAIN}"
            )
    finally:
        os.close(fd)


def write_sources(file: h5py.File, shards: Sequence[Source], names: Sequence[str]) -> None:
    """What `referred` checks, and where the rows are."""
    file["sources/file"] = file_format.fixed_strings([s.name for s in shards])
    file["sources/rows"] = [s.part.rows for s in shards]
    file["sources/bytes"] = [s.size for s in shards]
    file["sources/shard_fingerprint"] = file_format.fixed_strings([s.fingerprint for s in shards])
    file["sources/checksums"] = np.array([s.checksums for s in shards], "<u8")
    file["sources/checksums_offset"] = [s.checksums_offset for s in shards]
    file["sources/byte_offset"] = np.array(
        [[s.part.offsets[n] for n in names] for s in shards], "<i8"
    )


def check_references(file: h5py.File, path: Path, allow: Collection[str] = ()) -> None:
    """Look at every link and every dataset of an open file. Raises StoreError."""

    links: list[tuple[str, object]] = []
    items: list[tuple[str, object]] = []
    file.visititems_links(
        lambda name, link: links.append((name, link))
    )  # h5py cannot raise from within a visit
    for name, link in links:
        if isinstance(link, h5py.ExternalLink):
            check_reference(path, link.filename, allow, f"its {name} is a link to")
        if isinstance(link, h5py.SoftLink):
            raise StoreError(
                f"{path}: its {name} is a soft link, which no file of TheLoom has; do not use this file"
            )
    file.visititems(lambda name, item: items.append((name, item)))
    for name, item in items:
        if not isinstance(item, h5py.Dataset):
            continue
        properties = item.id.get_create_plist()
        for number in range(properties.get_external_count()):
            stored = properties.get_external(number)[0].decode(errors="replace")
            check_reference(path, stored, allow, f"its {name} is stored in")
        if properties.get_layout() == h5py.h5d.VIRTUAL:
            for number in range(properties.get_virtual_count()):
                source = properties.get_virtual_filename(number)
                check_reference(path, source, allow, f"its {name} refers to")


def check_reference(path: Path, source: str, allow: Collection[str], what: str) -> None:
    """That a name in a file leads to a file in its folder, or is allowed. Raises StoreError."""
    if source in allow:
        return
    if Path(source).is_absolute() or os.path.normpath(source).startswith(".."):
        raise StoreError(
            f"{path}: {what} {source}, which is outside of its folder; if you trust it: "
            f"theloom.open(..., allow=[{source!r}])"
        )


OTHER_OPEN_FILES = 100  # libraries, sockets, what else the process reads


def allow_open_files(files: int, what: str) -> None:
    """Let this process open so many files more. Raises StoreError where the hard limit is lower;
    `what` names them.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files + OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StoreError(
            f"{what} are {files} open files, and this process may have {hard}; raise the limit (ulimit -n), or "
            "make one file of them with store.merge=physical"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
