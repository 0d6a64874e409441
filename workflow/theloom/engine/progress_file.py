"""How far a job is, in a small file that the process which started the job can show."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

VARIABLE = "THELOOM_PROGRESS_FILE"  # set by `pipeline.job` where somebody watches

SECONDS_BETWEEN_WRITES = 0.3

_written = 0.0


def report(done: int, total: int, text: Callable[[], str]) -> None:
    """Write how far the job is, a few times a second at most, if its progress is shown.

    Args:
        done: Units of work done.
        total: All units of work, in the same unit.
        text: Makes the words next to the bar; called only when they are written.
    """
    global _written
    path, now = os.environ.get(VARIABLE), time.monotonic()
    if path is None or (now - _written < SECONDS_BETWEEN_WRITES and done < total):
        return
    _written = now
    # Replaced whole, so that a reader never sees half a line. A full disk must not end the job.
    with suppress(OSError):
        partial = Path(f"{path}.new")
        partial.write_text(f"{done} {total} {text()}\n", encoding="utf-8")
        partial.replace(path)


def read(path: Path) -> tuple[float, str] | None:
    """Read the progress of a job.

    Args:
        path: Of its progress file.

    Returns:
        The share that is done, from 0 to 1, and the words; None where nothing is reported yet.

    Examples:
        >>> read(Path("no/such/file")) is None
        True
    """
    try:
        done, total, text = path.read_text(encoding="utf-8").rstrip("\n").split(" ", 2)
    except (OSError, ValueError):
        return None
    return min(1.0, int(done) / max(1, int(total))), text


def remove(path: str | Path) -> None:
    """Remove a progress file and what a killed job may have left next to it.

    Args:
        path: Of the progress file; it may be missing.
    """
    for name in (path, f"{path}.new"):
        with suppress(OSError):
            Path(name).unlink()
