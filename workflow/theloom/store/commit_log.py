"""The commit log of a shard: which batches are on disk, and the check that their rows are intact.

Each batch has a record, written after its rows are synced. The digest of a record covers the hashes
of everything that its batch and those before it have written, so that one record vouches for all
that precedes it. The unit that is hashed is a cell: one window of one hook point, numbered window
by window; `windows/batch` lists the batch of each cell.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash

from theloom.precision import read_as
from theloom.store.encoding.rows_at import RowsAt
from theloom.store.statistics import Statistics

# `checksum` is the hash of the other three, so that a record that a power cut tore is detected
RECORD = np.dtype([("batches", "<u8"), ("rows", "<u8"), ("digest", "<u8"), ("checksum", "<u8")])


def record(batches: int, rows: int, digest: int) -> np.ndarray:
    """One record of the log.

    Args:
        batches: how many batches are on disk with this one.
        rows: how many rows they have.
        digest: of all their hashes, from `chain`.

    Returns:
        A scalar of type RECORD.
    """
    result = np.zeros((), RECORD)
    result["batches"], result["rows"], result["digest"] = batches, rows, digest
    result["checksum"] = xxhash.xxh3_64_intdigest(result.tobytes()[:-8])
    return result


def is_valid(log_record: np.ndarray) -> bool:
    """Whether a record was written completely.

    Args:
        log_record: one record of the dtype `RECORD`.

    Returns:
        False for one that is empty, or whose checksum is another.

    Examples:
        >>> is_valid(record(batches=1, rows=10, digest=7)), is_valid(np.zeros((), RECORD))
        (True, False)
    """
    batches, rows, digest, checksum = log_record.tolist()
    return bool(batches) and checksum == int(record(batches, rows, digest)["checksum"])


def committed(log_records: np.ndarray) -> int:
    """How many batches a commit log vouches for.

    Args:
        log_records: the log of a finished or an unfinished file, (batches,) of type RECORD.

    Returns:
        The count of its last valid record; 0 if there is none.

    Examples:
        >>> committed(np.array([record(1, 10, 7), record(2, 20, 8), np.zeros((), RECORD)]))
        2
    """
    return next((int(r["batches"]) for r in log_records[::-1] if is_valid(r)), 0)


def chain(digest: int, cells: np.ndarray, hashes: np.ndarray) -> int:
    """The digest after one more batch.

    Args:
        digest: after the batch before; 0 at first.
        cells: of the batch, in ascending order, (cells,).
        hashes: of their rows, (cells,) uint64.

    Returns:
        XXH3-64 of the digest, the cells and the hashes.
    """
    state = xxhash.xxh3_64(digest.to_bytes(8, "little"))
    state.update(np.asarray(cells, "<u8").tobytes())
    state.update(np.ascontiguousarray(hashes, "<u8").tobytes())
    return state.intdigest()


def cells_by_batch(batch_of: np.ndarray, batches: int) -> list[np.ndarray]:
    """The cells of each batch.

    Args:
        batch_of: `windows/batch`, (windows, hook points): the batch of each cell, from 1; 0: none.
        batches: how many batches to return.

    Returns:
        For each batch its cells in ascending order.

    Examples:
        >>> [cells.tolist() for cells in cells_by_batch(np.array([[1], [2], [1]]), 2)]
        [[0, 2], [1]]
    """
    order = np.argsort(batch_of, axis=None, kind="stable")
    bounds = np.searchsorted(batch_of.reshape(-1)[order], np.arange(1, batches + 2))
    return [order[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]


def broken_records(records: np.ndarray, hashes: np.ndarray, batch_of: np.ndarray) -> list[int]:
    """Batches of a finished file whose records are torn, or vouch for other hashes than it has.

    Args:
        records: its log, (batches,) of type RECORD.
        hashes: `windows/hash`, (windows, hook points).
        batch_of: `windows/batch`, (windows, hook points).

    Returns:
        The numbers of the batches, from 1.
    """
    hashes = hashes.reshape(-1)
    digest, wrong = 0, []
    for number, cells in enumerate(cells_by_batch(batch_of, len(records)), start=1):
        written = records[number - 1].astype(RECORD)
        digest = chain(digest, cells, hashes[cells])
        if not _states(written, number, digest):
            wrong.append(number)
    return wrong


def _states(written: np.ndarray, batches: int, digest: int) -> bool:
    """Whether a record is valid, and has this number of batches and this digest."""
    return (
        is_valid(written)
        and int(written["batches"]) == batches
        and int(written["digest"]) == digest
    )


@dataclass(frozen=True)
class Verified:
    """How much of an unfinished file is intact."""

    batches: int  # that are intact, from the first on
    vouched: int  # that the log claims
    digest: int  # of the last intact one


def verify_committed(
    path: Path,
    row_offset: np.ndarray,
    hooks: Mapping[str, RowsAt],
    into: Mapping[str, Statistics],
) -> Verified:
    """Read what an unfinished file has committed, batch by batch, up to the first damaged one.

    The statistics are computed from the rows again, since a file has none before it is finished.

    Args:
        path: the unfinished file.
        row_offset: first stored row of each window, (windows + 1,).
        hooks: where the rows of each hook point lie, in the order of the file.
        into: statistics by hook point, to which the rows of intact batches are added.

    Returns:
        The batches and rows that are intact, and their digest.
    """
    with h5py.File(path, "r") as file:
        records, hashes, batch_of = (
            file["commit_log"][:],
            file["windows/hash"][:].reshape(-1),
            file["windows/batch"][:],
        )
    places = list(hooks.items())
    vouched, digest = committed(records), 0
    with path.open("rb") as f:
        for batch, cells in enumerate(cells_by_batch(batch_of, vouched), start=1):
            after = chain(digest, cells, hashes[cells])
            if not _states(records[batch - 1], batch, after):
                return Verified(batch - 1, vouched, digest)
            parts = []  # statistics take a batch only when all of its cells are intact
            for cell in cells.tolist():
                window, number = divmod(cell, len(places))
                part = (f.fileno(), *(int(r) for r in row_offset[window : window + 2]))
                hook, rows = places[number]
                state = xxhash.xxh3_64()
                for data in rows.hashed(*part):
                    state.update(data)
                if state.intdigest() != hashes[cell]:
                    return Verified(batch - 1, vouched, digest)
                parts.append((hook, rows, part))
            for hook, rows, part in parts:
                for tile in rows.tiles(*part):
                    into[hook].add(tile, read_as(rows.precision))
            digest = after
    return Verified(vouched, vouched, digest)
