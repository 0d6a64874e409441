"""Shares of a file: ranges of its bytes, of which one job reads what begins there.

Shares that lie one after the other have every line once: a line is of the share in which its first
byte lies, whatever its length.
"""

import codecs
import io
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

_PIECE = 1 << 20  # bytes that are read at once
_LINE_END = re.compile(rb"\r\n?|\n")
# Encodings in which the bytes of line ends are line ends, and nothing else is
_OF_LINES = re.compile(r"utf-8|utf-8-sig|ascii|latin-1|(iso8859|iso-8859|cp125|koi8-).*")


@dataclass(frozen=True)
class Share:
    """Bytes of a file, from `first` to the one before `end`."""

    first: int
    end: int

    def __contains__(self, at: int) -> bool:
        return self.first <= at < self.end


@dataclass(frozen=True)
class Part:
    """One of several jobs that read a corpus together: `number` from 0, of `count`."""

    number: int
    count: int

    def share(self, total: int) -> Share:
        """What is this job's of so many bytes or rows.

        Args:
            total: of the whole corpus.

        Returns:
            A range; those of all jobs follow one another.

        Examples:
            >>> [Part(n, 3).share(10) for n in (0, 2)]
            [Share(first=0, end=3), Share(first=6, end=10)]
        """
        return Share(*(total * n // self.count for n in (self.number, self.number + 1)))


def has_lines(encoding: str) -> bool:
    """Whether the bytes of a line's end are those of ASCII, and part of no other character.

    Args:
        encoding: its name, which Python knows.

    Returns:
        True where a file can be read from any line on.

    Examples:
        >>> has_lines("UTF8"), has_lines("latin1"), has_lines("utf-16"), has_lines("utf-7")
        (True, True, False, False)
    """
    return bool(_OF_LINES.fullmatch(codecs.lookup(encoding).name.replace("_", "-")))


def line_start(raw: BinaryIO, at: int, mark: bytes = b"") -> int:
    r"""Where the first line starts that does so at an offset or behind it.

    Args:
        raw: the open file.
        at: the offset in bytes.
        mark: what a line behind the file's first byte begins with; empty: any line will do.

    Returns:
        Its offset; the file's size where there is none. Lines end with `\n`, `\r\n` or `\r`.

    Examples:
        >>> [line_start(io.BytesIO(b"ab\r\nc\n"), at) for at in range(8)]
        [0, 4, 4, 4, 4, 6, 6, 6]
        >>> line_start(io.BytesIO(b">a\nAC\n>b\n"), 1, b">")
        6
    """
    size = raw.seek(0, 2)
    if at <= 0:
        return 0
    begin = at - 1
    raw.seek(begin)
    while piece := raw.read(_PIECE):
        piece += _rest(raw, piece, len(mark))
        for found in _LINE_END.finditer(piece):
            start = begin + found.end()
            if start >= at and piece.startswith(mark, found.end()):
                return start
        begin += len(piece)
        if begin >= size:
            break
        begin -= len(mark)  # which may follow the piece's last line end
        raw.seek(begin)
    return size


def _rest(raw: BinaryIO, piece: bytes, more: int) -> bytes:
    r"""Bytes behind a piece: so many, and one where it ends between `\r` and `\n`."""
    rest = raw.read(more)
    if (piece + rest).endswith(b"\r"):
        rest += raw.read(1)
    return rest


def lines_before(raw: BinaryIO, at: int) -> int:
    r"""How many lines end before an offset at which a line starts.

    Args:
        raw: the open file.
        at: the offset in bytes.

    Returns:
        Lines, ended by `\n`, `\r\n` or `\r`.

    Examples:
        >>> lines_before(io.BytesIO(b"a\r\nb\rc\nd"), 7)
        3
    """
    raw.seek(0)
    count, last = 0, b""
    while at > 0 and (piece := raw.read(min(at, _PIECE))):
        at -= len(piece)
        count += piece.count(b"\n")
        if b"\r" in piece:
            count += piece.count(b"\r") - piece.count(b"\r\n")
        count -= last == b"\r" and piece.startswith(b"\n")
        last = piece[-1:]
    return count


class Window(io.RawIOBase):
    """Bytes of an open file as a file of their own.

    Args:
        raw: the open file.
        first: the first byte.
        end: the one after the last.
    """

    def __init__(self, raw: BinaryIO, first: int, end: int) -> None:
        self._raw, self._left = raw, end - first
        raw.seek(first)

    def readable(self) -> bool:
        """Whether it can be read.

        Returns:
            True.
        """
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes.

        Args:
            buffer: takes them.

        Returns:
            How many there were.
        """
        read = self._raw.read(min(len(buffer), self._left))
        buffer[: len(read)] = read
        self._left -= len(read)
        return len(read)
