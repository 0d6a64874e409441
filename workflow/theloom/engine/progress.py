"""What a run says of itself while it goes: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import progress_file
from theloom.terminal import format_bytes

if TYPE_CHECKING:
    pass


log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


_SECONDS_BETWEEN_BARS = 0.2


_BAR = 24  # characters


@dataclass(frozen=True)
class Moment:
    """How far a run is: tokens on their way or written, bytes written, seconds that the model
    waited for the disk.
    """

    tokens: int
    bytes_written: int
    seconds_waiting: float


class Progress:
    """Tells how far a shard is: tokens, tokens/s, time left, memory now and at its peak beside what
    was predicted, bytes written in a second.

    `first` tokens of `total` were there before. A terminal gets a bar, anything else a log line
    every 30 s.
    """

    def __init__(
        self,
        total: int,
        first: int,
        predicted: int,
        watch: MemoryWatch,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._first, self._predicted, self._watch = total, first, predicted, watch
        self._stream = stream or sys.stderr
        self._bar = self._stream.isatty()
        self._began = self._said = time.perf_counter()

    def update(self, moment: Moment, last: bool = False) -> None:
        """Say it, if it is time to."""
        now = time.perf_counter()
        progress_file.report(
            moment.tokens, self._total, lambda: self.line(moment, now - self._began)
        )
        if (
            now - self._said < (_SECONDS_BETWEEN_BARS if self._bar else SECONDS_BETWEEN_LINES)
            and not last
        ):
            return
        self._said = now
        text = self.line(moment, now - self._began)
        if self._bar:
            filled = _BAR * moment.tokens // max(1, self._total)
            self._stream.write(
                f"\r\x1b[K[{'#' * filled}{'.' * (_BAR - filled)}] {text}" + "\n" * last
            )
            self._stream.flush()
        else:
            log.info("%s", text)

    def line(self, moment: Moment, seconds: float) -> str:
        """All of it in one line, `seconds` after the start."""
        seconds = max(seconds, 1e-9)
        speed = (moment.tokens - self._first) / seconds
        left = (self._total - moment.tokens) / speed if speed else 0.0
        text = (
            f"{moment.tokens:,} of {self._total:,} tokens, {speed:,.0f} tokens/s, "
            f"{_duration(left)} left; "
            f"memory {format_bytes(self._watch.now)}, peak {format_bytes(self._watch.peak)} of "
            f"{format_bytes(self._predicted)} "
            f"predicted; {moment.bytes_written / seconds / 1e6:.1f} MB/s written"
        )
        waited = moment.seconds_waiting / seconds
        return text + (
            f"; the disk is the limit: {100 * waited:.0f}% of the time waited for it"
            if waited > 0.1
            else ""
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
