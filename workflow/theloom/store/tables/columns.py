"""Columns of the corpus that travel with its documents: labels, splits, languages.

Each is a dataset `documents/columns/<name>` of one value for each document. The attribute `columns`
of the root lists names and types in their order.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from theloom.store.hdf5.pieces import write_array

GROUP, NAMES, NULL = "documents/columns", "documents/categories", "documents/null"

# NumPy's type of what is stored: of a category the place of its name, -1 for none
STORED = {
    "integer": "<i8",
    "float": "<f8",
    "boolean": "|u1",
    "string": "|S",
    "category": "<i4",
    "json": "|S",
}


@dataclass(frozen=True)
class Column:
    """The values of one column, as they are stored.

    `names`: of a category. `null`: 1 where a document has no value; None where all have one, and of
    floats (NaN) and categories (-1), which need none.
    """

    type: str
    values: np.ndarray
    names: np.ndarray | None = None
    null: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def part(self, documents: slice | np.ndarray) -> "Column":
        """The column of some documents.

        Args:
            documents: a slice, or their numbers.

        Returns:
            A column of the same type.
        """
        null = None if self.null is None else self.null[documents]
        return Column(self.type, self.values[documents], self.names, null)

    def array(self) -> np.ndarray:
        """The values as NumPy has them. Lists and objects stay texts of JSON.

        Returns:
            (documents,) int64, float64, bool or texts; masked where values are missing.

        Examples:
            >>> Column("boolean", np.array([1, 0], "u1")).array().tolist()
            [True, False]
        """
        if self.type == "category":
            assert self.names is not None
            names = np.append(_texts(self.names), "")
            found = names[self.values]
            return np.ma.array(found, mask=self.values < 0) if (self.values < 0).any() else found
        if self.type == "boolean":
            found = self.values.astype(bool)
        else:
            found = _texts(self.values) if self.values.dtype.kind == "S" else self.values
        return found if self.null is None else np.ma.array(found, mask=self.null.astype(bool))

    def tolist(self) -> list[Any]:
        """The values as Python has them.

        Returns:
            A value for each document; None where there is none.
        """
        values = self.array().tolist()
        if self.type == "json":
            return [None if value is None else json.loads(value) for value in values]
        return values


def _texts(values: np.ndarray) -> np.ndarray:
    return np.char.decode(values, "utf-8") if len(values) else np.empty(0, "<U1")


@dataclass(frozen=True)
class ColumnPieces:
    """A column that is written piece by piece, as long as it is.

    Attributes:
        type: as of `Column`.
        count: how many documents there are.
        dtype: of an array that holds all values.
        pieces: gives the values, array after array, each with 1 where a value is missing, uint8.
        names: of a category.
        has_null: whether it is stored which values are missing.
    """

    type: str
    count: int
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    names: np.ndarray | None = None
    has_null: bool = False


def described(columns: Mapping[str, Column] | Mapping[str, ColumnPieces]) -> list[dict[str, str]]:
    """What the attribute `columns` says.

    Args:
        columns: by name.

    Returns:
        Name and type of each column, in their order.
    """
    return [{"name": name, "type": column.type} for name, column in columns.items()]


def write(file: h5py.File, columns: Mapping[str, Column]) -> None:
    """Write the datasets of columns into an open file; the attribute `columns` is the caller's.

    Args:
        file: the file.
        columns: by name.
    """
    for name, column in columns.items():
        of_column = (column.values, column.names, column.null)
        for path, values in zip(datasets(name), of_column, strict=True):
            if values is not None:
                file[path] = values


def write_pieces(file: h5py.File, columns: Mapping[str, ColumnPieces]) -> None:
    """Write the datasets of columns into an open file, as `write` does.

    Args:
        file: the file.
        columns: by name.
    """
    for name, column in columns.items():
        values, names, null = datasets(name)
        write_array(file, values, column.count, column.dtype, (v for v, _ in column.pieces()))
        if column.names is not None:
            file[names] = column.names
        if column.has_null:
            nulls = (null for _, null in column.pieces())
            write_array(file, null, column.count, np.dtype("u1"), nulls)


def read(
    array: Callable[[str], np.ndarray | None], listed: list[Any], documents: int
) -> dict[str, Column]:
    """Read what `write` wrote.

    Args:
        array: returns the content of a dataset by its name; None where there is none.
        listed: what the attribute `columns` says.
        documents: how many there are.

    Returns:
        The columns by name.

    Raises:
        ValueError: a column is damaged.
    """
    columns = {}
    for entry in listed:
        if not isinstance(entry, dict) or entry.get("type") not in STORED:
            raise ValueError("its list of columns is damaged")
        name, kind = str(entry["name"]), entry["type"]
        values, names, null = map(array, datasets(name))
        column = Column(kind, _sound(name, values, STORED[kind], documents), names, null)
        if null is not None:
            _sound(name, null, "|u1", documents)
        if kind == "category":
            _sound(name, names, "|S", None)
            places = column.values
            if len(places) and not -1 <= places.min() <= places.max() < len(names):  # type: ignore[arg-type]
                raise ValueError(f"its column {name!r} is damaged")
        column.tolist()  # texts are UTF-8, and JSON
        columns[name] = column
    return columns


def schema(columns: Mapping[str, Column]) -> dict[str, tuple[str, list[str] | None]]:
    """The type and the names of categories of each column: the same in all shards of a run.

    Args:
        columns: by name.

    Returns:
        Type and names of categories by column; None where it is no category.
    """
    return {
        name: (c.type, None if c.names is None else c.names.tolist()) for name, c in columns.items()
    }


def _sound(name: str, values: np.ndarray | None, stored: str, count: int | None) -> np.ndarray:
    shape = None if values is None else values.shape
    if values is None or not values.dtype.str.startswith(stored) or len(shape or ()) != 1:
        raise ValueError(f"its column {name!r} is damaged")
    if count is not None and shape != (count,):
        raise ValueError(f"its column {name!r} has another number of values than documents")
    return values


def datasets(name: str) -> tuple[str, str, str]:
    """The datasets of a column.

    Args:
        name: of the column.

    Returns:
        Paths of its values, of the names of a category, and of which values are missing.

    Examples:
        >>> datasets("a/b")[0]
        'documents/columns/a%2Fb'
    """
    values, names, null = (f"{group}/{_quoted(name)}" for group in (GROUP, NAMES, NULL))
    return values, names, null


def _quoted(name: str) -> str:
    """The name as HDF5 takes one: no slash, and no single dot.

    Examples:
        >>> _quoted("a/b"), _quoted("."), _quoted("50%")
        ('a%2Fb', '%2E', '50%25')
    """
    quoted = name.replace("%", "%25").replace("/", "%2F")
    return "%2E" if quoted == "." else quoted
