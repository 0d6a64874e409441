"""Which errors a retry cannot mend: a job that ends with one leaves a record, on which its retries
end at once.

A record is of one call of Snakemake, whose jobs inherit its name: a later call, before which the
user may have changed anything, tries again.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from theloom.errors import (
    ConfigError,
    CorpusError,
    HookError,
    InputError,
    ModelError,
    TheLoomError,
)

CALL = "THELOOM_CALL"  # the call of Snakemake; where jobs do not inherit it, each try is made

# Neither a plan that does not fit, nor rows that another node's device may compute rightly, nor a
# disk or a signal.
_FINAL = (ConfigError, CorpusError, HookError, InputError, ModelError)


def record(log: Path, error: TheLoomError) -> None:
    """Leave a record of the error that ended a job, if a retry would end in it, too.

    Args:
        log: log file of the job.
        error: what ended it.
    """
    if isinstance(error, _FINAL) and (call := os.environ.get(CALL)):
        with suppress(OSError):  # without a record the retry runs
            _record_of(log).write_text(json.dumps([call, str(error)]), encoding="utf-8")


def recorded(log: Path) -> str | None:
    """Read the error that ended an earlier try of a job within this call of Snakemake.

    Args:
        log: log file of the job.

    Returns:
        The message; None where a retry may help.
    """
    with suppress(OSError, ValueError):
        call, message = json.loads(_record_of(log).read_text(encoding="utf-8"))
        if call == os.environ.get(CALL):
            return str(message)
        _record_of(log).unlink()
    return None


def _record_of(log: Path) -> Path:
    return log.with_name(f"{log.name}.rejected")
