"""One progress bar for each running shard, below the lines that Snakemake prints on a terminal.

A job's own output goes to its log, so it cannot draw. It writes how far it is to a file next to
the log (`engine.progress_file`), and a thread of the main process draws all bars. Snakemake's
handler writes through `_Stream`, which clears the bars before each of its lines.
"""

import atexit
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any, TextIO, cast

from theloom.engine import progress_file

REQUEST = "THELOOM_PROGRESS"  # in the environment of jobs: write progress files

SECONDS_BETWEEN_DRAWS = 0.2

_BAR = 24  # characters


def progress_of(log: str | Path) -> Path:
    """The progress file of the job with a log file.

    Args:
        log: Path of the log.

    Returns:
        Its path, next to the log.

    Examples:
        >>> progress_of("results/run/logs/extract.0.log").name
        'extract.0.log.progress'
    """
    return Path(f"{log}.progress")


class Bars(logging.Filter):
    """Draws the progress of running jobs. As a filter of Snakemake's logger it learns which run.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lock = threading.RLock()
        self._files: dict[int, Path] = {}  # progress files of running jobs, by Snakemake's number
        self._drawn = 0  # lines
        self._line_is_open = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw_often, name="bars", daemon=True)

    def start(self) -> None:
        """Have jobs report, and draw what they report until `stop`."""
        logger = logging.getLogger("snakemake.logging")
        writers = [h for h in logger.handlers if getattr(h, "stream", None) is self._stream]
        if not writers:  # --quiet, or a logger plugin that writes by itself
            return
        for handler in writers:
            cast(Any, handler).setStream(_Stream(self._stream, self))
        logger.filters.insert(
            0, self
        )  # before `console.Brief`, which drops records of finished jobs
        os.environ[REQUEST] = "1"
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Clear the bars for good."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(1)
        with self._lock:
            self._clear()
            self._stream.flush()

    def filter(self, record: logging.LogRecord) -> bool:
        """Note which jobs run; drops no record.

        Args:
            record: Of Snakemake's logger.

        Returns:
            True.
        """
        fields: dict[str, Any] = record.__dict__
        event = str(fields.get("event") or "")
        with self._lock:
            if event == "job_info" and fields.get("log"):
                self._files[fields["jobid"]] = progress_of(fields["log"][0])
            elif event in ("job_finished", "job_error"):
                job = int(fields["job_id"] if "job_id" in fields else fields["jobid"])
                if (file := self._files.pop(job, None)) is not None:
                    progress_file.remove(file)  # left by a job that was killed
        return True

    def write(self, text: str) -> int:
        """Write a text of Snakemake's above the bars, which the next draw brings back.

        Args:
            text: What Snakemake prints.

        Returns:
            Characters written.
        """
        with self._lock:
            self._clear()
            self._line_is_open = not text.endswith("\n") if text else self._line_is_open
            return self._stream.write(text)

    def _draw_often(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_DRAWS):
            with self._lock:
                if not self._stop.is_set() and not self._line_is_open:
                    self._draw()

    def _draw(self) -> None:
        width, height = shutil.get_terminal_size()
        reports = [(file, progress_file.read(file)) for file in self._files.values()]
        rows = [line(file, *report) for file, report in reports if report is not None]
        rows = [row[: width - 1] for row in rows[: max(1, height // 2)]]  # a wrapped row stays
        if not rows and not self._drawn:
            return
        self._clear()
        self._stream.write("\n".join(rows))
        self._stream.flush()
        self._drawn = len(rows)

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r" + "\x1b[1A" * (self._drawn - 1) + "\x1b[J")
            self._drawn = 0


def line(file: Path, share: float, text: str) -> str:
    """One bar: the job's name, its share in per cent, and its own words.

    Args:
        file: The job's progress file.
        share: Of the job that is done, from 0 to 1.
        text: The job's own words.

    Returns:
        The line, without a line end.

    Examples:
        >>> line(Path("extract_0.log.progress"), 0.5, "12 MB/s").split("% ")
        ['extract_0 [############............]  50', '12 MB/s']
    """
    filled = int(_BAR * share)
    name = file.name.partition(".")[0]
    return f"{name} [{'#' * filled}{'.' * (_BAR - filled)}] {100 * share:3.0f}% {text}"


def for_terminal(stream: TextIO) -> Bars | None:
    """Bars for a stream.

    Args:
        stream: Of this process, such as `sys.stderr`.

    Returns:
        The bars; None where the stream is no terminal that can move its cursor.
    """
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    return Bars(stream)


class _Stream:
    """A terminal whose texts go above the bars."""

    def __init__(self, stream: TextIO, bars: Bars) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        return self._bars.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
