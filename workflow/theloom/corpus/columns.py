"""Columns of labels and the like: their values as documents come, and their types in the end."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class Dumped(str):
    """A list or an object as JSON."""


@dataclass
class Values:
    """Values of one column as a file keeps them.

    Attributes:
        types: of each value, its place in `TYPES`, (documents,) of uint8.
        numbers: the value of integers and truth values, the bits of a float, else 0; (documents,)
            of int64.
        texts: the value of texts, names and JSON, else empty.
        first: of each type its name, the place of its first value, and that value's number.
        names: of categories, each with the number of the value with which it came.
    """

    types: np.ndarray
    numbers: np.ndarray
    texts: list[str]
    first: list[tuple[str, str, int]]
    names: list[tuple[str, int]]


class Collected:
    """The values of one column.

    Args:
        name: of it.
        alone: whether these are all its values, so that types that do not mix are an error.
    """

    def __init__(self, name: str, alone: bool = True) -> None:
        self._name, self._alone = name, alone
        self._values: list[Any] = []
        self._first: dict[str, tuple[str, int]] = {}  # by type place and number of its first value
        self._names: dict[str, int] = {}  # with the number of the value with which each came
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
        if kind is not None:
            self.met(kind, place, len(self._values) - 1)

    def met(self, kind: str, place: str, number: int) -> None:
        """Note the type of a value.

        Args:
            kind: the type.
            place: the document's file and line, for messages.
            number: of the value, from 0.

        Raises:
            CorpusError: it does not go with the types before it.
        """
        if kind in self._first:
            return
        self._first[kind] = place, number
        mixed = len({_TOGETHER.get(k, k) for k in self._first} - {"untyped"}) > 1
        if mixed and self._alone:
            (before, (where, _)), *_ = self._first.items()
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
                            self._names.setdefault(name, len(self._values))
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
            places = {name: n for n, name in enumerate(self._names)}
            codes = [-1 if v is None else places[v] for v in values]
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

    def kept(self, count: int) -> Values:
        """The first values, for `add_kept` of another job.

        Args:
            count: how many.

        Returns:
            The values and what is known of them.

        Raises:
            CorpusError: a list or an object is no JSON.
        """
        values = self._values[:count]
        kinds = [_kind_of(v) for v in values]
        numbers = [
            v if k in ("integer", "boolean") else _bits(v) if k == "float" else 0
            for v, k in zip(values, kinds, strict=True)
        ]
        texts = [
            self._json(v) if k == "json" else v if isinstance(v, str) else ""
            for v, k in zip(values, kinds, strict=True)
        ]
        return Values(
            np.array([TYPES.index(k) for k in kinds], "u1"),
            np.array(numbers, "<i8"),
            texts,
            [(k, place, n) for k, (place, n) in self._first.items() if n < count],
            [(name, n) for name, n in self._names.items() if n < count],
        )

    def add_kept(self, kept: Values) -> None:
        """Take values of another job; their types have been `met`.

        Args:
            kept: of `kept`.
        """
        floats = kept.numbers.view("<f8").tolist()
        for name, number in kept.names:
            self._names.setdefault(name, len(self._values) + number)
        rows_of = zip(kept.types.tolist(), kept.numbers.tolist(), floats, kept.texts, strict=True)
        for code, number, real, text in rows_of:
            match TYPES[code]:
                case "null":
                    self._values.append(None)
                case "boolean":
                    self._values.append(bool(number))
                case "integer":
                    self._values.append(number)
                case "float":
                    self._values.append(real)
                case "untyped":
                    self._values.append(Untyped(text))
                case "json":
                    self._values.append(Dumped(text))
                case _:
                    self._values.append(text)

    def _json(self, value: Any) -> str:
        if isinstance(value, Dumped):
            return str(value)
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
TYPES = ("null", "boolean", "integer", "float", "string", "category", "json", "untyped")
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


def _kind_of(value: Any) -> str:
    """The type of a value that a column has taken."""
    if value is None:
        return "null"
    if isinstance(value, str):
        if isinstance(value, Category):
            return "category"
        return "untyped" if isinstance(value, Untyped) else "string"
    return "json" if isinstance(value, list | dict) else _NAMED[type(value)]


def _bits(value: float) -> int:
    return int(np.array(value, "<f8").view("<i8"))


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
    """The values of `corpus.columns`, as documents come.

    Args:
        names: of the columns.
        alone: as of `Collected`.
    """

    def __init__(self, names: Sequence[str], alone: bool = True) -> None:
        self._collected = {name: Collected(name, alone) for name in names}

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

    def kept(self, count: int) -> list[Values]:
        """The values of the first documents, for `add_kept` of another job.

        Args:
            count: how many documents.

        Returns:
            Values for each column, in their order.

        Raises:
            CorpusError: a list or an object is no JSON.
        """
        return [collected.kept(count) for collected in self._collected.values()]

    def add_kept(self, kept: Sequence[Values], count: int) -> None:
        """Take the values of the first documents of another job.

        Args:
            kept: of `kept`.
            count: how many documents.

        Raises:
            CorpusError: a column is of mixed types.
        """
        columns = list(self._collected.values())
        firsts = [
            (number, at, kind, place)
            for at, values in enumerate(kept)
            for kind, place, number in values.first
            if number < count
        ]
        for number, at, kind, place in sorted(firsts):
            columns[at].met(kind, place, number)
        for collected, values in zip(columns, kept, strict=True):
            collected.add_kept(
                Values(
                    values.types[:count],
                    values.numbers[:count],
                    values.texts[:count],
                    values.first,
                    [(name, n) for name, n in values.names if n < count],
                )
            )
