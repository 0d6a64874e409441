"""What a model's own code raises where it cannot run, and how a message says so in plain words."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from theloom.errors import HookError, ModelError

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

NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
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
    if isinstance(error, NEED_VALUES):
        return _NEEDS_VALUES
    if isinstance(error, UnsupportedOperatorException):
        return f"its code calls {error.func}, which cannot be run without values"
    words = " ".join(str(error).split())
    if isinstance(error, AttributeError | LookupError | AssertionError | StopIteration):
        return f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words or type(error).__name__


class ValuesNeededError(ModelError):
    """A model's code decides by values, which tensors without bytes do not have."""


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
        kind = ValuesNeededError if isinstance(error, NEED_VALUES) else ModelError
        raise kind(f"{what}: {why(error)}") from None


class UnreadableError(HookError):
    """A value of a pass is not what hook points have.

    Attributes:
        names: of those hook points.
    """

    def __init__(self, reason: str, names: Sequence[str]) -> None:
        super().__init__(reason)
        self.names = tuple(names)


@contextmanager
def of_points(names: Sequence[str]) -> Iterator[None]:
    """Say of which hook points a value cannot be read.

    Args:
        names: of the hook points.

    Raises:
        UnreadableError: the value within is not theirs.

    Examples:
        >>> with of_points(["blocks.0.hook_mlp_out"]):
        ...     raise HookError("a value is not one row for each token")
        Traceback (most recent call last):
        theloom.hooks.failures.UnreadableError: a value is not one row for each token
    """
    try:
        yield
    except HookError as error:
        raise UnreadableError(str(error), names) from None
