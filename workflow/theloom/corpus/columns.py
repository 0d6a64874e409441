"""Columns of labels and the like: their values as documents come, and their types in the end."""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import h5py
import numpy as np

from theloom.corpus import rows
from theloom.corpus.rows import Document, Untyped
from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.corpus.spooled.values import Values, ValueSpool
from theloom.errors import CorpusError
from theloom.store.file_format import fixed_strings
from theloom.store.tables.columns import STORED, ColumnPieces

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
    """The values of one column.

    Args:
        name: of it.
        alone: whether these are all its values, so that types that do not mix are an error.
    """

    def __init__(self, name: str, alone: bool = True) -> None:
        self._name, self._alone = name, alone
        self._values = ValueSpool()
        self._first: dict[str, tuple[str, int]] = {}  # by type place and number of its first value
        self._names: dict[str, int] = {}  # with the number of the value with which each came
        self._last_names: Sequence[str] = ()

    def add(self, value: Any, place: str) -> None:
        """Take the value of another document.

        Args:
            value: what the column holds; None: nothing.
            place: the document's file and line, for messages.

        Raises:
            CorpusError: the value is of another type than those before it, or none that a column
                can be of.
            OSError: the disk of temporary files is full, or fails.
        """
        kind = self._kind(value, place)
        if kind is not None:
            self.met(kind, place, len(self._values))
        number, text = 0, ""
        match kind:
            case "integer" | "boolean":
                number = int(value)
            case "float":
                (number,) = struct.unpack("<q", struct.pack("<d", value))
            case "json":
                text = self._json(value, place)
            case "string" | "category" | "untyped":
                text = str(value)
        self._values.add(kind or "null", number, text)

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

    def column(self) -> ColumnPieces:
        """The column, of the type that fits all values.

        Returns:
            The values in the order in which they were added.

        Raises:
            CorpusError: no type fits all of them.
        """
        kinds, read = set(self._first), None
        if "untyped" in kinds:
            kinds.discard("untyped")
            if kinds:
                read = _read_as(kinds)
            else:
                guessed = self._guessed()
                kinds, read = {guessed}, _READ[guessed]
        if kinds == {"integer"} and read is not None and self._has_fraction(read):
            kinds.add("float")
        kind = "float" if kinds in ({"float"}, {"integer", "float"}) else "string"
        if len(kinds) == 1:
            (kind,) = kinds
        pieces = partial(self._pieces, kind, read)
        null, widest = False, np.dtype("S1")
        for values, nulls in pieces():
            null, widest = null or bool(nulls.any()), max(widest, values.dtype, key=_width)
        dtype = widest if kind in ("string", "json") else _DTYPES[kind]
        names = fixed_strings([*self._names]) if kind == "category" else None
        marked = null and kind not in ("float", "category")
        return ColumnPieces(kind, len(self._values), dtype, pieces, names, marked)

    def _plain(self, kind: str, read: Callable[[str], Any] | None) -> Iterator[list[Any]]:
        """The values as Python has them, some after the other; lists and objects as JSON."""
        for kinds, numbers, reals, texts in self._values.pieces():
            found: list[Any] = []
            for of, number, real, text in zip(kinds, numbers, reals, texts, strict=True):
                match of:
                    case "null":
                        found.append(None)
                    case "boolean" | "integer":
                        found.append(number)
                    case "float":
                        found.append(real)
                    case "untyped":
                        assert read is not None
                        value = self._typed(text, read)
                        dumped = kind == "json" and value is not None
                        found.append(self._json(value, "corpus.columns") if dumped else value)
                    case _:
                        found.append(text)
            yield found

    def _pieces(
        self, kind: str, read: Callable[[str], Any] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The values as they are stored, and which are null, array after array."""
        places = {name: n for n, name in enumerate(self._names)}
        for values in self._plain(kind, read):
            null = np.array([v is None for v in values], "u1")
            match kind:
                case "category":
                    yield np.array([self._place(v, places) for v in values], "<i4"), null
                case "float":
                    yield np.array([self._float(v) for v in values], "<f8"), null
                case "integer" | "boolean":
                    yield np.array([v or 0 for v in values], _DTYPES[kind]), null
                case _:
                    yield fixed_strings(["" if v is None else v for v in values]), null

    def _place(self, name: str | None, places: dict[str, int]) -> int:
        """The number of a category; -1: none."""
        if name is not None and name not in places:
            raise self._mixed(name)
        return -1 if name is None else places[name]

    def _has_fraction(self, read: Callable[[str], Any]) -> bool:
        """Whether a text among integers is a number with a fraction."""
        return any(isinstance(v, float) for values in self._plain("", read) for v in values)

    def _guessed(self) -> str:
        """The type of a column of texts: of numbers or truth values only where each of them is one
        and nothing of it gets lost.
        """
        fits = dict.fromkeys(_GUESSED, True)
        given = False
        for kinds, _, _, texts in self._values.pieces():
            for kind, text in zip(kinds, texts, strict=True):
                if kind == "untyped" and text:
                    given = True
                    for name, is_one in _GUESSED.items():
                        fits[name] = fits[name] and is_one(text)
            if not any(fits.values()):
                break
        fits["float"] = fits["float"] and not fits["whole"]  # of more than 64 bits: texts
        return next((k for k in ("integer", "boolean", "float") if given and fits[k]), "string")

    def _typed(self, value: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(value)
        except (ValueError, KeyError):
            raise self._mixed(value) from None

    def _mixed(self, value: str) -> CorpusError:
        known = " and ".join(_SAID[k] for k in self._first if k != "untyped")
        return CorpusError(
            f"corpus.columns: {self._name!r} is of mixed types over the files: {value[:40]!r} "
            f"in one, {known} in another; give it one type"
        )

    def _float(self, value: Any) -> float:
        if isinstance(value, int) and abs(value) > _EXACT:
            raise CorpusError(
                f"corpus.columns: {self._name!r} has {value} among numbers with a fraction, which "
                "no float holds; write its values as texts"
            )
        return math.nan if value is None else float(value)

    def write(self, group: h5py.Group, count: int) -> None:
        """Write the first values, for `add_kept` of another job.

        Args:
            group: of an open file.
            count: how many.
        """
        first = [(kind, place, n) for kind, (place, n) in self._first.items()]
        self._values.write(group, count, first, [*self._names.items()])

    def add_kept(self, kept: Values) -> None:
        """Take values of another job; their types have been `met`.

        Args:
            kept: the next ones.
        """
        for name, number in kept.names:
            self._names.setdefault(name, len(self._values) + number)
        self._values.extend(kept)

    def _json(self, value: Any, place: str) -> str:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise CorpusError(
                f"{place}: column {self._name!r} has lists or objects that are not JSON; make it a "
                "column of numbers or texts"
            ) from None
        rows.check_name(text, f"value of column {self._name!r}", place)
        return text


def _width(dtype: np.dtype) -> int:
    return dtype.itemsize if dtype.kind == "S" else 0


_TOGETHER = {"float": "integer", "category": "string"}  # types that one column may mix
_DTYPES = {n: np.dtype(STORED[n]) for n in ("integer", "float", "boolean", "category")}
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
    if not _is_whole(text):
        return float(text)
    if not _is_integer(text):
        raise ValueError(text)  # a float would lose digits
    return int(text)


def _is_whole(text: str) -> bool:
    return bool(_WHOLE.fullmatch(text))


def _is_integer(text: str) -> bool:
    """Whether a text is an integer of 64 bits, of which the least one has 20 characters."""
    return _is_whole(text) and len(text) <= 20 and -_LARGEST <= int(text) < _LARGEST


def _is_real(text: str) -> bool:
    """Whether a text is a number with a fraction: one that begins with zeros may be a name."""
    return bool(_REAL.fullmatch(text)) and not re.match(r"[+-]?0[0-9]|\+", text)


# What all texts of a column may be
_GUESSED: dict[str, Callable[[str], bool]] = {
    "whole": _is_whole,
    "integer": lambda text: len(text) < 20 and _is_integer(text),
    "boolean": _TRUTH.__contains__,
    "float": lambda text: _is_real(text) or (_is_whole(text) and len(text) < 16),
}
_READ: dict[str, Callable[[str], Any]] = {
    "integer": lambda text: int(text) if text else None,
    "boolean": lambda text: _TRUTH[text] if text else None,
    "float": lambda text: float(text) if text else None,
    "string": str,
}


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

    def typed(self) -> dict[str, ColumnPieces]:
        """The columns, each of one type.

        Returns:
            By name, with a value for each document.

        Raises:
            CorpusError: no type fits all values of a column.
        """
        return {name: collected.column() for name, collected in self._collected.items()}

    def write(self, file: h5py.File, count: int) -> None:
        """Write the values of the first documents, for `add_kept` of another job.

        Args:
            file: of the part, open.
            count: how many documents.
        """
        for number, collected in enumerate(self._collected.values()):
            collected.write(file.create_group(f"columns/{number}"), count)

    def add_kept(self, kept: Sequence[Values]) -> None:
        """Take the values of documents of another job.

        Args:
            kept: of each column, those of the same documents.

        Raises:
            CorpusError: a column is of mixed types.
        """
        columns = list(self._collected.values())
        firsts = [
            (number, at, kind, place)
            for at, values in enumerate(kept)
            for kind, place, number in values.first
        ]
        for number, at, kind, place in sorted(firsts):
            columns[at].met(kind, place, number)
        for collected, values in zip(columns, kept, strict=True):
            collected.add_kept(values)


def of_integers(numbers: Numbers) -> ColumnPieces:
    """A column of integers.

    Args:
        numbers: one for each document.

    Returns:
        The column, none of whose values is missing.
    """
    return _without_nulls("integer", numbers, np.dtype("<i8"))


def of_strings(kind: str, strings: Strings) -> ColumnPieces:
    """A column of texts.

    Args:
        kind: its type, `string` or `json`.
        strings: one for each document.

    Returns:
        The column, none of whose values is missing.
    """
    return _without_nulls(kind, strings, strings.dtype)


def _without_nulls(kind: str, values: Numbers | Strings, dtype: np.dtype) -> ColumnPieces:
    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for piece in values.pieces():
            yield piece, np.zeros(len(piece), "u1")

    return ColumnPieces(kind, len(values), dtype, pieces)
