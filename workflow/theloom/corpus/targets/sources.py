"""The encoder's tokens of a run whose rows are the decoder's: read back from a file's columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.checks import SOURCE_IDS
from theloom.model.checkpoint.halves import SOURCE_IDS as IDS
from theloom.model.checkpoint.halves import SOURCE_MASK as MASK
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
    """Tokens of each document's source.

    Args:
        array: gives a dataset by its name; None where there is none.

    Returns:
        (documents,) int64; None where the run has no sources.
    """
    found = array(f"{GROUP}/{SOURCE_IDS}")
    return None if found is None else lengths_in(found[:])


class Sources:
    """The encoder's input for windows of a shard or a dataset.

    Args:
        columns: of the corpus, by name.
        window_document: number of each window's document within these columns, (windows,).
    """

    def __init__(self, columns: Mapping[str, Column], window_document: np.ndarray) -> None:
        self._column = columns.get(SOURCE_IDS)
        self._document = window_document

    alike = None  # windows of any lengths may share a pass

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each window's source, (windows,) int64; None where there are none."""
        return None if self._column is None else lengths_in(self._column.values)[self._document]

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
