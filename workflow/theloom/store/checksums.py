"""Checksums: hashes of all that a file holds next to the rows, so that any changed bit is detected.

Rows have a hash for each window and hook point. The rest of a file has four parts with a checksum
each: HDF5's own metadata with the attributes and the index; the tables that are written when the
file is laid out; the results, which are complete when it is finished; and the metrics of its job.
A checksum detects damage and mistakes; it does not keep out somebody who writes a new one.
"""

from pathlib import Path

import xxhash

from theloom.store import file_format, index
from theloom.store.hdf5 import byte_source
from theloom.store.hdf5.byte_source import Readable
from theloom.store.hdf5.objects import Objects
from theloom.store.index import FileIndex

CHECKSUMS = "checksums"  # the dataset: of metadata, tables, results and metrics, in this order
METADATA, TABLES, RESULTS, METRICS = ALL = range(4)
IDENTITY = 3  # of these tell one file from another: metrics differ where rows do not
_READ_AT_ONCE = 1 << 20  # bytes

_RESULTS = (
    "windows/hash",
    "windows/batch",
    "commit_log",
    "statistics/",
)  # written after the file was laid out

_NOT_CHECKSUMMED = ("hooks/", CHECKSUMS)  # rows have hashes of their own


def compute_checksums(fd: Readable, listed: FileIndex, *which: int) -> dict[int, int]:
    """Compute checksums of an open file as it is now.

    Args:
        fd: of the file, open for reading.
        listed: its index. Metadata is every byte that the index does not list.
        *which: METADATA, TABLES, RESULTS or METRICS.

    Returns:
        XXH3-64 digests by METADATA, TABLES, RESULTS or METRICS.
    """
    extents = sorted(
        (offset, size, name) for name, d in listed.datasets.items() for offset, size in d.extents
    )
    hashes = [xxhash.xxh3_64() for _ in ALL]
    at = 0
    for offset, size, name in [*extents, (byte_source.size_of(fd), 0, CHECKSUMS)]:
        if offset > at and METADATA in which:
            _update(hashes[METADATA], fd, at, offset)
        at = max(at, offset + size)
        part = RESULTS if name.startswith(_RESULTS) else METRICS if name == "metrics" else TABLES
        if part in which and not name.startswith(_NOT_CHECKSUMMED):
            _update(hashes[part], fd, offset, offset + size)
    return {number: hashes[number].intdigest() for number in which}


def _update(state: xxhash.xxh3_64, fd: Readable, start: int, stop: int) -> None:
    while start < stop:
        data = byte_source.pread(fd, min(_READ_AT_ONCE, stop - start), start)
        if not data:
            return  # the file ends early
        state.update(data)
        start += len(data)


def write_checksums(path: Path, *which: int) -> None:
    """Compute checksums of a closed file and write them into it.

    Args:
        path: the file. No HDF5 handle of it may be open, since HDF5 writes metadata when it closes.
        *which: METADATA, TABLES, RESULTS or METRICS.
    """
    with path.open("rb+") as f:
        listed = index.of(Objects(f.fileno()), path)
        offset, size = listed.datasets[CHECKSUMS].extents[0]
        for number, digest in compute_checksums(f.fileno(), listed, *which).items():
            if 8 * number < size:
                file_format.pwrite(f.fileno(), digest.to_bytes(8, "little"), offset + 8 * number)


def changed_parts(fd: Readable, listed: FileIndex, *which: int) -> list[str]:
    """Which parts of an open file differ from their checksums.

    Args:
        fd: of the file, open for reading.
        listed: its index.
        *which: the parts to check: METADATA, TABLES, RESULTS or METRICS.

    Returns:
        The names of the parts that differ, as error messages have them; empty if none does.
    """
    names = (
        "its metadata",
        "its tables of tokens, documents and windows",
        "its log, hashes or statistics",
        "its metrics",
    )
    written = listed.array(fd, CHECKSUMS).tolist()
    if len(written) < IDENTITY:
        raise ValueError("it lacks checksums")
    checked = [number for number in which if number < len(written)]
    computed = compute_checksums(fd, listed, *checked)
    return [names[number] for number in checked if computed[number] != written[number]]


def covers_metrics(listed: FileIndex) -> bool:
    """Whether a file has a checksum of its metrics; those of the first version have none.

    Args:
        listed: the index of the file.

    Returns:
        True where it has one.
    """
    return listed.datasets[CHECKSUMS].shape[0] > METRICS
