"""Values of one column of the corpus, as documents come and as a file of a part keeps them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import h5py
import numpy as np

from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.store.hdf5.spool import Spool

TYPES = ("null", "boolean", "integer", "float", "string", "category", "json", "untyped")
_CODES = {name: bytes([place]) for place, name in enumerate(TYPES)}
_TOGETHER = 1 << 12  # values of a piece


@dataclass
class Values:
    """Some values of one column, one after the other.

    Attributes:
        types: of each value, its place in `TYPES`, (values,) of uint8.
        numbers: the value of integers and truth values, the bits of a float, else 0; (values,) of
            int64.
        texts: of texts, names and JSON, else empty: all of them, in UTF-8.
        ends: the byte after each text, (values,) of int64.
        first: of each type of the column that is first met here its name, the place of its value,
            and that value's number from 0.
        names: of categories that first come here, each with the number of its value.
    """

    types: np.ndarray
    numbers: np.ndarray
    texts: bytes
    ends: np.ndarray
    first: list[tuple[str, str, int]]
    names: list[tuple[str, int]]


class ValueSpool:
    """The values of a column, of which memory holds a few megabytes."""

    def __init__(self) -> None:
        self._types, self._numbers, self._texts = Spool(), Numbers(), Strings()

    def __len__(self) -> int:
        return len(self._types)

    def add(self, kind: str, number: int, text: str) -> None:
        """Take another value.

        Args:
            kind: one of `TYPES`.
            number: as of `Values.numbers`.
            text: as of `Values.texts`.
        """
        self._types.add(_CODES[kind])
        self._numbers.append(number)
        self._texts.append(text)

    def extend(self, values: Values) -> None:
        """Take other values.

        Args:
            values: some of another job.
        """
        self._types.add(values.types.tobytes())
        self._numbers.extend(values.numbers)
        self._texts.extend(values.texts, values.ends)

    def pieces(self) -> Iterator[tuple[list[str], list[int], list[float], list[str]]]:
        """Give all values, some after the other.

        Yields:
            Type, number, the number as the bits of a float, and text of each value.
        """
        texts, at = self._texts.lists(_TOGETHER), 0
        numbers = self._numbers.pieces(_TOGETHER)
        for strings, array in zip(texts, numbers, strict=True):
            codes, at = self._types.read(at, at + len(array)), at + len(array)
            kinds = [TYPES[code] for code in codes]
            yield kinds, array.tolist(), array.view("<f8").tolist(), [s.decode() for s in strings]

    def write(
        self,
        group: h5py.Group,
        count: int,
        first: list[tuple[str, str, int]],
        names: list[tuple[str, int]],
    ) -> None:
        """Write the first values into a group, for `StoredValues`.

        Args:
            group: of an open file.
            count: how many.
            first: as of `Values`, of all values.
            names: as of `Values`, of all values.
        """
        self._types.write(group, "types", "u1", count)
        self._numbers.write(group, "numbers", count)
        self._texts.write(group, "texts", count)
        known = json.dumps([[f for f in first if f[2] < count], [n for n in names if n[1] < count]])
        group["known"] = np.frombuffer(known.encode(), "u1")


class StoredValues:
    """The values that `ValueSpool.write` wrote.

    Args:
        group: of the file, open.
    """

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        first, names = json.loads(group["known"][:].tobytes())
        self._first: list[tuple[str, str, int]] = [(kind, place, n) for kind, place, n in first]
        self._names: list[tuple[str, int]] = [(name, n) for name, n in names]

    def read(self, start: int, stop: int) -> Values:
        """Some of the values.

        Args:
            start: number of the first.
            stop: the number after the last.

        Returns:
            The values.
        """
        group = self._group
        begin, texts, ends = texts_of(group, "texts", start, stop)
        return Values(
            group["types"][start:stop],
            group["numbers"][start:stop],
            texts,
            ends - begin,
            [(kind, place, n - start) for kind, place, n in self._first if start <= n < stop],
            [(name, n - start) for name, n in self._names if start <= n < stop],
        )


def texts_of(file: h5py.Group, name: str, start: int, stop: int) -> tuple[int, bytes, np.ndarray]:
    """Some of the texts that `Strings.write` wrote.

    Args:
        file: the open file, or a group of it.
        name: of the texts.
        start: number of the first.
        stop: the number after the last.

    Returns:
        Their first byte in the dataset, the texts in UTF-8, and the byte of the dataset after each,
        (texts,) of int64.
    """
    ends = file[f"{name}_end"]
    begin = int(ends[start - 1]) if start else 0
    found = ends[start:stop]
    return begin, file[name][begin : int(found[-1]) if len(found) else begin].tobytes(), found
