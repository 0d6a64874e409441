"""The layout of one shard's file: what it will hold, all of its metadata and tables, and room for
its rows.

Everything is laid out before the first row is computed. HDF5 keeps its metadata in caches and
writes it in an order of its own, so a process that is killed while HDF5 writes can leave a file
that no program opens. After `create`, the writer needs HDF5 no more: it writes bytes at offsets
that are known.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom.hooks.points import HookPoint
from theloom.precision import SCALED, row_bytes
from theloom.store import checksums, file_format, index, statistics, token_texts
from theloom.store.commit_log import RECORD
from theloom.store.encoding import scaled
from theloom.store.encoding.rows_at import RowsAt
from theloom.store.file_format import METRICS, hook_path, scale_path
from theloom.store.hdf5 import element_types
from theloom.store.hdf5.output import written
from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column

_OF_DOCUMENTS = ("document_offset", "document_id", "window_offset", "window_document")


def bytes_of_window(hooks: int) -> int:
    """What a file has for a window beside its place: by hook point a hash and a batch.

    Args:
        hooks: hook points of the file.

    Returns:
        Bytes.

    Examples:
        >>> bytes_of_window(hooks=3)
        36
    """
    return hooks * (8 + 4)


@dataclass(frozen=True)
class ShardTokens:
    """The tokens and tables of one shard. Offsets are tokens of the shard; document numbers are
    those of the corpus. `special` to `kept` are tables of `store.tables.tokens`; None: unknown.

    Where not every token has a row of its own, `row_token` has the token of each stored row (the
    last one of those that a pooled row is made of), and `kept` whether a token is part of any.
    """

    first_row: int  # in the merged dataset
    input_ids: np.ndarray  # (tokens,) int32; of codes (tokens, codebooks)
    document: np.ndarray  # (tokens,) int32
    position: np.ndarray  # (tokens,) int32
    document_offset: np.ndarray  # (documents + 1,) int64
    document_id: np.ndarray  # (documents,) bytes
    window_offset: np.ndarray  # (windows + 1,) int64
    window_document: np.ndarray  # (windows,) int32
    texts: Mapping[int, str] = field(default_factory=dict)  # of each token id that occurs
    special: np.ndarray | None = None
    role: np.ndarray | None = None
    message: np.ndarray | None = None
    char_start: np.ndarray | None = None
    char_end: np.ndarray | None = None
    generated: np.ndarray | None = None
    kept: np.ndarray | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)  # of the documents, in order
    row_token: np.ndarray | None = None  # (rows,) int64

    @property
    def rows(self) -> int:
        """How many rows are stored."""
        return len(self.input_ids if self.row_token is None else self.row_token)

    @cached_property
    def row_offset(self) -> np.ndarray:
        """First stored row of each window, then the number of rows, (windows + 1,) int64."""
        if self.row_token is None:
            return self.window_offset
        return np.searchsorted(self.row_token, self.window_offset)


@dataclass(frozen=True)
class ShardSpec:
    """What a shard will hold: its tokens, its hook points, the precision on disk, the attributes
    of the file.

    `keys`: the tokens of the longest window of all shards, the last axis of attention's rows.
    `fingerprint`: identifies config, tokens and model; a `.partial` file with another one is not
    resumed. `max_overflow`: the share of a hook point's fp16 values that may be infinite.
    `allow_nonfinite`: values that the model gives as NaN or infinite are kept.
    """

    tokens: ShardTokens
    points: list[HookPoint]
    keys: int
    precision: str
    batches: int  # units of work that are committed: batches, or layer by layer (block, batch)
    fingerprint: str
    attributes: Mapping[str, Any]
    compression: str = "none"
    max_overflow: float = 0.0
    allow_nonfinite: bool = False

    @property
    def rows(self) -> int:
        """Stored rows of the shard."""
        return self.tokens.rows

    @property
    def windows(self) -> int:
        """Windows of the shard."""
        return len(self.tokens.window_document)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of the tables beside them: what the file takes, but for some KB."""
        tokens, names = self.tokens, ("input_ids", "document", "position", *token_tables.TYPES)
        tables = [getattr(tokens, name) for name in (*names, "row_token", *_OF_DOCUMENTS)]
        tables += [a for c in tokens.columns.values() for a in (c.values, c.names, c.null)]
        texts = sum(12 + len(text.encode(errors="replace")) for text in tokens.texts.values())
        elements = sum(p.width(self.keys) for p in self.points)
        return (
            self.rows * sum(self.row_bytes().values())
            + sum(table.nbytes for table in tables if table is not None)
            + texts
            + self.windows * bytes_of_window(len(self.points))
            + self.batches * RECORD.itemsize
            + elements * statistics.bytes_of_element()
        )

    def row_bytes(self) -> dict[str, int]:
        """The size of a row of each hook point, with its scale where it has one.

        Returns:
            Bytes by hook point, in the order of the file.
        """
        return {p.name: row_bytes(self.precision, p.width(self.keys)) for p in self.points}


