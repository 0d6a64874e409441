"""The rule for values of a shard that are NaN or infinite.

Infinities of an fp16 file are values beyond its range, of which `ShardSpec.max_overflow` allows a
share. Any other value that is not finite is the model's own: it ends the job, unless
`ShardSpec.allow_nonfinite` keeps it. Either way the first one is named.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from theloom.errors import StoreError
from theloom.hooks.points import SCORES, HookPoint
from theloom.precision import read_as
from theloom.store.encoding.rows_at import RowsAt
from theloom.store.shard_file import ShardSpec, ShardTokens
from theloom.store.statistics import Statistics, as_float32

log = logging.getLogger(__name__)

# The bits of an exponent of ones alone, which every NaN and infinity has, and those of -inf
_EXPONENT = {"fp32": 0x7F800000, "fp16": 0x7C00, "bf16": 0x7F80}
_NEGATIVE_INFINITY = {"fp32": 0xFF800000, "fp16": 0xFC00, "bf16": 0xFF80}


def count_nonfinite(bits: np.ndarray, precision: str, masked: bool = False) -> int:
    """Count the values that are NaN or infinite.

    Args:
        bits: Of the values, `element_types.bits_dtype`, of any shape.
        precision: `fp32`, `fp16` or `bf16`.
        masked: Leave out -inf, which scores of masked keys are.

    Returns:
        How many; 0 for finite values.

    Examples:
        >>> bits = np.array([1.0, np.nan, -np.inf], "<f4").view("<u4")
        >>> count_nonfinite(bits, "fp32"), count_nonfinite(bits, "fp32", masked=True)
        (2, 1)
    """
    exponent = bits.dtype.type(_EXPONENT[precision])
    exponents = bits & exponent
    if exponents.max(initial=0) != exponent:  # nearly always, and the quickest to tell
        return 0
    count = int(np.count_nonzero(exponents == exponent))
    return count - int(masked and np.count_nonzero(bits == _NEGATIVE_INFINITY[precision]))


def check_finite(
    spec: ShardSpec,
    counted: Mapping[str, Statistics],
    file: str,
    fd: int,
    hooks: Mapping[str, RowsAt],
    last: bool = False,
) -> None:
    """Apply the rule to the rows that are written so far.

    Args:
        spec: What the shard holds.
        counted: The statistics of its rows, by hook point.
        file: Its name, for messages.
        fd: Its open file.
        hooks: Where the rows of each hook point lie in it.
        last: Whether all rows are written; what was kept is then logged.

    Raises:
        StoreError: There are more such values than the spec allows.
    """
    for point in spec.points:
        found = counted[point.name]
        beyond = found.infinite if spec.precision == "fp16" else 0
        values = spec.rows * point.width(spec.keys)
        first = partial(first_of, spec, point, fd, hooks[point.name])
        if words := refusal(spec, point, beyond, found.nonfinite - beyond, first):
            raise StoreError(f"{file}: {words}")
        if last and found.nonfinite:
            log.warning(
                "%s: %d of %d values are not finite; first: %s%s",
                point.name,
                found.nonfinite,
                values,
                first(),
                f"; {beyond} of them are infinite in fp16" if beyond else "",
            )


def refusal(
    spec: ShardSpec, point: HookPoint, beyond: int, own: int, first: Callable[[], str]
) -> str | None:
    """Say why values of a hook point end the job.

    Args:
        spec: What the shard holds.
        point: The hook point.
        beyond: How many of its values are infinite since they are beyond fp16.
        own: How many others are not finite.
        first: Gives the first of them in words.

    Returns:
        The reason, and what to do; None where the spec allows them.
    """
    if spec.allow_nonfinite:
        return None
    values = spec.rows * point.width(spec.keys)
    if beyond > spec.max_overflow * values:
        return (
            f"{beyond} of {values} values of {point.name} are beyond fp16's 65,504 "
            f"and so infinite, more than store.max_overflow={spec.max_overflow:g} of them; set "
            "store.dtype=bf16 or fp32, or raise store.max_overflow"
        )
    if own:
        return (
            f"{point.name} is not finite: {first()}; the "
            "weights or the precision give that (memory.precision_mode=bf16 and fp32 have more "
            "range than fp16); store.allow_nonfinite=true keeps such values"
        )
    return None


def first_of(spec: ShardSpec, point: HookPoint, fd: int, rows: RowsAt) -> str:
    """Find the first value of a hook point that is not finite; masked keys' scores of -inf do not
    count.

    Args:
        spec: Of the shard.
        point: The hook point.
        fd: Of the file, open for reading.
        rows: Where its rows lie.

    Returns:
        In words what it is and where, or `none`.
    """
    row = 0
    for bits in rows.tiles(fd, 0, spec.rows):
        values = as_float32(bits, read_as(spec.precision))
        wrong = ~np.isfinite(values)
        if point.name.endswith(SCORES):  # of masked keys they are -inf
            wrong &= ~np.isneginf(values)
        if wrong.any():
            place = int(wrong.any(axis=1).argmax())
            value = values[place][wrong[place]][0]
            row += place
            return f"{value:g} at {token_of(spec.tokens, row)}"
        row += len(bits)
    return "none"


def token_of(tokens: ShardTokens, row: int) -> str:
    """Tell in words which token a row of a shard is of.

    Args:
        tokens: Of the shard.
        row: Its number in the shard.

    Returns:
        The token's number in its document, and the document.
    """
    token = row if tokens.row_token is None else int(tokens.row_token[row])
    document = int(np.searchsorted(tokens.document_offset, token, side="right")) - 1
    name = tokens.document_id[document].decode(errors="replace")
    return f"token {token - int(tokens.document_offset[document])} of {name}"
