"""Lists with an entry for each document, which memory does not hold: beyond a megabyte they are in
a temporary file.
"""

import os
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from typing import IO

import h5py
import numpy as np
import xxhash

from theloom.store.hdf5.pieces import write_array

_SPOOLED = 1 << 20  # bytes that are written to a temporary file together
_TEXTS, _BYTES = 1 << 13, 1 << 22  # texts of an array, and its bytes unless one text has more
_NUMBERS = 1 << 15  # numbers of an array
_NUMBER = 8  # bytes of a number


class Spool:
    """Bytes that only grow. Those that memory shall not hold are in a temporary file, which goes
    with the process.

    Examples:
        >>> spool = Spool()
        >>> spool.add(b"abc")
        >>> len(spool), spool.read(1, 3), list(spool.pieces())
        (3, b'bc', [b'abc'])
    """

    def __init__(self) -> None:
        self._waiting, self._size = bytearray(), 0
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
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this
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
        size = max(_SPOOLED // _NUMBER, 1) * _NUMBER
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


class Numbers:
    """Integers one after the other.

    Attributes:
        total: their sum.

    Examples:
        >>> numbers = Numbers()
        >>> numbers.append(5)
        >>> numbers.extend(np.array([1, 2]))
        >>> len(numbers), numbers.total, [piece.tolist() for piece in numbers.pieces()]
        (3, 8, [[5, 1, 2]])
    """

    def __init__(self) -> None:
        self._spool, self.total = Spool(), 0

    def append(self, number: int) -> None:
        """Take another integer.

        Args:
            number: of 64 bits.
        """
        self._spool.add(number.to_bytes(_NUMBER, "little", signed=True))
        self.total += number

    def extend(self, numbers: np.ndarray) -> None:
        """Take other integers.

        Args:
            numbers: (numbers,) of any integer type.
        """
        self._spool.add(numbers.astype("<i8").tobytes())
        self.total += int(numbers.sum())

    def __len__(self) -> int:
        return len(self._spool) // _NUMBER

    def pieces(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Give all integers, array after array.

        Args:
            size: integers of an array; None: some tens of thousands.

        Yields:
            Arrays (numbers,) of int64.
        """
        size = size or _NUMBERS
        for first in range(0, len(self), size):
            stop = min(first + size, len(self))
            yield np.frombuffer(self._spool.read(_NUMBER * first, _NUMBER * stop), "<i8")

    def write(self, file: h5py.Group, name: str, count: int | None = None) -> None:
        """Write the integers as a dataset of int64.

        Args:
            file: the open file, or a group of it.
            name: of the dataset.
            count: how many; None: all.
        """
        self._spool.write(file, name, "<i8", count)


class Strings:
    """Texts one after the other.

    Examples:
        >>> strings = Strings()
        >>> strings.append("é")
        >>> len(strings), strings.dtype.str
        (1, '|S2')
    """

    def __init__(self) -> None:
        self._bytes, self._ends, self._longest = Spool(), Spool(), 1

    def append(self, text: str) -> None:
        """Take another text.

        Args:
            text: the text.
        """
        encoded = text.encode()
        self._bytes.add(encoded)
        self._ends.add(len(self._bytes).to_bytes(_NUMBER, "little"))
        self._longest = max(self._longest, len(encoded))

    def extend(self, texts: bytes, ends: np.ndarray) -> None:
        """Take other texts.

        Args:
            texts: all of them, in UTF-8.
            ends: the byte after each, (texts,) of int64.
        """
        if len(ends):
            longest = int(np.diff(ends, prepend=0).max())
            self._ends.add((ends + len(self._bytes)).astype("<i8").tobytes())
            self._bytes.add(bytes(texts))
            self._longest = max(self._longest, longest)

    def write(self, file: h5py.Group, name: str, count: int | None = None) -> None:
        """Write the texts as `extend` takes them.

        Args:
            file: the open file, or a group of it.
            name: of the dataset with all their bytes, in UTF-8; that of the byte after each text,
                int64, is called so too, with `_end`.
            count: how many; None: all.
        """
        count = len(self) if count is None else count
        self._bytes.write(file, name, "u1", self._end(count))
        self._ends.write(file, f"{name}_end", "<i8", count)

    def _end(self, count: int) -> int:
        """The byte after the first texts."""
        found = self._ends.read(_NUMBER * (count - 1), _NUMBER * count) if count else b""
        return int.from_bytes(found, "little")

    def __len__(self) -> int:
        return len(self._ends) // _NUMBER

    @property
    def dtype(self) -> np.dtype:
        """Of an array that holds them all."""
        return np.dtype(f"S{self._longest}")

    def pieces(self) -> Iterator[np.ndarray]:
        """Give all texts, array after array.

        Yields:
            Arrays (texts,) of `dtype`, in UTF-8.
        """
        for texts in self.lists(max(1, min(_TEXTS, _BYTES // self._longest))):
            yield np.array(texts, self.dtype)

    def lists(self, size: int) -> Iterator[list[bytes]]:
        """Give all texts, list after list.

        Args:
            size: texts of a list.

        Yields:
            Lists of texts, in UTF-8.
        """
        begin = 0
        for first in range(0, len(self), size):
            stop = min(first + size, len(self))
            ends = np.frombuffer(self._ends.read(_NUMBER * first, _NUMBER * stop), "<i8").tolist()
            block = self._bytes.read(begin, ends[-1])
            yield [block[a - begin : b - begin] for a, b in pairwise([begin, *ends])]
            begin = ends[-1]

    def digest(self) -> str:
        """Hash all texts, one after the other.

        Returns:
            XXH3-128 in hexadecimal.
        """
        state = xxhash.xxh3_128()
        for piece in self._bytes.pieces():
            state.update(piece)
        return state.hexdigest()
