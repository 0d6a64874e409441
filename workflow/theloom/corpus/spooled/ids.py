"""The ids of documents that were there before, of which memory holds a few megabytes."""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_CACHE = 16 << 10  # KiB of the table in memory
_TABLE = "CREATE TABLE ids (id BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID"


class SeenIds:
    """A set of ids, with a number for some of them. What memory shall not hold is in a temporary
    file, which goes with the process.

    Examples:
        >>> seen = SeenIds()
        >>> seen.add("a"), seen.add("a"), "a" in seen, "b" in seen
        (True, False, True, False)
        >>> seen.set_number("a", 2)
        >>> seen.number("a"), seen.number("b")
        (2, 1)
    """

    def __init__(self) -> None:
        with _disk():
            self._table = sqlite3.connect("", isolation_level=None)  # "": a temporary file
            for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE}"):
                self._table.execute(f"PRAGMA {setting}")
            self._table.execute(_TABLE)

    def add(self, name: str) -> bool:
        """Take an id.

        Args:
            name: the id.

        Returns:
            Whether it is new.

        Raises:
            OSError: the disk of temporary files is full, or fails.
        """
        with _disk():
            insert = "INSERT OR IGNORE INTO ids VALUES (?, 1)"
            return self._table.execute(insert, (name.encode(),)).rowcount == 1

    def __contains__(self, name: str) -> bool:
        with _disk():
            select = "SELECT 1 FROM ids WHERE id = ?"
            return self._table.execute(select, (name.encode(),)).fetchone() is not None

    def number(self, name: str) -> int:
        """The number of an id.

        Args:
            name: the id.

        Returns:
            As of `set_number`; 1: it has none.
        """
        with _disk():
            select = "SELECT number FROM ids WHERE id = ?"
            found = self._table.execute(select, (name.encode(),)).fetchone()
            return 1 if found is None else int(found[0])

    def set_number(self, name: str, number: int) -> None:
        """Give an id that is there a number.

        Args:
            name: the id.
            number: of 64 bits.

        Raises:
            OSError: as of `add`.
        """
        with _disk():
            update = "UPDATE ids SET number = ? WHERE id = ?"
            self._table.execute(update, (number, name.encode()))


@contextmanager
def _disk() -> Iterator[None]:
    """Turn an error of SQLite over its file into that of the disk."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number), tempfile.gettempdir()) from error
