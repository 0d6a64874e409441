"""Rows of one dataset over all files that hold them, mapped into memory."""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Self, Union

import numpy as np

from theloom.dataset.maps import Maps, release
from theloom.dataset.parts import Part
from theloom.precision import read_as
from theloom.store.encoding import scaled
from theloom.store.hdf5 import element_types

if TYPE_CHECKING:
    import torch


Index = Union[int, slice, EllipsisType, Sequence[int], np.ndarray, "torch.Tensor"]


class Rows:
    """The rows of one dataset, over all files that hold them. Indexing gives a copy.

    `rows[i]`, `rows[a:b:c]`, `rows[[3, 1, 2]]` (any order, repeats allowed), `rows[mask]`.
    """

    def __init__(
        self, parts: Sequence[Part], maps: Maps, name: str, width: tuple[int, ...], dtype: np.dtype
    ) -> None:
        self._parts = [p for p in parts if p.count(name)]
        self._maps, self._name, self._dtype = maps, name, dtype
        self._starts = np.cumsum([0, *(p.count(name) for p in self._parts)])
        self._taken: np.ndarray | None = None
        self.shape = (int(self._starts[-1]), *width)

    def taking(self, rows: np.ndarray | None) -> Self:
        """The same dataset, of which these rows alone are seen, in this order.

        Args:
            rows: their numbers, (n,); None: all.

        Returns:
            A view; nothing is read.
        """
        if rows is None:
            return self
        seen = copy.copy(self)
        seen._taken = rows if self._taken is None else self._taken[rows]
        seen.shape = (len(rows), *self.shape[1:])
        return seen

    @cached_property
    def _arrays(self) -> list[Any]:
        return [self._maps.rows(p, self._name, self.shape[1:], self._dtype) for p in self._parts]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def stored(self) -> np.dtype:
        """The type of `numpy`: of the stored bits, or of token numbers."""
        return self._dtype

    @property
    def is_remote(self) -> bool:
        """Whether reading them means requests over a network."""
        return any(not isinstance(p.path, Path) for p in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as they are stored, uncompressed."""
        return math.prod(self.shape) * self._dtype.itemsize

    @property
    def on_disk(self) -> "Sequence[Rows]":
        """What is stored: these rows; or codes, then scales, from which they are decoded."""
        return [self]

    def numpy(self, index: Index) -> np.ndarray:
        """Rows as an array.

        Args:
            index: a number, a slice, an array of numbers in any order, or a mask; `...`: all rows.

        Returns:
            The stored bits (`element_types.bits_dtype`), or token numbers; always a copy.

        Raises:
            IndexError: a row is beyond the dataset, or a mask has another length.
        """
        if isinstance(index, EllipsisType):
            index = slice(None)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
            return self._gather(np.arange(start, stop, step))
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            return self._gather(np.array([index % len(self)]))[0]
        wanted = np.asarray(index)
        if wanted.dtype == bool:
            if wanted.shape != (len(self),):
                raise IndexError(f"a mask of shape {wanted.shape} for {len(self)} rows")
            wanted = wanted.nonzero()[0]
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        return self._gather(wanted.astype(np.int64) % max(1, len(self)))

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill an array with consecutive rows.

        Args:
            out: (rows, …) of `stored`.
            start: the first row.
        """
        stop = start + len(out)
        if self._taken is not None:
            out[:] = self._gather(np.arange(start, stop))
            return
        number = int(np.searchsorted(self._starts, start, "right")) - 1
        while number < len(self._arrays) and self._starts[number] < stop:
            first, array = int(self._starts[number]), self._arrays[number]
            a, b = max(start, first), min(stop, first + len(array))
            if hasattr(array, "read_into"):  # over a network: nothing is copied twice
                array.read_into(out[a - start : b - start], a - first)
            else:
                out[a - start : b - start] = array[a - first : b - first]
            number += 1

    def release(self, rows: slice) -> None:
        """Give back the memory of consecutive rows that were read: mapped pages count as this
        process's until then. They may be read again.

        Args:
            rows: which.
        """
        if self._taken is not None:
            return
        number = int(np.searchsorted(self._starts, rows.start, "right")) - 1
        while number < len(self._arrays) and self._starts[number] < rows.stop:
            first, array = int(self._starts[number]), self._arrays[number]
            if isinstance(array, np.ndarray) and isinstance(self._parts[number].path, Path):
                release(array[max(0, rows.start - first) : rows.stop - first])
            number += 1

    def _range(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self._dtype)
        if len(out):
            self.read_into(out, start)
        return out

    def _gather(self, wanted: np.ndarray) -> np.ndarray:
        flat = wanted.reshape(-1)
        if self._taken is not None:
            flat = self._taken[flat]
        out = np.empty((*flat.shape, *self.shape[1:]), self._dtype)
        numbers = np.searchsorted(self._starts, flat, "right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            out[here] = self._arrays[number][flat[here] - self._starts[number]]
        return out.reshape(*wanted.shape, *self.shape[1:])


class RowNumbers(Rows):
    """The number of each row: in shuffled batches it identifies the row."""

    def __init__(self, count: int) -> None:
        super().__init__([], Maps(), "", (), np.dtype("<i8"))
        self.shape = (count,)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Write the numbers of consecutive rows.

        Args:
            out: (n,), which is filled.
            start: the first row that is seen.
        """
        rows = slice(start, start + len(out))
        out[:] = np.arange(rows.start, rows.stop) if self._taken is None else self._taken[rows]


class HookRows(Rows):
    """The rows of one hook point: an array on disk, whose rows are read when it is indexed.

    Indexing returns tensors (rows, …) in the stored dtype, and takes what `Rows` takes for the
    rows, then any index for the axes after: `rows[0:10, 5]`. `numpy.asarray(rows)` reads all of
    them (BF16 becomes float32, since NumPy has no bfloat16), and so does `torch.as_tensor(rows)`.
    """

    def __init__(
        self, parts: Sequence[Part], maps: Maps, name: str, width: tuple[int, ...], precision: str
    ) -> None:
        super().__init__(parts, maps, name, width, element_types.bits_dtype(precision))
        self._precision = precision

    def __repr__(self) -> str:
        hook = self._name.split("/")[1]
        return f"<rows of {hook}: shape {self.shape}, {self.dtype}>"

    def __getitem__(self, index: "Index | tuple[Any, ...]") -> "torch.Tensor":
        if not isinstance(index, tuple):
            return self.tensor(self.numpy(index))
        rows, *rest = index or (...,)
        found = self.tensor(self.numpy(rows))
        if found.ndim < self.ndim:  # a single row
            return found[tuple(rest)]
        if isinstance(rows, EllipsisType):
            return found[(..., *rest)]
        if isinstance(rows, slice):
            return found[(slice(None), *rest)]
        import torch

        axes = map(torch.arange, found.shape[: found.ndim - self.ndim + 1])
        own = torch.meshgrid(*axes, indexing="ij")
        return found[(*own, *rest)]

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows are on disk: an array of them is a copy")
        rows = self[:]
        array = (rows.float() if self._precision == "bf16" else rows).numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        return self[:].__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self[:0].__dlpack_device__()

    @property
    def dtype(self) -> "torch.dtype":
        """The stored one."""
        from theloom.precision import torch_dtype

        return torch_dtype(self._precision)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def tensor(self, bits: np.ndarray) -> "torch.Tensor":
        """A tensor in the stored dtype over the memory of an array of bits.

        Args:
            bits: what a read returned: integers of the width of an element.

        Returns:
            A tensor of the same shape; nothing is copied.
        """
        return element_types.tensor_from_bits(bits, self._precision)


class ScaledRows(HookRows):
    """The rows of a hook point that are stored as codes, with a scale for each row: they are
    decoded to FP32 when they are read, whatever reads them.

    Args:
        codes: their codes.
        scales: their scales.
        precision: of the store, `fp8_e4m3` or `int8`.
    """

    def __init__(self, codes: Rows, scales: Rows, precision: str) -> None:
        super().__init__([], codes._maps, codes._name, codes.shape[1:], read_as(precision))
        self.shape = codes.shape
        self._codes, self._scales, self._encoding = codes, scales, precision

    def taking(self, rows: np.ndarray | None) -> Self:
        """As `Rows.taking`.

        Args:
            rows: their numbers, (n,); None: all.

        Returns:
            A view; nothing is read.
        """
        seen = copy.copy(self)
        seen._codes, seen._scales = self._codes.taking(rows), self._scales.taking(rows)
        seen.shape = seen._codes.shape
        return seen

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return self._codes.nbytes + self._scales.nbytes

    @property
    def on_disk(self) -> Sequence[Rows]:
        """Codes, then scales."""
        return [self._codes, self._scales]

    def rounding(self, index: Index) -> np.ndarray:
        """How far rows may be from those that were encoded, which is known from what is stored.

        Args:
            index: as of `numpy`, but no single number.

        Returns:
            (rows, …) float64: the largest difference of each value.
        """
        codes, scales = self._codes.numpy(index), self._scales.numpy(index)
        return scaled.rounding(codes, scales, self._encoding)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """As `Rows.read_into`.

        Args:
            out: (rows, …) of `stored`.
            start: the first row.
        """
        rows = slice(start, start + len(out))
        codes, scales = self._codes.numpy(rows), self._scales.numpy(rows)
        scaled.decode(codes, scales, self._encoding, out.view("<f4"))

    def _gather(self, wanted: np.ndarray) -> np.ndarray:
        flat = wanted.reshape(-1)
        codes, scales = self._codes.numpy(flat), self._scales.numpy(flat)
        values = scaled.decode(codes, scales, self._encoding).view(self._dtype)
        return values.reshape(*wanted.shape, *self.shape[1:])
