"""Seals: hashes of all that a file holds beside the rows, so that a change of any bit of it is found.

Rows have a hash for each window and hook point. The rest of a file falls into three parts with a seal each: HDF5's own
metadata and the attributes; the tables that are written when the file is laid out; and what is known when it is
finished. A seal finds damage and mistakes; it does not keep out somebody who writes a new one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import xxhash

from theloom import layout

SEAL = "seal"  # of metadata, of tables, of results: in this order
METADATA, TABLES, RESULTS = range(3)
_READ_AT_ONCE = 1 << 20
# written after the file was laid out; rows, and the seals themselves, are in none of the three
_RESULTS = ("windows/hash", "windows/batch", "commit_log", "statistics/")
_UNSEALED = ("hooks/", "figures", SEAL)

Extent = tuple[str, int, int]


def of(file: h5py.File, *which: int) -> dict[int, int]:
    """These seals of an open file, as it is."""
    extents = sorted(_extents(file), key=lambda e: e[1])
    hashes = [xxhash.xxh3_64() for _ in range(3)]
    with Path(file.filename).open("rb") as f:
        fd, at = f.fileno(), 0
        for name, place, size in [*extents, ("", os.fstat(fd).st_size, 0)]:
            if place > at and METADATA in which:
                _update(hashes[METADATA], fd, at, place)
            at = max(at, place + size)
            part = RESULTS if name.startswith(_RESULTS) else TABLES
            if part in which and not name.startswith(_UNSEALED):
                _update(hashes[part], fd, place, place + size)
    return {number: hashes[number].intdigest() for number in which}


def _update(state: xxhash.xxh3_64, fd: int, start: int, stop: int) -> None:
    while start < stop:
        data = os.pread(fd, min(_READ_AT_ONCE, stop - start), start)
        if not data:
            return  # the file ends early
        state.update(data)
        start += len(data)


def write(path: Path, *which: int) -> None:
    """Write these seals of a closed file into it."""
    with h5py.File(path, "r") as file:
        found, place = of(file, *which), layout.byte_offset(file[SEAL])
    with path.open("rb+") as f:
        for number in which:
            layout.pwrite(f.fileno(), found[number].to_bytes(8, "little"), place + 8 * number)


def broken(file: h5py.File, *which: int) -> list[str]:
    """Which parts of an open file are not as they were sealed, in words."""
    words = ("its metadata", "its tables of tokens, documents and windows", "its log, hashes or statistics")
    found, written = of(file, *which), file[SEAL][:].tolist()
    return [words[number] for number in which if found[number] != written[number]]


def _extents(file: h5py.File) -> Iterator[Extent]:
    """Name, place and bytes of all that lies outside of HDF5's metadata."""
    datasets: list[tuple[str, h5py.h5d.DatasetID]] = []
    file.visititems(lambda name, item: datasets.append((name, item.id)) if isinstance(item, h5py.Dataset) else None)
    for name, dataset in datasets:
        kind = dataset.get_create_plist().get_layout()
        if kind == h5py.h5d.CHUNKED:
            chunks: list[Extent] = []
            dataset.chunk_iter(lambda chunk, n=name, into=chunks: into.append((n, chunk.byte_offset, chunk.size)))
            yield from chunks
        elif kind == h5py.h5d.CONTIGUOUS and (place := dataset.get_offset()):
            yield name, place, dataset.get_storage_size()
