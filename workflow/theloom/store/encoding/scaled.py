"""Rows of one byte an element: `fp8_e4m3` and `int8`, each row with a scale of its own in FP32.

A value is its code times the size of the row's scale. Codes of `fp8_e4m3` are the numbers of
`torch.float8_e4m3fn`, those of `int8` integers from -127 to 127. The scale maps the row's largest
absolute value to the largest code, so nothing overflows; a row of zeros has the scale 1.

Neither type has an infinity, and integers have no NaN. So a row with values that are not finite has
a negative scale: in it the largest code and its negative are the infinities, finite values reach
the next smaller code, and NaN is the code of NaN, or -128. Both kinds of values are kept where they
are, but for the bits within a NaN.
"""

import math
from functools import cache
from typing import TYPE_CHECKING

import h5py
import numpy as np

from theloom.precision import SCALED

if TYPE_CHECKING:
    import torch


_FLOAT32 = np.finfo("<f4")
_INFINITE = {"fp8_e4m3": 0x7E, "int8": 127}  # codes, in rows with a negative scale
_LARGEST_FINITE = {"fp8_e4m3": 416, "int8": 126}  # in these rows
_NAN = {"fp8_e4m3": 0x7F, "int8": -128}

_FORMULA = {
    "fp8_e4m3": "float8_e4m3fn(code) * abs(scale); where scale < 0, codes 126 and 254 are infinite",
    "int8": "code * abs(scale); where scale < 0, codes 127 and -127 are infinite, -128 is NaN",
}


