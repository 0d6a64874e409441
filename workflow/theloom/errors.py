"""The errors that TheLoom raises for what a user can mend.

Each message is one line: what was requested, what was found, what to do. The pipeline prints it
without a traceback; every other exception is a defect of ours and keeps its traceback.
"""

from theloom.credentials import hidden


class TheLoomError(Exception):
    """Base of all errors that a user can mend. Its message shows no password and no token."""

    def __str__(self) -> str:
        return printable(" ".join(hidden(super().__str__()).splitlines()), kept="\t")


def printable(text: str, kept: str = "") -> str:
    """A text of others as messages show it: control characters, which a terminal would obey, and
    what is no character are escaped.

    Args:
        text: any text.
        kept: characters that stay as they are.

    Returns:
        A text of printable characters and those.

    Examples:
        >>> printable("ü\\n")
        'ü\\\\n'
    """
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


class ConfigError(TheLoomError):
    """A key, a value or a profile of the configuration is wrong."""


class ProjectError(TheLoomError):
    """A folder cannot become a project."""


class CorpusError(TheLoomError):
    """The texts are missing, empty or cannot be decoded."""


class ModelError(TheLoomError):
    """The model is missing, incomplete, or does something that extraction cannot treat exactly."""


class HookError(TheLoomError):
    """A hook point is requested that the model does not have."""


class InputError(TheLoomError):
    """Tokens or a mask that are handed to a function cannot be a batch for a model."""


class MemoryPlanError(TheLoomError):
    """The run does not fit the memory or the disk at hand."""


class StoreError(TheLoomError):
    """A file of a run is missing, incomplete, or not of this run."""


class VerificationError(TheLoomError):
    """Stored rows differ from what the model gives."""


class StoppedError(TheLoomError):
    """The job was requested to stop, and has committed what it had."""
