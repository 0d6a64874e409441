"""Contexts of one length, made from documents of uneven ones."""

from collections.abc import Iterator

import numpy as np

from theloom.errors import ConfigError
from theloom.exports.job import Job


def contexts(job: Job) -> tuple[int, np.ndarray]:
    """The contexts of an export.

    `pack` joins the rows of all windows, so that a context may hold several; `cut` takes whole
    contexts from each window. What is left out is recorded.

    Args:
        job: the export.

    Returns:
        Rows of a context, and the first row of each.

    Raises:
        ConfigError: windows differ in length and nothing says how they become contexts, or there is
            not one context.
    """
    lengths = [len(window) for window in job.windows]
    size = job.context_size
    if size is None:
        if len(set(lengths)) != 1:
            between = f"{min(lengths)} to {max(lengths)} rows" if lengths else "no rows"
            raise ConfigError(
                f"documents have {between}, and this format has contexts of one length; give "
                "--context-size N, with --pack or --cut"
            )
        size = lengths[0]
    if job.fit is None and any(length != size for length in lengths):
        uneven = sum(length != size for length in lengths)
        raise ConfigError(
            f"{uneven:,} of {len(lengths):,} windows do not have {size} rows; --pack joins them, "
            "--cut takes whole contexts from each and leaves out the rest"
        )
    starts = np.fromiter(_starts(job, size), np.int64)
    if not len(starts):
        raise ConfigError(
            f"no context of {size} rows in {len(job.acts):,} rows; give a smaller one"
        )
    left = len(job.acts) - size * len(starts)
    if left:
        job.leave_out(f"{left:,} of {len(job.acts):,} rows, which fill no context of {size}")
    return size, starts


def _starts(job: Job, size: int) -> Iterator[int]:
    if job.fit == "pack":
        yield from range(0, len(job.acts) - size + 1, size)
        return
    for window in job.windows:
        yield from range(window.rows.start, window.rows.stop - size + 1, size)


def rows_of(starts: np.ndarray, size: int) -> np.ndarray:
    """The rows of contexts.

    Args:
        starts: the first row of each context, (contexts,).
        size: rows of a context.

    Returns:
        (contexts × size,).

    Examples:
        >>> rows_of(np.array([0, 10]), 3).tolist()
        [0, 1, 2, 10, 11, 12]
    """
    return (starts[:, None] + np.arange(size)).reshape(-1)


def runs(starts: np.ndarray, size: int) -> list[slice]:
    """The rows of contexts, as slices that are as long as can be.

    Args:
        starts: the first row of each context, (contexts,), at least one.
        size: rows of a context.

    Returns:
        Slices of rows, in order.

    Examples:
        >>> runs(np.array([0, 3, 10]), 3)
        [slice(0, 6, None), slice(10, 13, None)]
    """
    ends = np.flatnonzero(np.diff(starts) != size) + 1
    parts = np.split(starts, ends)
    return [slice(int(part[0]), int(part[-1]) + size) for part in parts]
