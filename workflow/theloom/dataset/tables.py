"""The tables of documents and windows of a file, checked against each other, and its metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from theloom.rows.pooling import ADDED_UP
from theloom.store.file_format import METRICS, are_offsets
from theloom.store.index import FileIndex
from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column


@dataclass(frozen=True)
class Tables:
    """Where documents and windows begin, and what identifies them."""

    document_offset: np.ndarray  # (documents + 1,) int64
    document_id: np.ndarray  # (documents,) bytes
    window_offset: np.ndarray  # (windows + 1,) int64
    window_document: np.ndarray  # (windows,) int32, as numbered in the whole run
    window_hash: np.ndarray  # (windows, hook points) uint64


def read_tables(array: Callable[[str], np.ndarray], tokens: int, hooks: int) -> Tables:
    """Read the tables of a file.

    Args:
        array: returns the content of a dataset by its name.
        tokens: how many the file has.
        hooks: how many hook points it has.

    Returns:
        The tables, checked against each other.

    Raises:
        ValueError: the tables do not fit together.
    """
    tables = Tables(
        array("documents/offset"),
        array("documents/id"),
        array("windows/offset"),
        array("windows/document"),
        array("windows/hash"),
    )
    windows = len(tables.window_document)
    for offset, count in (
        (tables.document_offset, len(tables.document_id)),
        (tables.window_offset, windows),
    ):
        if not are_offsets(offset, count, tokens):
            raise ValueError("its tables of documents and windows do not fit together")
    if tables.window_hash.shape != (windows, hooks):
        raise ValueError("its table of hashes does not fit its windows and hook points")
    return tables


def read_row_tokens(
    array: Callable[[str], np.ndarray],
    pieces: Callable[[str], Iterator[np.ndarray]],
    attributes: Mapping[str, Any],
) -> np.ndarray | None:
    """Read the token of each stored row; None where every token has a row of its own.

    Args:
        array: returns the content of a dataset by its name.
        pieces: gives it piece after piece.
        attributes: of the file.

    Returns:
        The number of each row's token in the file, ascending, (rows,) int64; None where every token
        has a row.

    Raises:
        ValueError: the table does not fit the tokens and rows of the file.
    """
    if "tokens" not in attributes:
        return None
    found = array(token_tables.ROW_TOKEN)
    rows, tokens = attributes["rows"], attributes["tokens"]
    first, last = (int(found[n]) if len(found) else -1 for n in (0, -1))
    sound = found.shape == (rows,) and (found[1:] > found[:-1]).all()
    if not sound or (rows and not 0 <= first <= last < tokens):
        raise ValueError("its table of stored rows does not fit its tokens")
    at = kept_tokens = 0
    for kept in pieces(token_tables.path("kept")):
        here = found[slice(*np.searchsorted(found, [at, at + len(kept)]))] - at
        if not kept[here].all() or kept[max(0, last + 1 - at) :].any():
            raise ValueError("its stored rows are not those of its kept tokens")
        kept_tokens += int(np.count_nonzero(kept))
        at += len(kept)
    if at != tokens:
        raise ValueError("its table of stored rows does not fit its tokens")
    if attributes.get("rows_pool") not in ADDED_UP and kept_tokens != rows:
        raise ValueError("its stored rows are not those of its kept tokens")
    return found


def read_columns(
    array: Callable[[str], np.ndarray], listed: FileIndex, described: list[Any], documents: int
) -> dict[str, Column]:
    """Read the columns of the corpus that travel with a file's documents, by name.

    Args:
        array: returns the content of a dataset by its name.
        listed: the index of the file.
        described: its attribute `columns`.
        documents: how many it has.

    Returns:
        The columns by name, with a value for each document.

    Raises:
        ValueError: a column is damaged.
    """
    return columns.read(
        lambda name: array(name) if name in listed.datasets else None, described, documents
    )


def read_metrics(array: Callable[[str], np.ndarray]) -> dict[str, float]:
    """Read the metrics of a file, by name.

    Args:
        array: returns the content of a dataset by its name.

    Returns:
        Values by name, in the units of `METRICS`.

    Raises:
        ValueError: one is missing, or is no number.
    """
    values = array("metrics")
    if values.shape != (len(METRICS),) or not np.isfinite(values).all():
        raise ValueError("its metrics are damaged")
    return dict(zip(METRICS, values.tolist(), strict=True))
