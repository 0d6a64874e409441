"""Columns of labels and the like: their values as documents come, and their types in the end."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from theloom.corpus import rows
from theloom.corpus.rows import Document, Untyped
from theloom.errors import CorpusError
from theloom.store.file_format import fixed_strings
from theloom.store.tables.columns import Column

_LARGEST = 1 << 63
_EXACT = 1 << 53  # integers up to here are floats without loss

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|NaN|Inf)")
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Category(str):
    """A name that a table keeps as one of a fixed list."""

    names: Sequence[str]

    @classmethod
    def of(cls, name: str, names: Sequence[str]) -> "Category":
        """The name, of a list that all values of the column share.

        Args:
            name: one of `names`.
            names: all names of the column.

        Returns:
            A text that has `names` as an attribute.

        Examples:
            >>> label = Category.of("negative", ["positive", "negative"])
            >>> label, label.names
            ('negative', ['positive', 'negative'])
        """
        found = cls(name)
        found.names = names
        return found


class Collected:
    """The values of one column. `name`: of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values: list[Any] = []
        self._first: dict[str, str] = {}  # by type the place of its first value
        self._names: dict[str, int] = {}
        self._last_names: Sequence[str] = ()

    def add(self, value: Any, place: str) -> None:
        """Take the value of another document.

        Args:
            value: what the column holds; None: nothing.
            place: the document's file and line, for messages.

        Raises:
            CorpusError: the value is of another type than those before it.
        """
        kind = self._kind(value, place)
        self._values.append(value)
        if kind is None or kind in self._first:
            return
        self._first[kind] = place
        if len({_TOGETHER.get(k, k) for k in self._first} - {"untyped"}) > 1:
            (before, where), *_ = self._first.items()
            raise CorpusError(
                f"{place}: column {self._name!r} is of mixed types: {_SAID[kind]} here, "
                f"{_SAID[before]} before ({where}); give it one type, or take it out of "
                "corpus.columns"
            )

    def _kind(self, value: Any, place: str) -> str | None:
        match value:
            case None:
                return None
            case bool():
                return "boolean"
            case int():
                if not -_LARGEST <= value < _LARGEST:
                    raise CorpusError(
                        f"{place}: column {self._name!r} is {str(value)[:40]}, which is beyond 64 "
                        "bits; write it as a text"
                    )
                return "integer"
            case float():
                return "float"
            case str():
                rows.check_name(value, f"value of column {self._name!r}", place)
                if isinstance(value, Category):
                    if value.names is not self._last_names:
                        self._last_names = value.names
                        for name in value.names:
                            self._names.setdefault(name, len(self._names))
                    return "category"
                return "untyped" if isinstance(value, Untyped) else "string"
            case list() | dict():
                return "json"
        raise CorpusError(
            f"{place}: column {self._name!r} is {rows.kind(value)}, which no column of a run can "
            "be; make it a number, a truth value or a text"
        )

    def column(self) -> Column:
        """The column, of the type that fits all values.

        Returns:
            The values in the order in which they were added.

        Raises:
            CorpusError: no type fits all of them.
        """
        kinds = set(self._first)
        values = self._values
        if "untyped" in kinds:
            kinds.discard("untyped")
            texts = [v for v in values if isinstance(v, Untyped)]
            read = _read_as(kinds) if kinds else _guessed(texts)
            values = [self._typed(v, read) if isinstance(v, Untyped) else v for v in values]
            if not kinds:
                kinds = {_NAMED[type(v)] for v in values if v is not None}
        if kinds == {"category"}:
            codes = [-1 if v is None else self._names[v] for v in values]
            return Column("category", np.array(codes, "<i4"), fixed_strings([*self._names]))
        if kinds in ({"float"}, {"integer", "float"}):
            return Column("float", np.array([self._float(v) for v in values], "<f8"))
        null = np.array([v is None for v in values], "u1")
        nulls = null if null.any() else None
        if kinds == {"integer"}:
            return Column("integer", np.array([v or 0 for v in values], "<i8"), null=nulls)
        if kinds == {"boolean"}:
            return Column("boolean", np.array([v or 0 for v in values], "u1"), null=nulls)
        kind = "json" if kinds == {"json"} else "string"
        strings = ["" if v is None else self._json(v) if kind == "json" else v for v in values]
        return Column(kind, fixed_strings(strings), null=nulls)

    def _typed(self, value: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(str(value))
        except (ValueError, KeyError):
            raise CorpusError(
                f"corpus.columns: {self._name!r} is of mixed types over the files: {value[:40]!r} "
                f"in one, {' and '.join(_SAID[k] for k in self._first if k != 'untyped')} in "
                "another; give it one type"
            ) from None

    def _float(self, value: Any) -> float:
        if isinstance(value, int) and abs(value) > _EXACT:
            raise CorpusError(
                f"corpus.columns: {self._name!r} has {value} among numbers with a fraction, which "
                "no float holds; write its values as texts"
            )
        return math.nan if value is None else float(value)

    def _json(self, value: Any) -> str:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise CorpusError(
                f"corpus.columns: {self._name!r} has lists or objects that are not JSON; make it a "
                "column of numbers or texts"
            ) from None
        rows.check_name(text, f"value of column {self._name!r}", "corpus.columns")
        return text


_TOGETHER = {"float": "integer", "category": "string"}  # types that one column may mix
_NAMED = {bool: "boolean", int: "integer", float: "float", str: "string"}
_SAID = {
    "integer": "an integer",
    "float": "a number",
    "boolean": "true or false",
    "string": "a text",
    "category": "a category",
    "json": "a list or an object",
    "untyped": "a text",
}


def _read_as(kinds: set[str]) -> Callable[[str], Any]:
    """How a text becomes a value of a type that other files give the column."""
    if kinds <= {"integer", "float"}:
        return lambda text: None if not text else (_number(text))
    if kinds == {"boolean"}:
        return lambda text: None if not text else _TRUTH[text]
    return json.loads if kinds == {"json"} else str


def _number(text: str) -> int | float:
    if _WHOLE.fullmatch(text) and -_LARGEST <= int(text) < _LARGEST:
        return int(text)
    return float(text)


def _guessed(texts: list[Untyped]) -> Callable[[str], Any]:
    """How the texts of a column become values: as numbers or truth values only where each of them
    is one and nothing of it gets lost.
    """
    given = [text for text in texts if text]
    if given and all(map(_WHOLE.fullmatch, given)):
        if all(len(t) < 20 and -_LARGEST <= int(t) < _LARGEST for t in given):
            return lambda text: int(text) if text else None
        return str
    if given and all(text in _TRUTH for text in given):
        return lambda text: _TRUTH[text] if text else None
    if given and all(_is_real(t) or (_WHOLE.fullmatch(t) and len(t) < 16) for t in given):
        return lambda text: float(text) if text else None
    return str


def _is_real(text: str) -> bool:
    """Whether a text is a number with a fraction: one that begins with zeros may be a name."""
    return bool(_REAL.fullmatch(text)) and not re.match(r"[+-]?0[0-9]|\+", text)


class Columns:
    """The values of `corpus.columns`, as documents come."""

    def __init__(self, names: Sequence[str]) -> None:
        self._collected = {name: Collected(name) for name in names}

    def add(self, document: Document) -> None:
        """Take the values of a document.

        Args:
            document: the next one, whose `columns` are in the order of the names.

        Raises:
            CorpusError: a column is of mixed types.
        """
        for collected, value in zip(self._collected.values(), document.columns, strict=True):
            collected.add(value, document.place)

    def typed(self) -> dict[str, Column]:
        """The columns, each of one type.

        Returns:
            By name, with a value for each document.

        Raises:
            CorpusError: no type fits all values of a column.
        """
        return {name: collected.column() for name, collected in self._collected.items()}
