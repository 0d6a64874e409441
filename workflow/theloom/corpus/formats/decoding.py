"""Files as text, in any encoding and also compressed: what is not of the encoding has a line and a
column, and no line or file is longer than a document may be.
"""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import zstandard

from theloom.corpus import rows
from theloom.corpus.formats import shares
from theloom.corpus.formats.shares import Share
from theloom.errors import CorpusError, printable

PACKED = (".gz", ".zst")
"""Suffixes of files that are unpacked as they are read."""

MOST_OF_A_ROW = 2  # times the text's own characters: escapes, and other columns

# codecs of Python that take any bytes, or names of hosts, for characters
_NO_TEXT = ("undefined", "idna", "punycode", "unicode-escape", "raw-unicode-escape")

_MOST_BYTES = 4  # of a character in any encoding

_SHOWN = 1 << 16  # characters of a line that are looked at before its length

_PIECE = 1 << 10  # bytes that are unpacked at once: zstd makes at most 32 MiB of them

_MARK = "theloom.mark"
_MARKED = 0xDC00  # a byte that is not of the encoding becomes this surrogate plus the byte
_OWN_BOM = ("utf-8-sig", "utf-16", "utf-32")  # encodings that take the byte order mark themselves


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(_MARKED + error.object[error.start]), error.end


codecs.register_error(_MARK, _mark)


def kind_of(name: str) -> str:
    """The suffix of a file's name that tells what it holds.

    Args:
        name: of the file, with or without its folders.

    Returns:
        In lower case, with its dot, without that of a packed file; empty where there is none.

    Examples:
        >>> kind_of("a.b/Texts.JSONL.gz"), kind_of("notes.txt"), kind_of("x.gz")
        ('.jsonl', '.txt', '')
    """
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def check_encoding(encoding: str) -> None:
    """Check that Python knows an encoding, and that it is one of texts.

    Args:
        encoding: its name.

    Raises:
        CorpusError: it is not.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
        "a".encode(encoding)
        is_text = codecs.lookup(encoding).name.replace("_", "-") not in _NO_TEXT
    except (LookupError, ValueError):  # encoding errors are ValueErrors
        is_text = False
    if not is_text:
        raise CorpusError(
            f"corpus.encoding: Python knows no encoding {encoding!r}; try utf-8 or latin-1"
        )


class _Zstd(io.RawIOBase):
    """A zstd file unpacked as it is read; one that is cut short is an EOFError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._made, self._rest = file, b"", b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made:
            piece, self._rest = self._rest or self._file.read(_PIECE), b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("cut short")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._made = self._frame.decompress(piece)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(self._made), len(buffer))
        buffer[:size], self._made = self._made[:size], self._made[size:]
        return size


def unpacked(file: BinaryIO, name: str) -> Any:
    """The content of an open file, unpacked where its name says that it is packed.

    Args:
        file: open, as bytes.
        name: of it; `.gz` and `.zst` are unpacked.

    Returns:
        A file of bytes to read from; the same one where nothing is packed.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Zstd(file), 1 << 16) if suffix == ".zst" else file


@contextmanager
def whole(file: Path, name: str) -> Iterator[BinaryIO]:
    """A file as bytes.

    Args:
        file: its path.
        name: of it, in messages.

    Yields:
        The open file, as it lies on disk.

    Raises:
        CorpusError: it cannot be read or unpacked, or it changes while it is read.
    """
    try:
        with file.open("rb") as f:
            before = os.fstat(f.fileno())
            yield f
            after = os.fstat(f.fileno())
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{printable(name)}: cannot be unpacked ({printable(str(error))[:200]}); fetch or "
            "compress it again"
        ) from None
    except OSError as error:
        raise CorpusError(f"{printable(name)}: cannot be read: {error.strerror or error}") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CorpusError(
            f"{printable(name)}: changed while it was read; run again when it is complete"
        )


@contextmanager
def opened(file: Path, name: str, encoding: str, newline: str | None) -> Iterator[TextIO]:
    """A file as text, without its byte order mark; bytes that are not of the encoding are marked.

    Args:
        file: its path.
        name: of it, in messages.
        encoding: of it.
        newline: as `open` takes it.

    Yields:
        The open file, unpacked.

    Raises:
        CorpusError: as of `whole`, or it is of another encoding.
    """
    with whole(file, name) as raw, _decoded(name, encoding):

        def content() -> Any:
            raw.seek(0)
            return unpacked(raw, name)

        text = _without_mark(content, encoding, newline)
        yield text
        text.detach()


def _without_mark(
    content: Callable[[], Any], encoding: str, newline: str | None
) -> io.TextIOWrapper:
    """A file's content as text, behind its byte order mark."""
    text = io.TextIOWrapper(content(), encoding, _MARK, newline)
    if codecs.lookup(encoding).name in _OWN_BOM or text.read(1) != "\ufeff":
        text.detach()
        text = io.TextIOWrapper(content(), encoding, _MARK, newline)
    return text


