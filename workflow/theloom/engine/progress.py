"""What a job reports of itself while it runs: a progress file for the terminal, and log lines."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import progress_file
from theloom.terminal import format_bytes

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Moment:
    """How far a run is: tokens in transit or written, bytes written, seconds that the model waited
    for the disk.
    """

    tokens: int
    bytes_written: int
    seconds_waiting: float


class _Reporter:
    """Writes the progress file, and a log line every 30 s and at the end."""

    def __init__(self) -> None:
        self._started = self._logged = time.perf_counter()

    def report(self, done: int, total: int, text: Callable[[float], str], last: bool) -> None:
        """Report `done` of `total`; `text` makes the words from the seconds since the start."""
        now = time.perf_counter()
        progress_file.report(done, total, lambda: text(now - self._started))
        if now - self._logged >= SECONDS_BETWEEN_LINES or last:
            self._logged = now
            log.info("%s", text(now - self._started))


class Progress(_Reporter):
    """Progress of a resident shard: tokens, tokens/s, time left, memory now and at its peak with
    the prediction, bytes written per second.

    Args:
        total: Tokens of the shard.
        first: Those of them that earlier jobs have committed.
        predicted: Bytes that the run was predicted to take.
        watch: Watches the memory of the job.
    """

    def __init__(self, total: int, first: int, predicted: int, watch: MemoryWatch) -> None:
        super().__init__()
        self._total, self._first, self._predicted, self._watch = total, first, predicted, watch

    def update(self, moment: Moment, last: bool = False) -> None:
        """Report a moment, if it is time to.

        Args:
            moment: Tokens, bytes and seconds so far.
            last: Report in any case.
        """
        self.report(moment.tokens, self._total, lambda s: self.line(moment, s), last)

    def line(self, moment: Moment, seconds: float) -> str:
        """The words of a report.

        Args:
            moment: Tokens, bytes and seconds so far.
            seconds: Since the start of the job.

        Returns:
            One line.
        """
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


class SweepProgress(_Reporter):
    """Progress of a shard that runs layer by layer: block, batch, tokens/s, time left.

    Args:
        first: The first block of the sweep.
        blocks: The number of blocks of the whole sweep.
        tokens: Tokens that go through each block.
    """

    def __init__(self, first: int, blocks: int, tokens: int) -> None:
        super().__init__()
        self._first, self._blocks, self._tokens, self._through = first, blocks, tokens, 0

    def update(self, block: int, batch: int, batches: int, tokens: int) -> None:
        """Report that a batch has gone through a block.

        Args:
            block: Its number, from 0.
            batch: Its number, from 1.
            batches: Of the block.
            tokens: Of the batch.
        """
        self._through += tokens
        last = (block + 1, batch) == (self._blocks, batches)

        def line(seconds: float) -> str:
            speed = self._through / (self._blocks * max(seconds, 1e-9))
            remaining = self._tokens * (self._blocks - self._first) - self._through
            return (
                f"block {block + 1} of {self._blocks}, batch {batch} of {batches}: "
                f"{speed:.0f} tokens/s through all blocks, "
                f"{_duration(remaining / (speed * self._blocks))} left"
            )

        self.report(block * batches + batch, self._blocks * batches, line, last)


class AnswersProgress(_Reporter):
    """Progress of a shard whose answers are sampled: answers, tokens/s, time left.

    Args:
        total: Answers of the shard.
        first: Those of them that earlier jobs have ended.
    """

    def __init__(self, total: int, first: int) -> None:
        super().__init__()
        self._total, self._first, self._tokens = total, first, 0

    def update(self, done: int, tokens: int) -> None:
        """Report that another answer has ended.

        Args:
            done: Answers ended so far, with those of earlier jobs.
            tokens: Of this answer.
        """
        self._tokens += tokens

        def line(seconds: float) -> str:
            seconds = max(seconds, 1e-9)
            left = (self._total - done) * seconds / (done - self._first)
            return (
                f"{done:,} of {self._total:,} answers, {self._tokens / seconds:,.0f} tokens/s, "
                f"{_duration(left)} left"
            )

        self.report(done, self._total, line, done == self._total)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
