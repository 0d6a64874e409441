"""The encoder's tokens of a run whose rows are the decoder's: read back from a file's columns. Of
an encoder of audio the rows alone are there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.checks import SOURCE_IDS
from theloom.model.checkpoint.halves import SOURCE_IDS as IDS
from theloom.model.checkpoint.halves import SOURCE_MASK as MASK
from theloom.rows.modality import INPUT_FILE, SOURCE_ROWS
from theloom.store.tables.columns import GROUP, Column

if TYPE_CHECKING:
    import torch


def lengths_in(values: np.ndarray) -> np.ndarray:
    """Count the token ids of lists that are written as JSON.

    Args:
        values: (documents,) bytes, none of an empty list.

    Returns:
        (documents,) int64.

    Examples:
        >>> lengths_in(np.array([b"[5]", b"[7,1,300]"])).tolist()
        [1, 3]
    """
    return np.char.count(values, b",").astype("<i8") + 1


def source_lengths(array: Callable[[str], Any]) -> np.ndarray | None:
    """Tokens of each document's source, or rows that an encoder of audio makes of it.

    Args:
        array: gives a dataset by its name; None where there is none.

    Returns:
        (documents,) int64; None where the run has no sources.
    """
    rows, file = (array(f"{GROUP}/{name}") for name in (SOURCE_ROWS, INPUT_FILE))
    if rows is not None and file is not None:
        return np.asarray(rows[:], "<i8")
    found = array(f"{GROUP}/{SOURCE_IDS}")
    return None if found is None else lengths_in(found[:])


def heard(columns: Mapping[str, Column]) -> bool:
    """Whether rows are those of a decoder behind an encoder of audio.

    Args:
        columns: of the corpus, by name.

    Returns:
        By the columns that such a run writes; a corpus of texts may have one of the first name.
    """
    return SOURCE_ROWS in columns and INPUT_FILE in columns


def lengths_of(columns: Mapping[str, Column], window_document: np.ndarray) -> np.ndarray | None:
    """Tokens of each window's source, or rows that an encoder of audio makes of it.

    Args:
        columns: of the corpus, by name.
        window_document: number of each window's document within these columns, (windows,).

    Returns:
        (windows,) int64; None where the run has no sources.
    """
    if heard(columns):
        return columns[SOURCE_ROWS].values[window_document]
    if SOURCE_IDS not in columns:
        return None
    return lengths_in(columns[SOURCE_IDS].values)[window_document]


class Sources:
    """The encoder's input for windows of a shard or a dataset.

    Args:
        columns: of the corpus, by name.
        window_document: number of each window's document within these columns, (windows,).
    """

    def __init__(self, columns: Mapping[str, Column], window_document: np.ndarray) -> None:
        self._columns, self._column = columns, columns.get(SOURCE_IDS)
        self._document = window_document

    alike = None  # windows of any lengths may share a pass

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each window's source, (windows,) int64; None where there are none."""
        return lengths_of(self._columns, self._document)

    def of(self, windows: Sequence[int]) -> "dict[str, torch.Tensor]":
        """The encoder's input for some windows.

        Args:
            windows: their numbers, in the order of a batch.

        Returns:
            `source_ids` and `source_mask`, (windows, longest source) int64, padded on the right
            with 0; empty where there are none.
        """
        import torch

        if self._column is None:
            return {}
        documents = [int(self._document[w]) for w in windows]
        lists = self._column.part(np.array(documents)).tolist()
        ids = np.zeros((len(lists), max(map(len, lists))), "<i8")
        mask = np.zeros_like(ids)
        for row, found in enumerate(lists):
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        return {IDS: torch.from_numpy(ids), MASK: torch.from_numpy(mask)}
