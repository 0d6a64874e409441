"""Rows from the model to the file: copied out of the model's way, and written by a thread of their
own.

The model's thread copies each value into a ring of host memory and goes on; on CUDA the copy itself
runs next to the computation, on a stream of its own. One writer thread hashes, writes and commits.
What is on its way is bounded by the ring: where the disk is the slower one, the model waits for it,
and the time that it waits is counted.
"""

import logging
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from theloom.devices import accelerator, streams
from theloom.devices.streams import Mark, SideStreams
from theloom.engine.selection import Step
from theloom.store.ring_buffer import IN_FLIGHT, Ring, ring_bytes

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

# How long the writer may keep the interpreter while the model's thread has kernels to launch:
# Python's 5 ms are many kernels' time.
SWITCH_SECONDS = 0.0002


class RowSink(Protocol):
    """What takes the rows of a shard: `ShardWriter`, which writes them to its file, or a queue in
    memory. `batches_done` counts the batches that it has all rows of; `taker` is what the model
    waits for where it is the slower one: the disk, or a reader.
    """

    taker: str
    batches_done: int
    metrics: dict[str, float]

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None: ...

    def write(self, window: int, hook: str, start: int, rows: "torch.Tensor") -> None:
        """Take rows of one hook point and window, whose memory is reused after the call.

        Args:
            window: Its number in the shard.
            hook: Name of the hook point.
            start: The number of the first row among the window's stored ones.
            rows: (rows, …), on the CPU, in the stored dtype.
        """
        ...

    def batch_done(self, rows: int, last: bool = False) -> None:
        """Mark that all rows of a batch were written.

        Args:
            rows: Of all batches so far.
            last: Whether this is the last batch.
        """
        ...

    def finish(self) -> None:
        """All batches are done."""
        ...


@dataclass(frozen=True)
class _Values:
    """Values of one hook point that a step took, in host memory once `copied` has come to pass."""

    step: Step
    hook: str
    values: "torch.Tensor"
    copied: Mark


@dataclass(frozen=True)
class _Done:
    """All rows of a batch went before. `figures` are what the run had measured by then."""

    rows: int
    last: bool
    metrics: dict[str, float]


def rows_of(value: "torch.Tensor", dtype: "torch.dtype | None", over_keys: bool) -> "torch.Tensor":
    """A captured value as a selection takes it.

    Args:
        value: The model's own, (window, position, …); over keys (window, head, position, key).
        dtype: Of the rows on disk; None: the model's own, without a copy.
        over_keys: Whether a row of it has all heads of a position.

    Returns:
        (window, position, …) on the same device. On a GPU a copy: the model goes on while it is
        copied to the host, and may write to its own.
    """
    rows = value.transpose(1, 2) if over_keys else value
    if dtype is None:
        return rows
    if value.device.type == "cpu":
        return rows.to(dtype)
    return rows.to(dtype, copy=True).contiguous()


class Handoff:
    """Between the model's thread, which calls `rows` and `batch_done`, and a writer thread, which
    hands them to the sink.

    An error of the writer is raised in the model's thread at its next call, at the latest by
    `drain`. Leaving the context waits for what is on its way; on an error it drops that, since it
    is not committed.
    """

    def __init__(
        self, writer: RowSink, device: "torch.device", largest: int, ahead: int = 0
    ) -> None:
        """`ahead`: bytes of the values that several GPUs have on their way when all are at work."""
        self._writer = writer
        self._ring = Ring(ring_bytes(device.type, largest, ahead), device)
        self._queue: queue.SimpleQueue[_Values | _Done | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._error: BaseException | None = None
        self._dropped = False
        self._thread = threading.Thread(target=self._write_all, name="shard writer", daemon=True)
        self._in_flight: deque[Mark] = deque()
        self._sides = SideStreams()
        self._launches, self._switch = accelerator.has_streams(device), sys.getswitchinterval()
        self.seconds_waiting = self.seconds_copying = self.seconds_writing = 0.0
        self.bytes_written = 0

    def __enter__(self) -> "Handoff":
        if self._launches:
            sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropped = error is not None
        self._finish_copies()
        self._queue.put(None)
        self._thread.join()
        sys.setswitchinterval(self._switch)
        if error is None:
            self._raise()

    @property
    def buffer(self) -> "torch.Tensor":
        """The memory of all values on their way."""
        return self._ring.buffer

    def rows(self, step: Step, hook: str, values: "torch.Tensor") -> None:
        """Take what a step took of a hook point's values.

        On the CPU they may change after the call; on a GPU they are copied later, each from its own
        device, and nothing may write to them.

        Args:
            step: The forward step that is stored.
            hook: The name of the hook point.
            values: What `step.take` returned.
        """
        self._raise()
        began = time.perf_counter()
        place = self._ring.take(tuple(values.shape), values.dtype)
        taken = time.perf_counter()
        self.seconds_waiting += taken - began
        if place is None:
            self._raise()
        assert place is not None
        self._queue.put(_Values(step, hook, place, self._copy(values, place)))
        self.seconds_copying += time.perf_counter() - taken

    def batch_done(self, rows: int, last: bool, metrics: dict[str, float]) -> None:
        """Mark that all rows of a batch are handed over.

        Args:
            rows: Rows handed over so far, of all batches.
            last: Commit whatever the size of what is not committed.
            metrics: By name, as of now; they are written with the commit.
        """
        self._raise()
        self._queue.put(_Done(rows, last, metrics))

    def drain(self) -> None:
        """Wait until the writer is through with all that was handed over."""
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait()
        self._raise()

    def _copy(self, values: "torch.Tensor", place: "torch.Tensor") -> Mark:
        """Copy into the ring, next to the computation where the device can."""
        copied = streams.copy_out(values, place, self._sides)
        if copied is not streams.DONE:
            self._in_flight.append(copied)
            if len(self._in_flight) > IN_FLIGHT:  # the device waits, and the model's thread goes on
                self._in_flight.popleft().let_go()
        return copied

    def _finish_copies(self) -> None:
        """Wait for all copies that are on their way."""
        while self._in_flight:
            self._in_flight.popleft().synchronize()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        """The writer thread."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            if self._dropped or self._error is not None:
                continue
            try:
                self._write(item)
            except BaseException as error:
                self._error = error
                self._ring.close()

    def _write(self, item: _Values | _Done) -> None:
        if isinstance(item, _Values):
            item.copied.synchronize()
        began = time.perf_counter()
        if isinstance(item, _Done):
            self._writer.metrics.update(item.metrics)
            self._writer.batch_done(item.rows, item.last)
        else:
            for window, first, rows in item.step.rows(item.hook, item.values):
                self._writer.write(window, item.hook, first, rows)
                self.bytes_written += rows.nbytes
            self._ring.give_back()
        self.seconds_writing += time.perf_counter() - began
