"""A document, and how a row of a table becomes one: what is no text, or no name, is refused with
its place.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.errors import CorpusError, printable

MAX_ID_BYTES = 1024  # every id takes as many bytes in the files of a run as the longest
MAX_TEXT = 1 << 26  # characters of a document: tokenizers take about 175 bytes for each
TOOLS = "tools"  # the column beside conversations that holds what the template lists as tools
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


class Untyped(str):
    """A value of a table that has texts alone: its type shows when all of the column is read."""


@dataclass(frozen=True)
class Document:
    """One text, the name that it keeps in every file of the run, and where it was read.

    Instead of a text it may have token ids, or a conversation with its tools. `columns`: the values
    of `corpus.columns`, in their order. `sequence`: the text is one of residues or bases. `target`:
    the text of a decoder whose encoder reads the document, or its token ids. `images`: of the
    column `corpus.images`. `origin`: file and number of the row that it is of.
    """

    id: str
    text: str
    place: str
    columns: tuple[Any, ...] = ()
    input_ids: list[int] | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    sequence: bool = False
    target: str | list[int] | None = None
    images: list[Any] | None = None
    origin: str = ""


def wanted(config: CorpusConfig) -> list[tuple[str, str]]:
    """The columns that a run needs, each with the setting that names it.

    Args:
        config: the `corpus` settings.

    Returns:
        Pairs of a key of `corpus` and a column; that of the content is the first.

    Examples:
        >>> from theloom.config.schema import CorpusConfig
        >>> wanted(CorpusConfig(column="body", columns=["label"]))
        [('column', 'body'), ('columns', 'label')]
    """
    content = "input_ids" if config.input_ids else "messages" if config.messages else "column"
    found = [(content, getattr(config, content))]
    if config.id_column is not None:
        found.append(("id_column", config.id_column))
    if config.target is not None:
        found.append(("target", config.target))
    if config.images is not None:
        found.append(("images", config.images))
    return [*found, *(("columns", name) for name in config.columns)]


def check_columns(config: CorpusConfig, there: Iterable[str], place: str) -> None:
    """Check that a table has the columns that a run needs, once each.

    Args:
        config: the `corpus` settings.
        there: its columns.
        place: the table, for messages.

    Raises:
        CorpusError: one is missing, or there twice.
    """
    names = list(there)
    for key, column in wanted(config):
        if column not in names:
            raise no_column(key, column, names, place)
        if names.count(column) > 1:
            raise CorpusError(
                f"{place}: {names.count(column)} columns are named {column!r}; rename all but one"
            )


def of_row(row: Any, default_id: str, place: str, config: CorpusConfig) -> Document:
    """The document of a row.

    Args:
        row: its values by column.
        default_id: its id where `corpus.id_column` is not set.
        place: the row's file and line, for messages.
        config: the `corpus` settings.

    Returns:
        The document, with an empty text where the column of the content is null.

    Raises:
        CorpusError: the row has no text, or no id, in the columns that are set.
    """
    key, column = wanted(config)[0]
    if not isinstance(row, Mapping):
        raise CorpusError(f"{place}: is {kind(row)}, not an object with the column {column!r}")
    found, name = _value(row, key, column, place), default_id
    text, content = "", dict[str, Any]()
    if found is None or (key != "column" and isinstance(found, Untyped) and not found):
        pass  # no more than an empty text: such a row is skipped, counted and named
    elif key == "column":
        if not isinstance(found, str):
            raise CorpusError(
                f"{place}: column {column!r} is {kind(found)}, not a text; remove the row or "
                "give it a text, or set corpus.column to a column of texts"
            )
        text = str(found)
    else:
        content[key] = _list(found, key, column, place)
    if config.messages and row.get(TOOLS):
        content[TOOLS] = _list(row[TOOLS], key, TOOLS, place)
    if config.id_column is not None:
        name = _value(row, "id_column", config.id_column, place)
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            raise CorpusError(
                f"{place}: column {config.id_column!r} is {kind(name)}, not a name; set "
                "corpus.id_column to a column of texts or numbers, or to null"
            )
    if config.target is not None:
        content["target"] = target_of(row, place, config)
    if config.images is not None and (shown := _value(row, "images", config.images, place)):
        content["images"] = _list(shown, "images", config.images, place)
    columns = tuple(_value(row, "columns", column, place) for column in config.columns)
    return Document(str(name), text, place, columns, origin=default_id, **content)


def target_of(row: Mapping[str, Any], place: str, config: CorpusConfig) -> str | list[int] | None:
    """The text of the decoder, or its token ids where the document has token ids too.

    Args:
        row: its values by column.
        place: the row's file and line, for messages.
        config: the `corpus` settings, with `corpus.target`.

    Returns:
        The value of that column; None where it is null.

    Raises:
        CorpusError: it is nothing of these, or there is no such column.
    """
    column = str(config.target)
    found = _value(row, "target", column, place)
    if found is None:
        return None
    if config.input_ids:
        return _list(found, "input_ids", column, place)
    if not isinstance(found, str):
        raise CorpusError(
            f"{place}: column {column!r} is {kind(found)}, not a text; remove the row or give it a "
            "text, or set corpus.target to a column of texts"
        )
    check_text(found, place)
    return str(found)


def _value(row: Mapping[str, Any], key: str, column: str, place: str) -> Any:
    if column not in row:
        raise no_column(key, column, row, place)
    return row[column]


def _list(value: Any, key: str, column: str, place: str) -> list[Any]:
    """The list in a column, which may be written as JSON."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = value
    if not isinstance(found, list):
        what = {"input_ids": "token ids", "images": "images"}.get(key, "messages")
        what = "tools" if column == TOOLS else what
        raise CorpusError(
            f"{place}: column {column!r} is {kind(found)}, not a list of {what}; correct the row, "
            f"or set corpus.{key} to another column"
        )
    if len(found) > MAX_TEXT:
        raise too_long(place)
    return found


