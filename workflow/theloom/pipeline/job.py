"""What every script of the pipeline does around its one call: log to the rule's file, and end on
one line.

A user's error ends the job with its one line, which the pipeline shows again at the end. So does
a disk that is full or fails, whatever writes to it, and a signal. Any other exception leaves its
traceback in the log.
"""

import errno
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from theloom.credentials import hidden
from theloom.engine import progress_file
from theloom.errors import TheLoomError
from theloom.pipeline import bars, retries
from theloom.terminal import format_bytes

ERROR = "error: "

_SPEND_LESS = (
    "lower extraction.batch_tokens or memory.streaming_chunk_size, or set memory.quantization"
)


# Where users set torch's allocator. In replays of its rules segments that grow hold 2% to 27% less.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# What a disk answers where nothing is wrong with the program. Libraries have it in texts alone.
_OF_DISKS = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space, or have the quota raised",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or take another disk",
    errno.EIO: "check the disk and its connection",
    errno.ESTALE: "check the disk and its connection",
    errno.EROFS: "make it writable, or write elsewhere",
    errno.ENOLCK: "take a disk with locks",
}


class _Stopped(BaseException):
    """A signal came. No `except Exception` of a library takes it for an error of its own."""


@contextmanager
def job(log_file: str, threads: int = 1, online: bool = False) -> Iterator[None]:
    """Run a job's body with stdout, stderr and logging in a file, native code's output included.

    A user's error ends the process with its one line.

    Args:
        log_file: path of the rule's log, which is written anew.
        threads: of torch and of tokenizers, where the environment does not set them.
        online: the job may reach the hub: all others find what it has fetched, and do not see the
            user's token.
    """
    console = os.dup(2)
    try:
        log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        _end(of_system(error, Path(log_file).parent), console)
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
    # idle threads sleep: those that spin take the cores of the writer and of other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    # before h5py is imported: HDF5 opens no file where a disk has no locks; ours is `store.lock`
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    if not any(os.environ.get(name) for name in _ALLOCATOR):  # before torch is imported
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    os.environ["RUST_BACKTRACE"] = "0"  # where a tokenizer gives up, its error says why
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of tokenizers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.raiseExceptions = False  # a log that cannot be written ends no job
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    for noisy in ("filelock", "httpx", "urllib3", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _watch_finalizers(console)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if (rejected := retries.recorded(Path(log_file))) is not None:
        _end(rejected, console)
    try:
        yield
        sys.stdout.flush()
    except _Stopped as stopped:
        _end(_stopped(stopped), console)
    except TheLoomError as error:
        if not online:  # the hub may answer the next try
            retries.record(Path(log_file), error)
        _end(str(error), console)
    except Exception as error:
        from theloom.devices import accelerator  # which the command line does without

        if accelerator.is_out_of_memory(error):
            of_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
            whose = "host" if of_host else "GPU"
            _end(f"the {whose}'s memory ran out; {_SPEND_LESS}", console)
        if (line := of_system(error, _run_folder(log_file))) is None:
            raise
        _end(line, console)
    finally:
        _remove_progress()


class _Formatter(logging.Formatter):
    """Shows no password and no token."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def _watch_finalizers(console: int) -> None:
    """What Python or h5py cannot raise while they free objects is no traceback either."""

    def end(error: BaseException | None) -> bool:
        if isinstance(error, _Stopped):
            _end(_stopped(error), console)
        return error is not None and _number_of(error) is not None

    def unraisable(found: Any) -> None:
        if not end(found.exc_value):
            sys.__unraisablehook__(found)

    def uncaught(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not end(error):
            sys.__excepthook__(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught


def _stopped(by: _Stopped) -> str:
    return f"stopped by {by}; run again to resume"


def _stop(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the job where it is
    raise _Stopped(signal.Signals(number).name)


def _run_folder(log_file: str) -> Path:
    """The folder of the run that a log is of."""
    above = Path(log_file).absolute().parents
    return next((folder.parent for folder in above if folder.name == "logs"), above[0])


def of_system(error: BaseException, folder: Path) -> str | None:
    """One line for an error of the operating system.

    Args:
        error: what was raised, by Python, HDF5 or another library.
        folder: where the program writes, for errors that do not say which file.

    Returns:
        The line; None where the error is another one.

    Examples:
        >>> of_system(OSError(errno.EROFS, "Read-only file system", "/x"), Path("/"))
        '/x: Read-only file system; make it writable, or write elsewhere, and run again to resume'
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    found = next(((e, n) for e in reversed(chain) if (n := _number_of(e)) is not None), None)
    if found is None and not isinstance(error, OSError):
        return None
    source, number = found or (error, None)
    name, text = getattr(source, "filename", None), " ".join(str(source).split())
    if match := re.search(r"filename = '([^']+)'", text):  # HDF5
        name = match[1]
    place, reason = Path(os.fsdecode(name or folder)), text
    if number is not None:
        reason = os.strerror(number)
    elif isinstance(source, OSError) and source.strerror:
        reason = source.strerror
    if number in (errno.ENOSPC, errno.EDQUOT):
        needed = re.search(r"total write size = (\d+)", text)
        reason += f" ({_room(place)}{f', {int(needed[1]):,} bytes are needed' if needed else ''})"
    advice = _OF_DISKS.get(number or 0, "correct that")
    return hidden(f"{place}: {reason}; {advice}, and run again to resume")


def _number_of(error: BaseException) -> int | None:
    """The answer of a disk that an error reports."""
    if (number := getattr(error, "errno", None)) in _OF_DISKS:
        return int(number)
    if isinstance(error, TheLoomError):
        return None
    return next((n for n in _OF_DISKS if os.strerror(n) in str(error)), None)


def _room(place: Path) -> str:
    """How much is free where a file is, and on which disk."""
    disk = next((p for p in (place, *place.absolute().parents) if p.is_dir()), Path("/"))
    free = shutil.disk_usage(disk).free
    while not disk.is_mount():
        disk = disk.absolute().parent
    return f"{format_bytes(free)} are free on {disk}"


def _remove_progress() -> None:
    if path := os.environ.get(progress_file.VARIABLE):
        progress_file.remove(path)


def _end(message: str | None, console: int) -> NoReturn:
    """End the process on one line: in the log, or where that cannot be written, on the console.

    Nothing else runs: HDF5 would try again to write what the disk did not take.
    """
    line = f"{ERROR}{message}\n"
    _remove_progress()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # full, closed, or within a write of it
            stream.flush()
    try:
        written = os.write(2, line.encode())
    except OSError:
        written = 0
    if written < len(line.encode()):
        with suppress(OSError):
            os.write(console, line.encode())
    os._exit(1)


def add_to_job_path(folder: Path) -> None:
    """Put a folder on the import path of every job that this process starts.

    Args:
        folder: with packages in it.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    )


def last_errors(logs: list[Path], since: float) -> list[str]:
    """The users' errors that ended jobs, each with its log file.

    Args:
        logs: paths of log files, all of which are there.
        since: logs that were written before this time are left out, in seconds since 1970.

    Returns:
        A line for each job that ended so, sorted by log file.
    """
    errors = []
    for file in sorted(logs):
        if file.stat().st_mtime >= since and (error := error_of(file)):
            errors.append(f"{error} (log: {file})")
    return errors


def error_of(log: Path) -> str | None:
    """The user's error that ended a job.

    Args:
        log: path of its log file.

    Returns:
        The line; None where there is no log, or the job ended otherwise.
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines[-1] if lines and lines[-1].startswith(ERROR) else None
