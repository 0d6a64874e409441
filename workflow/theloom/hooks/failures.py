"""What a model's own code raises where it cannot run, and how a message says so in plain words."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from theloom.errors import ModelError

MODEL_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    StopIteration,
)

_NEEDS_VALUES = "its code decides by the values of tensors, which are not there yet"


def why(error: BaseException) -> str:
    """The reason that an error gives, in one line.

    Args:
        error: what a model's code raised.

    Returns:
        One line; the type of the error is named where its words alone say little.

    Examples:
        >>> why(ValueError("no such\\n  size"))
        'no such size'
    """
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return _NEEDS_VALUES
    if isinstance(error, UnsupportedOperatorException):
        return f"its code calls {error.func}, which cannot be run without values"
    words = " ".join(str(error).split())
    if isinstance(error, AttributeError | LookupError | AssertionError | StopIteration):
        return f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words or type(error).__name__


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise ModelError where the model's code raises within.

    Args:
        what: what failed, for the message.

    Raises:
        ModelError: with what failed and why.

    Examples:
        >>> with refused("a model cannot run"):
        ...     raise ValueError("no size")
        Traceback (most recent call last):
        theloom.errors.ModelError: a model cannot run: no size
    """
    try:
        yield
    except MODEL_ERRORS as error:
        raise ModelError(f"{what}: {why(error)}") from None
