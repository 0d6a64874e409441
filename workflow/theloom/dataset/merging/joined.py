"""The tables of all shards, one after the other: what a merged file has of documents and windows.

They are taken shard by shard and written piece by piece, so that memory does not grow with the
documents.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from theloom.dataset.tables import Tables
from theloom.store.hdf5.spool import Spool
from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column

_ENTRIES = 1 << 15  # that are written together


class Arrays:
    """Arrays of one kind, one after the other.

    Args:
        folder: of the temporary file that has what memory does not hold.

    Examples:
        >>> arrays = Arrays(Path("/tmp"))
        >>> arrays.add(np.array([b"a"]))
        >>> arrays.add(np.array([b"bcd"]))
        >>> len(arrays), arrays.dtype.str, [piece.tolist() for piece in arrays.pieces()]
        (2, '|S3', [[b'a'], [b'bcd']])
    """

    def __init__(self, folder: Path) -> None:
        self._spool = Spool(folder)
        self._runs: list[tuple[int, np.dtype]] = []  # entries of one type, which follow each other
        self._width: tuple[int, ...] = ()

    def add(self, array: np.ndarray) -> None:
        """Take another array.

        Args:
            array: of the same width as those before; of texts in any length.
        """
        self._spool.add(array.tobytes())
        self._width = array.shape[1:]
        if self._runs and self._runs[-1][1] == array.dtype:
            self._runs[-1] = (self._runs[-1][0] + len(array), array.dtype)
        else:
            self._runs.append((len(array), array.dtype))

    def __len__(self) -> int:
        return sum(count for count, _ in self._runs)

    @property
    def dtype(self) -> np.dtype:
        """Of an array that holds them all."""
        return np.result_type(*(dtype for _, dtype in self._runs))

    def pieces(self) -> Iterator[np.ndarray]:
        """Give all entries, array after array.

        Yields:
            Arrays (entries, …) of `dtype`.
        """
        at = 0
        for count, dtype in self._runs:
            size = dtype.itemsize * int(np.prod(self._width))
            for first in range(0, count, _ENTRIES):
                end = at + size * min(_ENTRIES, count - first)
                entries = np.frombuffer(self._spool.read(at, end), dtype)
                yield entries.reshape(-1, *self._width).astype(self.dtype)
                at = end

    def write(self, file: h5py.File, name: str) -> None:
        """Write them as a dataset.

        Args:
            file: the open file.
            name: of the dataset.
        """
        dataset, at = file.create_dataset(None, (len(self), *self._width), self.dtype), 0
        for piece in self.pieces():
            dataset[at : at + len(piece)] = piece
            at += len(piece)
        file[name] = dataset  # named last, as h5py does: so files lie as those of one array do


class JoinedTables:
    """The tables of documents and windows of a merged file. Offsets become tokens of that file.

    Args:
        folder: of temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._tokens = folder, 0
        self._arrays: dict[str, Arrays] = {}
        self._names: dict[str, np.ndarray | None] = {}  # of the categories of each column
        self._with_nulls: set[str] = set()  # columns of which some document has no value

    def add(
        self,
        tables: Tables,
        of_documents: Mapping[str, Column],
        row_tokens: np.ndarray | None,
        tokens: int,
    ) -> None:
        """Take the tables of the next shard.

        Args:
            tables: of its documents and windows.
            of_documents: its columns by name.
            row_tokens: the token of each stored row, (rows,); None where every token has a row.
            tokens: how many it has.
        """
        self._add("documents/offset", tables.document_offset[:-1] + self._tokens)
        self._add("windows/offset", tables.window_offset[:-1] + self._tokens)
        if row_tokens is not None:
            self._add(token_tables.ROW_TOKEN, row_tokens + self._tokens)
        self._add("documents/id", tables.document_id)
        for name, column in of_documents.items():
            values, _, null = columns.datasets(name)
            self._add(values, column.values)
            self._names.setdefault(name, column.names)
            self._add(null, np.zeros(len(column), "u1") if column.null is None else column.null)
            if column.null is not None:
                self._with_nulls.add(name)
        self._add("windows/document", tables.window_document)
        self._add("windows/hash", tables.window_hash)
        self._tokens += tokens

    def _add(self, name: str, array: np.ndarray) -> None:
        self._arrays.setdefault(name, Arrays(self._folder)).add(array)

    def write(self, file: h5py.File) -> None:
        """Write the tables of all shards.

        Args:
            file: the open file.
        """
        for name in ("documents/offset", "windows/offset"):
            self._add(name, np.array([self._tokens], "<i8"))
            self._arrays[name].write(file, name)
        if token_tables.ROW_TOKEN in self._arrays:
            self._arrays[token_tables.ROW_TOKEN].write(file, token_tables.ROW_TOKEN)
        self._arrays["documents/id"].write(file, "documents/id")
        for name, categories in self._names.items():
            values, names, null = columns.datasets(name)
            self._arrays[values].write(file, values)
            if categories is not None:
                file[names] = categories
            if name in self._with_nulls:
                self._arrays[null].write(file, null)
        for name in ("windows/document", "windows/hash"):
            self._arrays[name].write(file, name)
