"""The commit log of a shard: which batches are on disk, and the check that they are what was
written.

Each batch has a record, written after its rows are synced. Its digest goes over the hashes of all
that its batch and those before have written, so that a record vouches for the whole of what lies
before it. What is hashed is a cell: one window of one hook point, numbered window by window;
`windows/batch` says in which batch each of them came.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash

from theloom.store import file_format
from theloom.store.statistics import Statistics, tile_rows

_TILES_AT_ONCE = 4

# `checksum` is the hash of the other three, so that a torn record is seen
RECORD = np.dtype([("batches", "<u8"), ("rows", "<u8"), ("digest", "<u8"), ("checksum", "<u8")])


def record(batches: int, rows: int, digest: int) -> np.ndarray:
    """One record: what a batch's end vouches for."""
    found = np.zeros((), RECORD)
    found["batches"], found["rows"], found["digest"] = batches, rows, digest
    found["checksum"] = xxhash.xxh3_64_intdigest(found.tobytes()[:-8])
    return found


def is_valid(found: np.ndarray) -> bool:
    """Whether a record is whole."""
    batches, rows, digest, check = found.tolist()
    return bool(batches) and check == int(record(batches, rows, digest)["checksum"])


def committed(log_records: np.ndarray) -> int:
    """Batches that the commit log of an unfinished or finished file vouches for."""
    return next((int(r["batches"]) for r in log_records[::-1] if is_valid(r)), 0)


def chain(digest: int, cells: np.ndarray, hashes: np.ndarray) -> int:
    """The digest after one more batch: its cells in ascending order, and their hashes."""
    state = xxhash.xxh3_64(digest.to_bytes(8, "little"))
    state.update(np.asarray(cells, "<u8").tobytes())
    state.update(np.ascontiguousarray(hashes, "<u8").tobytes())
    return state.intdigest()


def cells_by_batch(batch_of: np.ndarray, batches: int) -> list[np.ndarray]:
    """The cells of each batch, in ascending order, from `windows/batch`."""
    order = np.argsort(batch_of, axis=None, kind="stable")
    bounds = np.searchsorted(batch_of.reshape(-1)[order], np.arange(1, batches + 2))
    return [order[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]


def broken_records(file: h5py.File) -> list[int]:
    """Batches of a finished file whose records are torn, or vouch for other hashes than the file
    has.
    """
    records, hashes, batch_of = (
        file["commit_log"][:],
        file["windows/hash"][:].reshape(-1),
        file["windows/batch"][:],
    )
    digest, wrong = 0, []
    for number, cells in enumerate(cells_by_batch(batch_of, len(records)), start=1):
        found = records[number - 1].astype(RECORD)
        digest = chain(digest, cells, hashes[cells])
        if not is_valid(found) or int(found["batches"]) != number or int(found["digest"]) != digest:
            wrong.append(number)
    return wrong


@dataclass(frozen=True)
class Verified:
    """What of an unfinished file is as it was written: so many batches, and the digest of the last
    of them.
    """

    batches: int
    vouched: int  # batches that the log claims
    digest: int


def recheck(
    path: Path,
    window_offset: np.ndarray,
    row_bytes: Mapping[str, int],
    precision: str,
    into: Mapping[str, Statistics],
) -> Verified:
    """Read all that an unfinished file has committed, in the order of its batches, up to the first
    that is not right.

    Adds the rows that are right to the statistics by hook point.
    """
    with h5py.File(path, "r") as file:
        records, hashes, batch_of = (
            file["commit_log"][:],
            file["windows/hash"][:].reshape(-1),
            file["windows/batch"][:],
        )
        offsets = [file_format.byte_offset(file[f"hooks/{hook}/activations"]) for hook in row_bytes]
    hooks = list(row_bytes.items())
    vouched, digest = committed(records), 0
    with path.open("rb") as f:
        for batch, cells in enumerate(cells_by_batch(batch_of, vouched), start=1):
            after = chain(digest, cells, hashes[cells])
            found = records[batch - 1]
            if (
                not is_valid(found)
                or int(found["batches"]) != batch
                or int(found["digest"]) != after
            ):
                return Verified(batch - 1, vouched, digest)
            parts = []
            for cell in cells.tolist():
                window, number = divmod(cell, len(hooks))
                begin, end = (int(r) for r in window_offset[window : window + 2])
                hook, size = hooks[number]
                state, part = (
                    xxhash.xxh3_64(),
                    (f.fileno(), offsets[number] + begin * size, end - begin, size),
                )
                for data in tiles(*part, precision):
                    state.update(data.data)
                if state.intdigest() != hashes[cell]:
                    return Verified(batch - 1, vouched, digest)
                parts.append((hook, part))
            for hook, part in parts:
                for data in tiles(*part, precision):
                    into[hook].add(data, precision)
            digest = after
    return Verified(vouched, vouched, digest)


def tiles(fd: int, offset: int, rows: int, row_bytes: int, precision: str) -> Iterator[np.ndarray]:
    """Consecutive rows of a file as bits, (rows, elements), a few tiles of the statistics at a
    time.

    Where the tiles begin depends on the rows alone, so that statistics do not tell how often a job
    was interrupted.
    """
    dtype = file_format.bits_dtype(precision)
    step = tile_rows(row_bytes // dtype.itemsize) * _TILES_AT_ONCE
    for start in range(0, rows, step):
        count = min(step, rows - start)
        data = os.pread(fd, count * row_bytes, offset + start * row_bytes)
        yield np.frombuffer(data, dtype).reshape(count, -1)
