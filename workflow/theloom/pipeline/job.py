"""What every script of the pipeline does around its one call: log to the rule's file, and end on
one line.

A user's error ends the job with its one line, which the pipeline shows again at the end; any other
exception leaves its traceback in the log.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from theloom.engine import progress_file
from theloom.errors import TheLoomError
from theloom.pipeline import bars

ERROR = "error: "

_SPEND_LESS = (
    "lower extraction.batch_tokens or memory.streaming_chunk_size, or set memory.quantization"
)


@contextmanager
def job(log_file: str, threads: int = 1, online: bool = False) -> Iterator[None]:
    """Run a job's body with stdout, stderr and logging in `log_file`, native code's output
    included.

    Only an `online` job may reach the hub: all others find what it has fetched, and do not see the
    user's token.
    """
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    if bars.REQUEST in os.environ:
        os.environ[progress_file.VARIABLE] = str(bars.progress_of(log_file))
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for token in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            os.environ.pop(token, None)
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(threads)
    )  # before torch is imported: it sizes its pool by it
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    for noisy in ("filelock", "httpx", "urllib3", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    except TheLoomError as error:
        _end(str(error))
    except MemoryError:
        _end(f"the host's memory ran out; {_SPEND_LESS}")
    except RuntimeError as error:
        if (
            type(error).__name__ != "OutOfMemoryError"
        ):  # torch's own, named so that torch need not be imported
            raise
        _end(f"the GPU's memory ran out; {_SPEND_LESS}")
    finally:
        if path := os.environ.get(progress_file.VARIABLE):
            progress_file.remove(path)


def _end(message: str) -> NoReturn:
    logging.shutdown()
    print(f"{ERROR}{message}", file=sys.stderr, flush=True)
    sys.exit(1)


def add_to_job_path(folder: Path) -> None:
    """Put a folder on the import path of every job that this process starts."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    )


def last_errors(logs: list[Path], since: float) -> list[str]:
    """The users' errors that ended jobs, each with its log file, from logs written after a time."""
    errors = []
    for file in sorted(logs):
        if file.stat().st_mtime >= since and (error := error_of(file)):
            errors.append(f"{error} (log: {file})")
    return errors


def error_of(log: Path) -> str | None:
    """The user's error that ended a job, from its log; None where it ended otherwise."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines[-1] if lines and lines[-1].startswith(ERROR) else None
