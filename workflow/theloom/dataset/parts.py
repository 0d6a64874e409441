"""The files that hold a dataset's rows; each is checked before it is read.

HDF5 reads a source that is missing, cut short, or one file descriptor too many, as zeros. So
nothing here is read through HDF5's virtual datasets: the merged file lists the offsets of each
shard's rows, and they are mapped.
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
_ADVICE = "run the pipeline again, or fetch the file again"


@dataclass(frozen=True)
class Part:
    """Consecutive rows in one file: how many, and the offset in bytes of each dataset; -1 where it
    is packed, in chunks.
    """

    path: Path
    rows: int
    offsets: dict[str, int]


@dataclass(frozen=True)
class Source:
    """A shard that a virtual dataset refers to: its rows, its relative path, and what identifies
    it.
    """

    part: Part
    name: str
    size: int
    fingerprint: str
    checksums: list[int]
    checksums_offset: int


def names_of(attributes: dict[str, Any]) -> list[str]:
    """Names of the datasets with a row for each token: the token tables, then the hook points."""
    return [*TOKENS, *map(file_format.hook_path, json.loads(attributes["hooks"]))]


def own(fd: int, listed: FileIndex) -> Part:
    """The part of a file that holds its own rows: a shard or a physical dataset.

    Args:
        fd: of the file, open for reading.
        listed: its index.

    Raises:
        StoreError: the file is cut short or not finished, or its layout is another one.
    """
    path, attributes = listed.path, listed.attributes
    rows, offsets, size = int(attributes["rows"]), {}, os.fstat(fd).st_size
    for name in names_of(attributes):
        dataset = listed.datasets[name]
        if dataset.shape[0] != rows:
            raise StoreError(
                f"{path}: its {name} has {dataset.shape[0]} rows instead of {rows}; {_ADVICE}"
            )
        if dataset.layout == h5py.h5d.CHUNKED and attributes.get("compression") == "zstd":
            offsets[name] = -1
        elif dataset.layout == h5py.h5d.CONTIGUOUS and (dataset.extents or 0 in dataset.shape):
            offsets[name] = dataset.extents[0][0] if dataset.extents else 0
        else:
            raise StoreError(
                f"{path}: its {name} has not the layout that TheLoom writes; {_ADVICE}"
            )
        row = _row_bytes(name, dataset.shape, attributes["precision"])
        end = dataset.end if offsets[name] < 0 else offsets[name] + rows * row
        if size < end:
            raise StoreError(f"{path}: is cut short at {size} of {end} bytes; {_ADVICE}")
    if "commit_log" in listed.datasets:
        log = listed.array(fd, "commit_log")
        done = commit_log.committed(log)
        if done != len(log):
            raise StoreError(
                f"{path}: only {done} of its {len(log)} batches are committed; {_ADVICE}"
            )
    return Part(path, rows, offsets)


def referred(file: h5py.File, path: Path, allow: Collection[str]) -> list[Part]:
    """The parts of a virtual dataset: its shards.

    Args:
        file: the open virtual dataset.
        path: of it.
        allow: names of shards outside of its folder that it may refer to, as it spells them.

    Raises:
        StoreError: a shard is missing, differs in size or checksums from the one that was merged,
            or is outside of the folder and not allowed.
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
            raise StoreError(f"{path}: refers to bytes that {shard} does not have; {_ADVICE}")
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
    """Check that a shard is the one that was merged, by its size and its checksums, which cover all
    of it but the rows.
    """
    try:
        # non-blocking: opening a pipe would wait for its writer
        fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(
                f"{path} refers to {shard}, which is not a file; put it back, "
                "or run the pipeline again"
            )
        if status.st_size != size:
            raise StoreError(f"{shard}: has {status.st_size} bytes, {size} at the merge; {_ADVICE}")
        if os.pread(fd, len(checksum), checksums_offset) != checksum:
            raise StoreError(
                f"{shard}: is not the shard that {path.name} was merged from; {_ADVICE}"
            )
    finally:
        os.close(fd)


def write_sources(file: h5py.File, shards: Sequence[Source], names: Sequence[str]) -> None:
    """Write the table of sources, which `referred` reads.

    Args:
        file: the open virtual dataset.
        shards: what it refers to.
        names: of the datasets with a row for each token, from `names_of`.
    """
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
    """Check where every link and every dataset of a file leads, since the file may be untrusted.

    Args:
        file: the open file.
        path: of it.
        allow: names outside of its folder that it may refer to, as it spells them.

    Raises:
        StoreError: something refers to a file outside of the folder that is not allowed, or is a
            soft link.
    """

    links: list[tuple[str, object]] = []
    items: list[tuple[str, object]] = []
    # collected first, since h5py cannot raise from within a visit
    file.visititems_links(lambda name, link: links.append((name, link)))
    for name, link in links:
        if isinstance(link, h5py.ExternalLink):
            check_reference(path, link.filename, allow, f"its {name} is a link to")
        if isinstance(link, h5py.SoftLink):
            raise StoreError(
                f"{path}: its {name} is a soft link, which no file of TheLoom has; "
                "do not use this file"
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
    """Check that a name in a file leads to a file in its folder, or is allowed.

    Args:
        path: the file.
        source: the name in it.
        allow: names that are allowed.
        what: the beginning of the message: what refers to the name.

    Raises:
        StoreError: the name leads elsewhere.
    """
    if source in allow:
        return
    if Path(source).is_absolute() or os.path.normpath(source).startswith(".."):
        raise StoreError(
            f"{path}: {what} {source}, which is outside of its folder; if you trust it: "
            f"theloom.open(..., allow=[{source!r}])"
        )


OTHER_OPEN_FILES = 100  # libraries, sockets and other files of the process


def allow_open_files(files: int, what: str) -> None:
    """Raise the limit of open files of this process, if necessary.

    Args:
        files: how many more will be open.
        what: they are, for the message.

    Raises:
        StoreError: the hard limit is lower.
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
            f"{what} are {files} open files, and this process may have {hard}; raise the limit "
            "(ulimit -n), or make one file of them with store.merge=physical"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
