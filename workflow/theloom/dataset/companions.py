"""What goes with the rows into the tables of other libraries: tables of tokens, and the columns of
the corpus.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.errors import ConfigError
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column

if TYPE_CHECKING:
    from theloom.dataset.reader import ActivationsReader


def columns_of(acts: "ActivationsReader", taken: Collection[str]) -> dict[str, Column]:
    """The columns of the corpus under names that a table has not taken.

    Args:
        acts: the dataset.
        taken: names of the table's own columns.

    Returns:
        The columns by name; one whose name is taken is `corpus.NAME`.
    """
    return {f"corpus.{n}" if n in taken else n: column for n, column in acts.columns.items()}


def token_tables_of(acts: "ActivationsReader", rows: np.ndarray) -> dict[str, np.ndarray]:
    """Read what a file has of the tables of `store.tables.tokens`.

    Args:
        acts: the dataset.
        rows: numbers of rows, (n,).

    Returns:
        Tables by name, (n,) integers or booleans each.
    """
    tables = {name: acts.token_table(name) for name in token_tables.TYPES}
    return {name: table.numpy(rows) for name, table in tables.items() if table is not None}


def one_each(ids: np.ndarray) -> Any:
    """Token ids as a column of a table.

    Args:
        ids: (rows,), or of codes (rows, codebooks).

    Returns:
        An entry for each row: its id, or a list of its codes.
    """
    return ids if ids.ndim == 1 else ids.tolist()


def series(column: Column, documents: np.ndarray | None = None) -> Any:
    """A column as pandas has it, where a value may be missing.

    Args:
        column: with a value for each document.
        documents: numbers of documents, with repeats; None: all.

    Returns:
        A `pandas.Series` with an entry for each of these documents.

    Raises:
        ConfigError: pandas is not installed.
    """
    pandas = pandas_module()
    if column.type == "category":
        assert column.names is not None
        names = np.char.decode(column.names, "utf-8").tolist()
        found = pandas.Series(pandas.Categorical.from_codes(column.values, names))
    else:
        kinds = {"integer": "int64", "float": "float64", "boolean": "bool", "json": "object"}
        kind = kinds.get(column.type, "str")
        if column.null is not None:
            kind = {"integer": "Int64", "boolean": "boolean"}.get(column.type, kind)
        found = pandas.Series(column.tolist(), dtype=kind)
    return found if documents is None else found.take(documents)


def plain(column: Column) -> np.ndarray:
    """A column as an array without a mask.

    Args:
        column: with a value for each document.

    Returns:
        (documents,); of objects, with None, where values are missing.
    """
    found = column.array()
    return np.array(found.tolist(), object) if isinstance(found, np.ma.MaskedArray) else found


def feature(datasets: Any, column: Column) -> Any:
    """The type of a column in a `datasets.Dataset`; lists and objects are texts of JSON.

    Args:
        datasets: the module.
        column: of the corpus.

    Returns:
        A `datasets.Value`.
    """
    kinds = {"integer": "int64", "float": "float64", "boolean": "bool"}
    return datasets.Value(kinds.get(column.type, "string"))


def pandas_module() -> Any:
    """Import pandas, which is optional.

    Returns:
        The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError("tables need pandas; pip install 'theloom[notebook]'") from None
    return pandas
