"""Datasets that are written piece by piece, so that memory holds one piece of them."""

from collections.abc import Iterator

import h5py
import numpy as np


def write_array(
    file: h5py.Group, name: str, count: int, dtype: np.dtype, pieces: Iterator[np.ndarray]
) -> None:
    """Write a dataset piece by piece.

    Args:
        file: the open file, or a group of it.
        name: of the dataset.
        count: its entries.
        dtype: of them.
        pieces: arrays with all of them, one after the other.
    """
    dataset, at = file.create_dataset(name, (count,), dtype), 0
    for piece in pieces:
        dataset[at : at + len(piece)] = piece
        at += len(piece)
    assert at == count, f"{name}: {at} of {count} entries"
