"""Cells of tables that hold images or audio: which column, and the bytes in it."""

from collections.abc import Mapping
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.errors import CorpusError

_COLUMN = {"images": "image", "audio": "audio"}  # where corpus.column has the default of texts


def column_of(config: CorpusConfig) -> str:
    """The column of a table that holds images or clips.

    Args:
        config: the `corpus` settings.

    Returns:
        `corpus.column`, or `image` or `audio` where it has the default of texts.
    """
    default = CorpusConfig().column
    return _COLUMN[config.kind.name] if config.column == default else config.column


def id_of(row: Mapping[str, Any], own: str, place: str, config: CorpusConfig) -> str:
    """The id of a row's document.

    Args:
        row: of a table.
        own: its name, where no column has ids.
        place: of the row, for messages.
        config: the `corpus` settings.

    Returns:
        What `corpus.id_column` has, or the name.

    Raises:
        CorpusError: the column has something else than texts and numbers.
    """
    found = own if config.id_column is None else row[config.id_column]
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise CorpusError(
            f"{place}: column {config.id_column!r} is {rows.kind(found)}, not a name; set "
            "corpus.id_column to a column of texts or numbers, or to null"
        )
    return str(found)


def content_of(value: Any, place: str, config: CorpusConfig) -> bytes:
    """The bytes in a cell: themselves, or in an object with them, as `datasets` writes it.

    Args:
        value: the cell.
        place: of the row, for messages.
        config: the `corpus` settings.

    Returns:
        The bytes.

    Raises:
        CorpusError: there are none.
    """
    found = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(found, bytes):
        raise CorpusError(
            f"{place}: column {column_of(config)!r} has no bytes of {config.kind.name} "
            f"({rows.kind(value)}); write the files' bytes into it, as datasets' Image and Audio "
            "do, or set corpus.column"
        )
    return found
