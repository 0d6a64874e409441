"""Statistics of a hook point's rows: count, mean and variance of each element of a row; the mean
norm; the number of nonfinite values.

Tiles of rows are reduced in float32, as deviations from the mean of the rows before, and combined
in float64 by the formula of Chan, Golub and LeVeque for the mean and the squared deviations of two
sets. So a mean that is large compared to the spread costs no digits (where a tile's mean is far
from those before it, their distance is most of the variance), the order of shards matters by
rounding alone, and memory does not grow with the rows. Nonfinite values are counted, and left out
of everything else; the score of a masked key, which is -inf, is left out and not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from theloom.hooks.points import SCORES

_TILE = 1 << 18  # elements: the L2 cache of a core holds them

_MOST_ROWS = 1024  # that are summed in float32


@dataclass
class Statistics:
    """Of one hook point. `count`, `mean` and `m2` (the sum of squared deviations from the mean)
    have the shape (elements of a row,).
    """

    masked: bool
    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    rows: int = 0
    norm_sum: float = 0.0  # sum of the rows' Euclidean norms
    nonfinite: int = 0
    infinite: int = 0  # of the nonfinite: where the store is fp16, mostly values beyond 65,504

    @property
    def variance(self) -> np.ndarray:
        """The population variance by element of a row, (elements of a row,)."""
        return self.m2 / np.maximum(self.count, 1)

    @property
    def norm(self) -> float:
        """The mean Euclidean norm of a row."""
        return self.norm_sum / max(1, self.rows)

    @property
    def mean_of_all(self) -> float:
        """The mean of all elements of all rows."""
        return float(self.mean @ self.count / max(1.0, self.count.sum()))

    @property
    def variance_of_all(self) -> float:
        """The variance of all elements of all rows."""
        between = self.count @ (self.mean - self.mean_of_all) ** 2
        return float((self.m2.sum() + between) / max(1.0, self.count.sum()))

    def add(self, bits: np.ndarray, precision: str) -> None:
        """Add rows.

        Args:
            bits: of the rows, (rows, …), as `element_types.bits` returns them.
            precision: `fp32`, `fp16` or `bf16`.
        """
        flat = bits.reshape(len(bits), -1)
        step = tile_rows(flat.shape[1])
        for start in range(0, len(flat), step):
            self._add_tile(flat[start : start + step], precision)

    def _add_tile(self, bits: np.ndarray, precision: str) -> None:
        tile = as_float32(bits, precision)
        self.rows += len(tile)
        # what overflows in float32 is detected below, and summed in float64
        with np.errstate(over="ignore", invalid="ignore"):
            squared_norms = np.vecdot(tile, tile)
            if np.isfinite(squared_norms).all():
                if self._add_finite(tile, np.shares_memory(tile, bits)):
                    self.norm_sum += float(np.sqrt(squared_norms).sum(dtype="f8"))
                    return
                tile = as_float32(bits, precision)  # `_add_finite` has overwritten it
        self._add_with_gaps(tile)

    def _add_finite(self, tile: np.ndarray, shared: bool) -> bool:
        """Add finite rows, and overwrite them unless they are shared; returns False, and adds
        nothing, on overflow.
        """
        ones, many = np.ones(len(tile), "f4"), np.float64(len(tile))
        # the mean of fewer rows than the tile has is too rough an estimate of its mean
        about = (
            self.mean.astype("f4") if self.count.min() >= many else (ones @ tile) / np.float32(many)
        )
        deviations = np.subtract(tile, about, out=None if shared else tile)
        off = (ones @ deviations).astype("f8")
        m2 = ones @ np.square(deviations, out=deviations)
        if not np.isfinite(m2).all():
            return False
        self._join(many, about + off / many, m2 - off**2 / many)
        return True

    def _add_with_gaps(self, tile: np.ndarray) -> None:
        finite = np.isfinite(tile)
        wrong = ~finite & ~np.isneginf(tile) if self.masked else ~finite
        self.nonfinite += int(wrong.sum())
        self.infinite += int((wrong & ~np.isnan(tile)).sum())
        values = np.where(finite, tile, np.float32(0)).astype("f8")
        self.norm_sum += float(np.linalg.norm(values, axis=1).sum())
        count = finite.sum(axis=0).astype("f8")
        mean = values.sum(axis=0) / np.maximum(count, 1)
        self._join(count, mean, (np.where(finite, values - mean, 0.0) ** 2).sum(axis=0))

    def join(self, other: "Statistics") -> None:
        """Add the statistics of other rows, such as those of another shard.

        Args:
            other: of the same hook point.
        """
        self._join(other.count, other.mean, other.m2)
        for name in ("rows", "norm_sum", "nonfinite", "infinite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _join(self, count: "np.ndarray | np.float64", mean: np.ndarray, m2: np.ndarray) -> None:
        total = np.maximum(self.count + count, 1)
        apart = mean - self.mean
        self.m2 += m2 + apart**2 * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count += count


def tile_rows(width: int) -> int:
    """How many rows are reduced together.

    Args:
        width: elements of a row.

    Returns:
        Rows, 1 or more.
    """
    return min(max(1, _TILE // max(1, width)), _MOST_ROWS)


def as_float32(bits: np.ndarray, precision: str) -> np.ndarray:
    """Widen stored values.

    Args:
        bits: (…) as `element_types.bits_dtype` has them.
        precision: of the store: fp32, fp16 or bf16.

    Returns:
        (…) of float32; a view of `bits` where that is possible.

    Examples:
        >>> as_float32(np.array([0x3F80, 0xC000], "<u2"), "bf16").tolist()
        [1.0, -2.0]
    """
    if precision == "bf16":
        wide = bits.astype("<u4")
        wide <<= 16
        return wide.view("<f4")
    return bits.view({"fp32": "<f4", "fp16": "<f2"}[precision]).astype("<f4", copy=False)


def empty_statistics(hook: str, width: int) -> Statistics:
    """Statistics of a hook point without rows.

    Args:
        hook: its name; scores of attention may be -inf.
        width: elements of a row.

    Returns:
        Statistics, to which `add` adds rows.

    Examples:
        >>> import numpy as np
        >>> statistics = empty_statistics("blocks.0.hook_resid_post", 2)
        >>> rows = np.array([[1, 2], [3, 6]], "<f4")
        >>> statistics.add(rows.view("<u4"), "fp32")
        >>> statistics.mean.tolist(), statistics.variance.tolist()
        ([2.0, 4.0], [1.0, 4.0])
    """
    return Statistics(hook.endswith(SCORES), np.zeros(width), np.zeros(width), np.zeros(width))


_BY_ELEMENT = ("count", "mean", "m2")
_BY_HOOK = ("rows", "norm_sum", "nonfinite", "infinite")


def bytes_of_element() -> int:
    """Bytes of the statistics for one element of a row.

    Returns:
        Bytes on disk.
    """
    return 8 * len(_BY_ELEMENT)


def create_statistics(file: h5py.File, widths: Sequence[int]) -> None:
    """Create the datasets of the statistics, filled with zeros.

    Args:
        file: an open file.
        widths: elements of a row, by hook point. Their elements follow each other; `offset` holds
            where each begins.
    """
    file["statistics/offset"] = np.concatenate([[0], np.cumsum(widths)]).astype("<i8")
    for name in _BY_ELEMENT:
        file[f"statistics/{name}"] = np.zeros(sum(widths), "<f8")
    for name in _BY_HOOK:
        file[f"statistics/{name}"] = np.zeros(len(widths), "<f8")


def statistics_columns(of_hooks: Sequence[Statistics]) -> dict[str, np.ndarray]:
    """The content of the datasets of `create_statistics`.

    Args:
        of_hooks: of each hook point, in the order of the file.

    Returns:
        Arrays of float64 by name of the dataset: (elements of all hook points,) or (hook points,).
    """
    columns = {
        name: np.concatenate([getattr(s, name) for s in of_hooks] or [np.zeros(0)])
        for name in _BY_ELEMENT
    }
    columns |= {name: np.array([getattr(s, name) for s in of_hooks], "<f8") for name in _BY_HOOK}
    return {
        f"statistics/{name}": np.ascontiguousarray(value, "<f8") for name, value in columns.items()
    }


def read_statistics(
    array: Callable[[str], np.ndarray], hooks: Sequence[str], widths: Sequence[int]
) -> list[Statistics]:
    """Read the statistics of all hook points.

    Args:
        array: returns the content of a dataset by its name.
        hooks: names of the hook points, in the order of the file.
        widths: elements of a row, by hook point.

    Returns:
        Of each hook point, in the order of `hooks`.

    Raises:
        ValueError: the file has statistics of other rows.
    """
    offset = array("statistics/offset")
    by_element = {name: array(f"statistics/{name}") for name in _BY_ELEMENT}
    by_hook = {name: array(f"statistics/{name}").tolist() for name in _BY_HOOK}
    sizes = {len(values) for values in by_element.values()} | {sum(widths)}
    counts = {len(values) for values in by_hook.values()} | {len(hooks)}
    if np.diff(offset).tolist() != list(widths) or offset[0] or len(sizes) + len(counts) > 2:
        raise ValueError("its statistics are of other rows")
    result = []
    for number, hook in enumerate(hooks):
        part = slice(int(offset[number]), int(offset[number + 1]))
        count, mean, m2 = (by_element[name][part] for name in _BY_ELEMENT)
        rows, norm_sum, nonfinite, infinite = (by_hook[name][number] for name in _BY_HOOK)
        masked = hook.endswith(SCORES)
        result.append(
            Statistics(masked, count, mean, m2, int(rows), norm_sum, int(nonfinite), int(infinite))
        )
    return result