def create(path: Path, spec: ShardSpec) -> None:
    """Lay out a shard's file with room for all rows; `path` exists only once all of it is on disk.

    Args:
        path: the unfinished file; one that is there is replaced.
        spec: what the shard will hold.

    Raises:
        OSError: the disk is full, or cannot be written.
        RuntimeError: the same, where HDF5 noticed it only when it closed the file.
    """
    new = path.with_name(path.name + ".new")
    for old in (new, path):
        old.unlink(missing_ok=True)
    try:
        with written(new) as file:
            _lay_out(file, spec)
            end = max(_ends(file, spec), default=0)
        with new.open("rb+") as f:
            # a full disk is an error now, not after hours of computing
            os.posix_fallocate(f.fileno(), 0, max(end, 1))
        checksums.write_checksums(new, checksums.METADATA, checksums.TABLES)
    except (OSError, RuntimeError):
        new.unlink(missing_ok=True)
        raise
    # synced before it is renamed, and the folder after: a power cut leaves a whole file or none
    file_format.sync(new)
    new.replace(path)
    file_format.sync(path.parent)


def rows_at(file: h5py.File, spec: ShardSpec) -> dict[str, RowsAt]:
    """Find where the rows lie.

    Args:
        file: an open file that `create` laid out.
        spec: what it holds.

    Returns:
        By name of hook point, in the order of the file.
    """
    has_scales = spec.precision in SCALED
    return {
        p.name: RowsAt(
            spec.precision,
            p.width(spec.keys),
            file_format.byte_offset(file[hook_path(p.name)]),
            file_format.byte_offset(file[scale_path(p.name)]) if has_scales else None,
        )
        for p in spec.points
    }


def byte_offsets(file: h5py.File) -> dict[str, int]:
    """The offset in bytes of everything but rows that is written after the layout.

    Args:
        file: an open file that `create` laid out.

    Returns:
        By name of the dataset (`windows/hash`, `commit_log`, …).
    """
    names = [
        "windows/hash",
        "windows/batch",
        "commit_log",
        "metrics",
        *map("statistics/{}".format, file["statistics"]),
    ]
    return {name: file_format.byte_offset(file[name]) for name in names}


def _lay_out(file: h5py.File, spec: ShardSpec) -> None:
    """All metadata and all tables; rows, hashes, log and statistics are zeros or room so far."""
    tokens = spec.tokens
    names = [p.name for p in spec.points]
    of_shard = {"shard_fingerprint": spec.fingerprint, "rows": spec.rows, "hooks": names}
    of_shard["columns"] = columns.described(tokens.columns)
    if tokens.row_token is not None:
        of_shard["tokens"] = len(tokens.input_ids)
    file_format.set_attributes(file, {**spec.attributes, **of_shard})
    for name in ("input_ids", "document", "position", *token_tables.TYPES):
        if (table := getattr(tokens, name)) is not None:
            file[token_tables.path(name)] = table
    if tokens.row_token is not None:
        file[token_tables.ROW_TOKEN] = tokens.row_token
    columns.write(file, tokens.columns)
    file["documents/offset"] = tokens.document_offset
    file["documents/id"] = tokens.document_id
    file["windows/offset"] = tokens.window_offset
    file["windows/document"] = tokens.window_document
    token_texts.write(file, tokens.texts)
    file["windows/hash"] = np.zeros((spec.windows, len(names)), "<u8")
    file["windows/batch"] = np.zeros((spec.windows, len(names)), "<u4")
    file["commit_log"] = np.zeros(spec.batches, RECORD)
    file["metrics"] = np.zeros(len(METRICS))
    file[checksums.CHECKSUMS] = np.zeros(len(checksums.ALL), "<u8")
    statistics.create_statistics(file, [p.width(spec.keys) for p in spec.points])
    for point in spec.points:
        shape = (spec.rows, *point.row(spec.keys))
        # contiguous: a row's offset is arithmetic, so rows are written in any order without HDF5,
        # and a reader maps them
        rows = file_format.create_contiguous(
            file, hook_path(point.name), shape, element_types.hdf5_type(spec.precision)
        )
        if spec.precision in SCALED:
            scaled.describe(rows, spec.precision)
            file_format.create_contiguous(
                file, scale_path(point.name), shape[:1], element_types.hdf5_type("fp32")
            )
    index.write_index(file)


def _ends(file: h5py.File, spec: ShardSpec) -> list[int]:
    return [
        offset + size * spec.rows
        for rows in rows_at(file, spec).values()
        for offset, size in rows.places
        if size * spec.rows
    ]
