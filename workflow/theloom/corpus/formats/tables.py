"""Rows of files of text: the lines of JSON, the objects of a JSON file, CSV and TSV."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.corpus.formats import decoding
from theloom.corpus.formats.shares import Share
from theloom.corpus.rows import Document, Untyped
from theloom.errors import CorpusError, printable

DELIMITERS = {".csv": ",", ".tsv": "\t"}

_BLANK = " \t\n\r"
_PIECE = 1 << 16  # characters of a .json file that are read at once


def json_lines(
    file: Path, name: str, config: CorpusConfig, share: Share | None = None
) -> Iterator[Document]:
    """The documents of a file with an object on each line; empty lines are skipped.

    Args:
        file: its path.
        name: of it, in messages and ids.
        config: the `corpus` settings.
        share: the lines that begin in it are read; None: all.

    Yields:
        The documents in the order of the file.

    Raises:
        CorpusError: the file cannot be read, or a line is no JSON or no row of the corpus.
    """
    once = _once(config)
    for number, line in decoding.lines_of(file, name, config.encoding, share):
        place = f"{printable(name)}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{place}: not JSON ({_reason(error)}); each line of a .jsonl file is one object"
            ) from None
        yield rows.of_row(row, f"{name}:{number}", place, config)


def json_file(file: Path, name: str, config: CorpusConfig) -> Iterator[Document]:
    """The documents of a file with a list of objects, or with objects one after the other.

    Args:
        file: its path.
        name: of it, in messages and ids.
        config: the `corpus` settings.

    Yields:
        The documents in the order of the file.

    Raises:
        CorpusError: the file cannot be read, is no JSON, or an object is no row of the corpus.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once(config))
    with decoding.opened(file, name, config.encoding, newline=None) as f:
        text = _Text(f, name, config.encoding)
        listed = text.next() == "["
        if listed:
            text.skip()
        number = 0
        while (begins := text.next()) and not (listed and begins == "]"):
            if listed and number:
                if begins != ",":
                    raise text.wrong("a comma or the end of the list is missing")
                text.skip()
                text.next()
            number += 1
            row = text.value(decoder)
            place = f"{printable(name)}, row {number}"
            yield rows.of_row(row, f"{name}:{number}", place, config)
        if listed:
            if not begins:
                raise text.wrong("the list has no end")
            text.skip()
            if text.next():
                raise text.wrong("more after the list")


class _Text:
    """The text of a .json file, as much of it as the value that is read needs."""

    def __init__(self, file: TextIO, name: str, encoding: str) -> None:
        self._file, self._name, self._encoding = file, name, encoding
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def next(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_PIECE):
                return ""

    def skip(self) -> None:
        """Pass the next character."""
        self._at += 1

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next value, which ends with its bracket. Raises CorpusError."""
        if self._text[self._at : self._at + 1] != "{":
            raise self.wrong("not an object")
        piece = _PIECE
        while True:
            try:
                found, self._at = decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                whole = isinstance(error, json.JSONDecodeError)
                if not whole or not self._more(piece):
                    raise self.wrong(_reason(error), getattr(error, "pos", None)) from None
                if len(self._text) - self._at > decoding.MOST_OF_A_ROW * rows.MAX_TEXT:
                    raise rows.too_long(f"{printable(self._name)}, line {self._line}") from None
                piece *= 2
            else:
                return found

    def _more(self, size: int) -> bool:
        read = "" if self._ended else self._file.read(size)
        self._ended = len(read) < size
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + read, 0
        if read:
            line = self._line + self._text.count("\n", 0, len(self._text) - len(read))
            decoding.check_decoded(read, printable(self._name), line, self._encoding)
        return bool(read)

    def wrong(self, reason: str, at: int | None = None) -> CorpusError:
        line = self._line + self._text.count("\n", 0, self._at if at is None else at)
        return CorpusError(
            f"{printable(self._name)}, line {line}: not JSON as it should be ({reason}); a .json "
            "file is a list of objects, or one object after the other"
        )


def _once(config: CorpusConfig) -> Any:
    """What makes an object of its pairs, and refuses one that has a column of the run twice."""
    wanted = [column for _, column in rows.wanted(config)]

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            for key in wanted:
                if keys.count(key) > 1:
                    raise ValueError(f"the column {key!r} is there {keys.count(key)} times")
        return row

    return once


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(";")[0]  # a number of too many digits, or a column that is doubled


def delimited(file: Path, name: str, config: CorpusConfig) -> Iterator[Document]:
    """The rows of a CSV or TSV file, whose first row names the columns; quoted fields may have
    several lines.

    Args:
        file: its path.
        name: of it, in messages and ids; its suffix tells the delimiter.
        config: the `corpus` settings.

    Yields:
        The documents in the order of the file.

    Raises:
        CorpusError: the file cannot be read, lacks a column, or a row has another number of fields.
    """

    begun = [0]  # characters of the row that is read: one without an end would fill the memory

    def decoded(f: TextIO) -> Iterator[str]:
        for number, line in decoding.lines(f, name, config.encoding):
            begun[0] += len(line)
            if begun[0] > decoding.MOST_OF_A_ROW * rows.MAX_TEXT:
                raise rows.too_long(f"{printable(name)}, line {number}")
            yield line

    kind = decoding.kind_of(name)
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with decoding.opened(file, name, config.encoding, newline="") as f:
        reader = csv.reader(decoded(f), delimiter=DELIMITERS[kind], strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            begun[0] = 0
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise CorpusError(
                    f"{printable(name)}, line {start}: not a row of a {kind} file "
                    f"({error}); correct it"
                ) from None
            place, number, start = f"{printable(name)}, line {start}", start, reader.line_num + 1
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                rows.check_columns(config, header, place)
                continue
            if len(fields) != len(header):
                raise CorpusError(
                    f"{place}: {len(fields)} fields, and the header has {len(header)}; quote "
                    "fields that contain a delimiter, a quote or a line's end"
                )
            row = dict(zip(header, map(Untyped, fields), strict=True))
            yield rows.of_row(row, f"{name}:{number}", place, config)