def encode(rows: "torch.Tensor", precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Round rows to codes, each row by a scale of its own, to the nearest and ties to even.

    Args:
        rows: (rows, …) of any float dtype up to 32 bits, on the CPU.
        precision: `fp8_e4m3` or `int8`.

    Returns:
        Codes, (rows, …) uint8 or int8, and scales, (rows,) float32.

    Examples:
        >>> import torch
        >>> codes, scales = encode(torch.tensor([[1.0, -254.0], [0.0, 0.0]]), "int8")
        >>> codes.tolist(), scales.tolist()
        ([[0, -127], [0, 0]], [2.0, 1.0])
    """
    import torch

    values = rows.float().reshape(len(rows), math.prod(rows.shape[1:]))
    most = values.abs().amax(1) if values.numel() else values.new_zeros(len(values))
    wrong = ~most.isfinite()
    largest = np.full(len(values), SCALED[precision])
    kept = values
    if wrong.any():
        kept = values.nan_to_num(0.0, 0.0, 0.0)
        most = kept.abs().amax(1)
        largest[wrong.numpy()] = _LARGEST_FINITE[precision]
    size = _scales(most.numpy(), largest)
    bound = torch.from_numpy(largest.astype("<f4"))[:, None]
    quotients = (kept / torch.from_numpy(size)[:, None]).clamp_(-bound, bound)
    if precision == "int8":
        codes = quotients.round_().to(torch.int8).numpy()
    else:
        codes = quotients.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if wrong.any():
        infinite = _INFINITE[precision]
        negative = infinite | 0x80 if precision == "fp8_e4m3" else -infinite
        codes[values.isposinf().numpy()] = infinite
        codes[values.isneginf().numpy()] = negative
        codes[values.isnan().numpy()] = _NAN[precision]
    return codes.reshape(tuple(rows.shape)), np.where(wrong.numpy(), -size, size)


def _scales(most: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The sizes of scales by the largest absolute values of rows: (rows,) float32, above 0."""
    exact = most.astype("f8") / largest
    size = exact.astype("<f4")
    # rounded up where it is subnormal and so has few digits, down where the product would overflow
    short = (size < _FLOAT32.tiny) & (size < exact)
    size = np.where(short, np.nextafter(size, np.float32(np.inf)), size)
    beyond = size.astype("f8") * largest > float(_FLOAT32.max)
    size = np.where(beyond, np.nextafter(size, np.float32(0)), size)
    return np.where(most == 0, np.float32(1), size)


def decode(
    codes: np.ndarray, scales: np.ndarray, precision: str, out: np.ndarray | None = None
) -> np.ndarray:
    """The values of codes: the inverse of `encode`, but for rounding.

    Args:
        codes: (rows, …) uint8 or int8.
        scales: (rows,) float32.
        precision: `fp8_e4m3` or `int8`.
        out: (rows, …) float32 that is filled; None: a new array.

    Returns:
        (rows, …) float32.

    Examples:
        >>> codes = np.array([[0x38, 0x7E], [0x38, 0x7E]], "u1")
        >>> decode(codes, np.array([0.5, -0.5], "<f4"), "fp8_e4m3").tolist()
        [[0.5, 224.0], [0.5, inf]]
    """
    out = np.empty(codes.shape, "<f4") if out is None else out
    scales = np.asarray(scales, "<f4").reshape(-1, *(1 for _ in codes.shape[1:]))
    if precision == "int8":
        np.multiply(codes, np.abs(scales), out=out, dtype="<f4")
    else:
        np.multiply(_fp8_values()[codes], np.abs(scales), out=out)
    negative = (scales < 0).reshape(-1)
    if negative.any():
        some, values = codes[negative], out[negative]
        sizes = some & 0x7F if precision == "fp8_e4m3" else np.abs(some.astype("i2"))
        below = some > 0x7F if precision == "fp8_e4m3" else some < 0
        infinite = sizes == _INFINITE[precision]
        values[infinite] = np.where(below[infinite], -np.inf, np.inf)
        if precision == "int8":
            values[some == _NAN[precision]] = np.nan
        out[negative] = values
    return out


def round_trip(rows: "torch.Tensor", precision: str) -> "torch.Tensor":
    """What is read of rows that are stored.

    Args:
        rows: (rows, …) of any float dtype up to 32 bits, on the CPU.
        precision: `fp8_e4m3` or `int8`.

    Returns:
        (rows, …) float32.

    Examples:
        >>> import torch
        >>> round_trip(torch.tensor([[1.0, 0.3]]), "fp8_e4m3").tolist()
        [[1.0, 0.2857142984867096]]
    """
    import torch

    return torch.from_numpy(decode(*encode(rows, precision), precision))


def rounding(codes: np.ndarray, scales: np.ndarray, precision: str) -> np.ndarray:
    """How far values may be from those that were encoded: half the distance of two codes, times the
    scale, and what the arithmetic in FP32 adds.

    Args:
        codes: (rows, …) uint8 or int8.
        scales: (rows,) float32.
        precision: `fp8_e4m3` or `int8`.

    Returns:
        (rows, …) float64, finite.

    Examples:
        >>> rounding(np.array([[0, 100]], "i1"), np.array([2.0], "<f4"), "int8").round(3).tolist()
        [[1.0, 1.0]]
    """
    if precision == "int8":
        half: np.ndarray = np.full(codes.shape, 0.5)
        size = np.abs(codes.astype("f8"))
    else:
        exponent = np.maximum((codes & 0x7F) >> 3, 1).astype("f8")
        half = np.exp2(exponent - 11)  # a step of the numbers with this exponent is 2^(exponent-10)
        size = np.minimum(np.abs(np.nan_to_num(_fp8_values()[codes])), SCALED[precision])
    scale = np.abs(scales.astype("f8")).reshape(-1, *(1 for _ in codes.shape[1:]))
    return (half + size * 2.0**-22) * scale + float(_FLOAT32.smallest_subnormal)


def describe(dataset: h5py.Dataset, precision: str) -> None:
    """Give a dataset of codes the attributes that say how to read it.

    Args:
        dataset: of an open file; its scales lie next to it.
        precision: `fp8_e4m3` or `int8`.
    """
    dataset.attrs["encoding"] = precision
    dataset.attrs["scale"] = f"{dataset.name.rpartition('/')[2]}_scale"
    dataset.attrs["value"] = _FORMULA[precision]


@cache
def _fp8_values() -> np.ndarray:
    """The number of each code of float8_e4m3fn, (256,) float32; 4 bits of exponent, 3 of fraction.

    >>> _fp8_values()[[0x01, 0x08, 0x7E, 0xB8]].tolist()
    [0.001953125, 0.015625, 448.0, -1.0]
    """
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent, 8 + fraction, fraction) * np.exp2(np.maximum(exponent, 1) - 10.0)
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code > 0x7F, -size, size).astype("<f4")
