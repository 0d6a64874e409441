"""Lists with an entry for each document, which memory does not hold (`store.hdf5.spool`)."""

from collections.abc import Iterator
from itertools import pairwise

import h5py
import numpy as np
import xxhash

from theloom.store.hdf5.spool import Spool

_TEXTS, _BYTES = 1 << 13, 1 << 22  # texts of an array, and its bytes unless one text has more
_NUMBERS = 1 << 15  # numbers of an array
_NUMBER = 8  # bytes of a number


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
