"""What `tokens.h5` has of each token, as it is written, and the hash of its tables."""

import math
from collections.abc import Mapping

import h5py
import numpy as np
import xxhash

from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables

_BUFFERED = token_tables.CHUNK  # tokens that are written together
_HASHED = 1 << 20  # bytes that are hashed together


class Growing:
    """The datasets with an entry for each token, which grow by what is added."""

    def __init__(self, file: h5py.File) -> None:
        self._file, self._total, self._waiting = file, 0, 0
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, tables: Mapping[str, np.ndarray]) -> None:
        """Take the tables of a document.

        Args:
            tables: by name, each (tokens,), or with one more dimension, which is stored too;
                `input_ids` among them.
        """
        for name, values in tables.items():
            self._parts.setdefault(name, []).append(values)
        self._waiting += len(tables["input_ids"])
        if self._waiting >= _BUFFERED:
            self.write()

    def write(self) -> None:
        """Write what was added since the last time."""
        for name, parts in self._parts.items():
            path, kind = token_tables.path(name), token_tables.TYPES.get(name, "<i4")
            if path not in self._file:
                width = parts[0].shape[1:]  # of codes
                chunks = (_BUFFERED // math.prod(width), *width)
                self._file.create_dataset(
                    path, (0, *width), kind, maxshape=(None, *width), chunks=chunks
                )
            self._file[path].resize(self._total + self._waiting, axis=0)
            self._file[path][self._total :] = np.concatenate(parts)
        self._total, self._waiting, self._parts = self._total + self._waiting, 0, {}


def tables_hash(file: h5py.File) -> str:
    """A hash of what goes with the tokens into every file: ids, columns, roles, characters.

    Args:
        file: the open `tokens.h5`.

    Returns:
        128 bits of XXH3, in hexadecimal digits.
    """
    state = xxhash.xxh3_128(str(file["documents/id"].dtype).encode())

    def add(dataset: h5py.Dataset) -> None:
        step = max(1, _HASHED // dataset.dtype.itemsize)
        for start in range(0, len(dataset), step):
            state.update(dataset[start : start + step].tobytes())

    add(file["documents/id"])
    for name in token_tables.TYPES:
        if (path := token_tables.path(name)) in file:
            state.update(name.encode())
            add(file[path])
    for group in (columns.GROUP, columns.NAMES, columns.NULL):
        for name, dataset in sorted(file[group].items()) if group in file else ():
            state.update(f"{group}/{name} {dataset.dtype}".encode())
            add(dataset)
    return state.hexdigest()
