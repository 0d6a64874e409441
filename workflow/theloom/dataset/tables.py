"""The tables of documents and windows of a file, checked against each other, and its metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from theloom.store.file_format import METRICS, are_offsets
from theloom.store.index import FileIndex
from theloom.store.tables import columns
from theloom.store.tables.columns import Column


@dataclass(frozen=True)
class Tables:
    """Where documents and windows begin, and what identifies them."""

    document_offset: np.ndarray  # (documents + 1,) int64
    document_id: np.ndarray  # (documents,) bytes
    window_offset: np.ndarray  # (windows + 1,) int64
    window_document: np.ndarray  # (windows,) int32, as numbered in the whole run
    window_hash: np.ndarray  # (windows, hook points) uint64


def read_tables(array: Callable[[str], np.ndarray], rows: int, hooks: int) -> Tables:
    """Read the tables of a file.

    Args:
        array: returns the content of a dataset by its name.
        rows: how many the file has.
        hooks: how many hook points it has.

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
        if not are_offsets(offset, count, rows):
            raise ValueError("its tables of documents and windows do not fit together")
    if tables.window_hash.shape != (windows, hooks):
        raise ValueError("its table of hashes does not fit its windows and hook points")
    return tables


def read_columns(
    array: Callable[[str], np.ndarray], listed: FileIndex, described: list[Any], documents: int
) -> dict[str, Column]:
    """Read the columns of the corpus that travel with a file's documents, by name.

    Args:
        array: returns the content of a dataset by its name.
        listed: the index of the file.
        described: its attribute `columns`.
        documents: how many it has.

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

    Raises:
        ValueError: one is missing, or is no number.
    """
    values = array("metrics")
    if values.shape != (len(METRICS),) or not np.isfinite(values).all():
        raise ValueError("its metrics are damaged")
    return dict(zip(METRICS, values.tolist(), strict=True))
