"""Checksums: hashes of all that a file holds beside the rows, so that a change of any bit of it is
found.

Rows have a hash for each window and hook point. The rest of a file falls into three parts with a
checksum each: HDF5's own metadata, the attributes and the directory; the tables that are written when
the file is laid out; and what is known when it is finished. A checksum finds damage and mistakes; it
does not keep out somebody who writes a new one.
"""

import os
from pathlib import Path

import h5py
import xxhash

from theloom.store import file_format, index
from theloom.store.index import FileIndex

CHECKSUMS = "checksums"  # of metadata, of tables, of results: in this order


METADATA, TABLES, RESULTS = range(3)


_READ_AT_ONCE = 1 << 20


# written after the file was laid out; rows, and the checksums themselves, are in none of the three
_RESULTS = ("windows/hash", "windows/batch", "commit_log", "statistics/")


_NOT_CHECKSUMMED = ("hooks/", "metrics", CHECKSUMS)


def compute_checksums(fd: int, listed: FileIndex, *which: int) -> dict[int, int]:
    """These checksums of an open file, as it is. Metadata is all that the directory does not list,
    itself included.
    """
    extents = sorted(
        (offset, size, name) for name, d in listed.datasets.items() for offset, size in d.extents
    )
    hashes = [xxhash.xxh3_64() for _ in range(3)]
    at = 0
    for offset, size, name in [*extents, (os.fstat(fd).st_size, 0, CHECKSUMS)]:
        if offset > at and METADATA in which:
            _update(hashes[METADATA], fd, at, offset)
        at = max(at, offset + size)
        part = RESULTS if name.startswith(_RESULTS) else TABLES
        if part in which and not name.startswith(_NOT_CHECKSUMMED):
            _update(hashes[part], fd, offset, offset + size)
    return {number: hashes[number].intdigest() for number in which}


def _update(state: xxhash.xxh3_64, fd: int, start: int, stop: int) -> None:
    while start < stop:
        data = os.pread(fd, min(_READ_AT_ONCE, stop - start), start)
        if not data:
            return  # the file ends early
        state.update(data)
        start += len(data)


def write_checksums(path: Path, *which: int) -> None:
    """Write these checksums of a closed file into it."""
    with h5py.File(path, "r") as file:
        listed = index.read(file)
    with path.open("rb+") as f:
        offset = listed.datasets[CHECKSUMS].extents[0][0]
        for number, found in compute_checksums(f.fileno(), listed, *which).items():
            file_format.pwrite(f.fileno(), found.to_bytes(8, "little"), offset + 8 * number)


def broken_checksums(fd: int, listed: FileIndex, *which: int) -> list[str]:
    """Which parts of an open file are not as they were checksummed, in words."""
    words = (
        "its metadata",
        "its tables of tokens, documents and windows",
        "its log, hashes or statistics",
    )
    found, written = compute_checksums(fd, listed, *which), listed.array(fd, CHECKSUMS).tolist()
    return [words[number] for number in which if found[number] != written[number]]