@contextmanager
def _decoded(name: str, encoding: str) -> Iterator[None]:
    """Turn an error of an encoding into a CorpusError."""
    try:
        yield
    except UnicodeError as error:
        other = f"{encoding}-le or {encoding}-be" if "BOM" in str(error) else "another one"
        raise CorpusError(
            f"{printable(name)}: not {printable(encoding)} ({error}); "
            f"set corpus.encoding to {other}"
        ) from None


def lines_of(
    file: Path, name: str, encoding: str, share: Share | None, mark: bytes = b""
) -> Iterator[tuple[int, str]]:
    r"""The lines of a file, or of a share of it, with line ends as Python has them.

    Args:
        file: its path.
        name: of it, in messages.
        encoding: of it.
        share: the lines that begin in it, of a file that `shares.has_lines`; None: all.
        mark: lines without it at their start go with those before them.

    Yields:
        The number of each line in the whole file, from 1, and its text with the line end.

    Raises:
        CorpusError: as of `opened` and `lines`.
    """
    if share is None:
        with opened(file, name, encoding, newline=None) as f:
            yield from lines(f, name, encoding)
        return
    with whole(file, name) as raw, _decoded(name, encoding):
        first, end = (shares.line_start(raw, at, mark) for at in (share.first, share.end))
        if first >= end:
            return

        def content() -> Any:
            return io.BufferedReader(shares.Window(raw, first, end))

        if first == 0:
            text, before = _without_mark(content, encoding, None), 0
        else:  # there the codec would take another mark for the file's
            own = "utf-8" if codecs.lookup(encoding).name == "utf-8-sig" else encoding
            before = shares.lines_before(raw, first)
            text = io.TextIOWrapper(content(), own, _MARK, None)
        yield from lines(text, name, encoding, before)
        text.detach()


def read_text(file: Path, name: str, encoding: str) -> str:
    """All of a file.

    Args:
        file: its path.
        name: of it, in messages.
        encoding: of it.

    Returns:
        Its text, with line ends as they are.

    Raises:
        CorpusError: as of `opened`, a byte is not of the encoding, or the text is longer than a
            document may be.
    """
    with opened(file, name, encoding, newline="") as f:
        # refused by its size before it is read: it may be sparse
        small = file.stat().st_size <= _MOST_BYTES * rows.MAX_TEXT
        text = f.read(rows.MAX_TEXT + 1) if small else None
        if text is None or len(text) > rows.MAX_TEXT:
            raise rows.too_long(printable(name))
    check_decoded(text, printable(name), 1, encoding)
    return text


def lines(file: TextIO, name: str, encoding: str, before: int = 0) -> Iterator[tuple[int, str]]:
    """The lines of a file, decoded.

    Args:
        file: as `opened` gives it.
        name: of it, in messages.
        encoding: of it.
        before: lines that lie before the first one.

    Yields:
        The number of each line, from 1, and its text with the line end.

    Raises:
        CorpusError: a byte is not of the encoding, or a line is longer than a document's row may
            be.
    """
    number, most = before, MOST_OF_A_ROW * rows.MAX_TEXT
    while line := file.readline(most + 1):
        number += 1
        check_decoded(line[:_SHOWN], printable(name), number, encoding)
        if len(line) > min(_SHOWN, most):
            if len(line) > most:
                raise rows.too_long(f"{printable(name)}, line {number}")
            check_decoded(line, printable(name), number, encoding)
        yield number, line


def check_decoded(text: str, name: str, line: int, encoding: str) -> None:
    """Check that a text has no byte that is not of the encoding, and no NUL, which no text has but
    one of another encoding.

    Args:
        text: as a file of `opened` gives it.
        name: of the file, in messages.
        line: the number of the text's first line.
        encoding: of the file.

    Raises:
        CorpusError: it has one; the message tells line and column.
    """
    wrong = rows.surrogate(text)
    at = text.find("\0") if wrong is None else wrong
    if at < 0:
        return
    byte, row = ord(text[at]), line + text.count("\n", 0, at)
    column = at - text.rfind("\n", 0, at)
    if _MARKED <= byte < _MARKED + 256:
        byte -= _MARKED
    what = f"byte 0x{byte:02x}" if byte < 256 else f"U+{byte:04X}"
    advice = "convert the file or set corpus.encoding"
    if byte == 0 or (row == column == 1 and byte in (0xFE, 0xFF)):
        advice += " (utf-16 or utf-32, by its looks)"
    raise CorpusError(
        f"{name}, line {row}: not {printable(encoding)} ({what}, column {column}); {advice}"
    )
