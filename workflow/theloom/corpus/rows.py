"""A document, and how a row of a table becomes one: what is no text, or no name, is refused with
its place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.errors import CorpusError, printable

MAX_ID_BYTES = 1024  # every id takes as many bytes in the files of a run as the longest
MAX_TEXT = 1 << 26  # characters of a document: tokenizers take about 175 bytes for each
_SHOWN = 10  # columns that a message lists

_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


@dataclass(frozen=True)
class Document:
    """One text, the name that it keeps in every file of the run, and where it was read."""

    id: str
    text: str
    place: str


def of_row(row: Any, default_id: str, place: str, config: CorpusConfig) -> Document:
    """The document of a row.

    Args:
        row: its values by column.
        default_id: its id where `corpus.id_column` is not set.
        place: the row's file and line, for messages.
        config: the `corpus` settings.

    Raises:
        CorpusError: the row has no text, or no id, in the columns that are set.
    """
    if not isinstance(row, dict):
        raise CorpusError(
            f"{place}: is {_kind(row)}, not an object with the column {config.column!r}"
        )
    text, name = _value(row, "column", place, config), default_id
    if not isinstance(text, str):
        raise CorpusError(
            f"{place}: column {config.column!r} is {_kind(text)}, not a text; remove the row or "
            "give it a text, or set corpus.column to a column of texts"
        )
    if config.id_column is not None:
        name = _value(row, "id_column", place, config)
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            raise CorpusError(
                f"{place}: column {config.id_column!r} is {_kind(name)}, not a name; set "
                "corpus.id_column to a column of texts or numbers, or to null"
            )
    return Document(str(name), text, place)


def _value(row: dict[str, Any], key: str, place: str, config: CorpusConfig) -> Any:
    column = getattr(config, key)
    if column not in row:
        raise no_column(key, column, row, place)
    return row[column]


def no_column(key: str, column: str, columns: Iterable[str], place: str) -> CorpusError:
    """The error for a column that is not there. `key`: the setting that names it."""
    names = list(map(str, columns))
    listed = ", ".join(printable(name[:80]) for name in names[:_SHOWN]) or "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return CorpusError(
        f"{place}: no column {column!r}; columns there: {listed}{more}; set corpus.{key}"
    )


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def check(document: Document) -> None:
    """Check that the files of a run can hold a document's id, and a tokenizer its text.

    Raises:
        CorpusError: one of them holds a lone surrogate, or the id a NUL, or one is very long.
    """
    if len(document.text) > MAX_TEXT:
        raise too_long(document.place)
    for what, value in (("id", document.id), ("text", document.text)):
        if (at := surrogate(value)) is not None:
            raise CorpusError(
                f"{document.place}: the {what} has a lone surrogate (U+{ord(value[at]):04X}, "
                f"character {at + 1}), which is half of a character; correct it"
            )
    if "\0" in document.id:
        raise CorpusError(
            f"{document.place}: the id {document.id[:80]!r} has a NUL, with which HDF5 "
            "ends a name; give another one"
        )
    if (size := len(document.id.encode())) > MAX_ID_BYTES:
        raise CorpusError(
            f"{document.place}: the id has {size} bytes, and may have {MAX_ID_BYTES}; "
            "give a shorter one"
        )


def too_long(place: str) -> CorpusError:
    """The error for a document of more than `MAX_TEXT` characters."""
    return CorpusError(
        f"{place}: a document of more than {MAX_TEXT:,} characters; split it, for example into "
        "the lines of a .jsonl file"
    )


def surrogate(text: str) -> int | None:
    """Where a text has its first surrogate, which UTF-8 cannot express; None where it has none.

    Examples:
        >>> surrogate("ab\\ud800"), surrogate("ab")
        (2, None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
