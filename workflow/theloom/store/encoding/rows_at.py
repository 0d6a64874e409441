"""Where the rows of a hook point lie in a file: the elements, and the scales where rows have them.

The bytes that are hashed of consecutive rows are all of their elements, then all of their scales.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from theloom.precision import SCALE_BYTES, SCALED, read_as
from theloom.store.encoding import scaled
from theloom.store.hdf5 import element_types
from theloom.store.statistics import tile_rows

if TYPE_CHECKING:
    import torch


_TILES_AT_ONCE = 4  # that one read takes from the file


def parts_of(rows: "torch.Tensor", precision: str) -> list[memoryview]:
    """What a file gets of rows.

    Args:
        rows: (rows, …) on the CPU: in the stored dtype, or before they are encoded.
        precision: of the store.

    Returns:
        The bytes of the elements, and those of the scales where rows have them.
    """
    if precision not in SCALED:
        return [element_types.raw_bytes(rows)]
    codes = np.empty(tuple(rows.shape), element_types.bits_dtype(precision))
    scales = np.empty(len(rows), "<f4")
    step = tile_rows(rows[:1].numel()) * _TILES_AT_ONCE  # so that few rows are in memory as FP32
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        codes[part], scales[part] = scaled.encode(rows[part], precision)
    return [_bytes(codes), _bytes(scales)]


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")


@dataclass(frozen=True)
class RowsAt:
    """The rows of a hook point in a file.

    Args:
        precision: of the store.
        width: elements of a row.
        offset: of the first row's elements, in bytes.
        scale_offset: of the first row's scale; None: rows have none.
    """

    precision: str
    width: int
    offset: int
    scale_offset: int | None = None

    @property
    def places(self) -> list[tuple[int, int]]:
        """The offset and the bytes of a row, of each part of `parts_of`."""
        size = self.width * element_types.bits_dtype(self.precision).itemsize
        scales = [] if self.scale_offset is None else [(self.scale_offset, SCALE_BYTES)]
        return [(self.offset, size), *scales]

    def hashed(self, fd: int, begin: int, end: int) -> Iterator[bytes]:
        """The bytes of consecutive rows that their hash is of.

        Args:
            fd: of the file, open for reading.
            begin: the first row.
            end: the row after the last one.

        Yields:
            Bytes, in order.
        """
        for offset, size in self.places:
            for start, count in self._tiles(begin, end):
                yield os.pread(fd, count * size, offset + start * size)

    def tiles(self, fd: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """Consecutive rows as they are read, a few tiles of the statistics at a time.

        Where tiles begin depends on the rows alone, so that the statistics of an interrupted job
        equal those of an uninterrupted one to the bit.

        Args:
            fd: of the file, open for reading.
            begin: the first row.
            end: the row after the last one.

        Yields:
            The bits of rows in the precision `read_as`, (rows, elements of a row), as
            `element_types.bits_dtype` has them.
        """
        dtype = element_types.bits_dtype(self.precision)
        for start, count in self._tiles(begin, end):
            first, *rest = (
                os.pread(fd, count * size, offset + start * size) for offset, size in self.places
            )
            rows = np.frombuffer(first, dtype).reshape(count, -1)
            if rest:
                values = scaled.decode(rows, np.frombuffer(rest[0], "<f4"), self.precision)
                rows = values.view(element_types.bits_dtype(read_as(self.precision)))
            yield rows

    def _tiles(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        step = tile_rows(self.width) * _TILES_AT_ONCE
        for start in range(begin, end, step):
            yield start, min(step, end - start)
