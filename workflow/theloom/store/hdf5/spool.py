"""Bytes that memory does not hold: beyond a megabyte they are in a temporary file."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import h5py
import numpy as np

from theloom.store.hdf5.pieces import write_array

_SPOOLED = 1 << 20  # bytes that are written to a temporary file together
_ALIGNED = 8  # bytes of which a piece has a multiple


class Spool:
    """Bytes that only grow. Those that memory shall not hold are in a temporary file, which goes
    with the process.

    Args:
        folder: of the temporary file; None: the system's.

    Examples:
        >>> spool = Spool()
        >>> spool.add(b"abc")
        >>> len(spool), spool.read(1, 3), list(spool.pieces())
        (3, b'bc', [b'abc'])
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._waiting, self._size = folder, bytearray(), 0
        self._file: IO[bytes] | None = None

    def add(self, data: bytes) -> None:
        """Take more bytes.

        Args:
            data: the bytes.

        Raises:
            OSError: the disk of temporary files is full, or fails.
        """
        self._waiting += data
        self._size += len(data)
        if len(self._waiting) >= _SPOOLED:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  lives as long
            self._file.seek(0, os.SEEK_END)
            self._file.write(self._waiting)
            self._waiting.clear()

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, stop: int) -> bytes:
        """Some of the bytes.

        Args:
            start: the first.
            stop: the one after the last.

        Returns:
            The bytes.
        """
        kept = self._size - len(self._waiting)
        found = b""
        if self._file is not None and start < kept:
            self._file.seek(start)
            found = self._file.read(min(stop, kept) - start)
        return found + bytes(self._waiting[max(0, start - kept) : max(0, stop - kept)])

    def pieces(self, stop: int | None = None) -> Iterator[bytes]:
        """All bytes, piece after piece.

        Args:
            stop: how many there are taken; None: all.

        Yields:
            The bytes; in each piece but the last a multiple of 8.
        """
        stop = self._size if stop is None else stop
        size = max(_SPOOLED // _ALIGNED, 1) * _ALIGNED
        for start in range(0, stop, size):
            yield self.read(start, min(start + size, stop))

    def write(self, file: h5py.Group, name: str, kind: str, count: int | None = None) -> None:
        """Write the bytes as a dataset.

        Args:
            file: the open file, or a group of it.
            name: of the dataset.
            kind: NumPy's type of an entry, of 1 or 8 bytes.
            count: how many entries; None: all.
        """
        dtype = np.dtype(kind)
        count = self._size // dtype.itemsize if count is None else count
        arrays = (np.frombuffer(piece, dtype) for piece in self.pieces(count * dtype.itemsize))
        write_array(file, name, count, dtype, arrays)