def no_column(key: str, column: str, columns: Iterable[str], place: str) -> CorpusError:
    """The error for a column that is not there.

    Args:
        key: the setting of `corpus` that names it.
        column: its name.
        columns: the columns that are there.
        place: the file or the row, for the message.

    Returns:
        The error, to be raised.
    """
    names = list(map(str, columns))
    listed = ", ".join(printable(name[:80]) for name in names[:_SHOWN]) or "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return CorpusError(
        f"{place}: no column {column!r}; columns there: {listed}{more}; set corpus.{key}"
    )


def kind(value: Any) -> str:
    """What a value is, in words.

    Args:
        value: of a row.

    Returns:
        The words, for messages.

    Examples:
        >>> kind(None), kind([1])
        ('null', 'a list')
    """
    found = next((c for c in type(value).__mro__ if c in _KINDS), None)
    return f"of type {type(value).__name__}" if found is None else _KINDS[found]


def check(document: Document) -> None:
    """Check that the files of a run can hold a document's id, and a tokenizer its text.

    Args:
        document: what a row or a file gave.

    Raises:
        CorpusError: one of them holds a lone surrogate, or the id a NUL, or one is very long.
    """
    check_text(document.text, document.place)
    check_name(document.id, "id", document.place)


def check_text(text: str, place: str) -> None:
    """Check that a tokenizer can take a text.

    Args:
        text: of a document.
        place: where it was read, for messages.

    Raises:
        CorpusError: it is longer than `MAX_TEXT` characters, or holds a lone surrogate.
    """
    if len(text) > MAX_TEXT:
        raise too_long(place)
    _check_surrogates(text, "text", place)


def check_name(value: str, what: str, place: str) -> None:
    """Check that the files of a run can hold a short text.

    Args:
        value: the text.
        what: it is, for messages.
        place: where it was read.

    Raises:
        CorpusError: it holds a lone surrogate or a NUL, or is very long.
    """
    _check_surrogates(value, what, place)
    if "\0" in value:
        raise CorpusError(
            f"{place}: the {what} {value[:80]!r} has a NUL, with which HDF5 ends a name; give "
            "another one"
        )
    if (size := len(value.encode())) > MAX_ID_BYTES:
        raise CorpusError(
            f"{place}: the {what} has {size} bytes, and may have {MAX_ID_BYTES}; give a shorter one"
        )


def _check_surrogates(value: str, what: str, place: str) -> None:
    if (at := surrogate(value)) is not None:
        raise CorpusError(
            f"{place}: the {what} has a lone surrogate (U+{ord(value[at]):04X}, "
            f"character {at + 1}), which is half of a character; correct it"
        )


def too_long(place: str) -> CorpusError:
    """The error for a document of more than `MAX_TEXT` characters.

    Args:
        place: where it was read.

    Returns:
        The error, to be raised.
    """
    return CorpusError(
        f"{place}: a document of more than {MAX_TEXT:,} characters; split it, for example into "
        "the lines of a .jsonl file"
    )


def surrogate(text: str) -> int | None:
    r"""Where a text has its first surrogate, which UTF-8 cannot express.

    Args:
        text: of a document.

    Returns:
        The number of the character, from 0; None where there is none.

    Examples:
        >>> surrogate("ab\ud800"), surrogate("ab")
        (2, None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
