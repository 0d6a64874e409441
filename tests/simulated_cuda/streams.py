"""Streams and events: what is queued on them runs when somebody has to wait for it, or earlier, as
the policy says.

A stream runs its work in order. Between streams nothing but an event orders anything, so each
policy is one of the orders that a real GPU could take:

- lazy: nothing runs before it must,
- copies_first: side streams run at once, the default streams when they must,
- compute_first: the other way round,
- eager: everything runs as soon as it may, before the host goes on,
- random: after every piece of work, some streams run a few pieces, drawn from a seed.

The thread that waits runs the work itself, under one lock; so no schedule depends on luck but where
the threads of the program race to queue work.

Next to the order there is a reckoned time: each piece of work takes the seconds that it is queued
with, a stream goes on where its last piece, the event that it waits for, or the thread that queued
it has come to, and queueing takes none. So what keeps GPUs from working at once is seen as idle.
"""

import itertools
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch

POLICIES = ("lazy", "copies_first", "compute_first", "eager", "random")
LOCK = threading.RLock()
_OURS = ("theloom", "tests", "transformers", "accelerate")


class Mark:
    """One moment of a stream: an event as it was recorded once."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.done, self.when = stream, False, 0.0
        self.reckoned = stream.ends


class Schedule:
    """All streams of all devices, and the count of the host's waits by cause, and by cause and
    line.

    `at` holds what is called when so many operations have been queued, by that number.
    """

    def __init__(self, policy: str, seed: int) -> None:
        assert policy in POLICIES, policy
        self.policy, self.random = policy, random.Random(seed)
        self.streams: list[Stream] = []
        self.syncs: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()
        self.at: dict[int, Callable[[], None]] = {}
        self.queued = 0
        self.debug_mode = 0
        self.before_push: Callable[[], None] = lambda: None
        self._numbers = itertools.count(1)
        self._thread = threading.local()

    @property
    def host(self) -> float:
        """The reckoned time that this thread has come to."""
        return getattr(self._thread, "host", 0.0)

    def host_at(self, reckoned: float) -> None:
        """This thread has waited for something that ends then."""
        self._thread.host = max(self.host, reckoned)

    def synchronized(self, cause: str, warns: bool = False) -> None:
        """The host waits. `warns`: torch's synchronisation debug mode sees such a wait."""
        self.syncs[cause] += 1
        self.places[cause, _caller()] += 1
        if warns and self.debug_mode == 1:
            import warnings

            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=4)
        if warns and self.debug_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def operation(self) -> None:
        """The host queues one more operation."""
        self.queued += 1
        if self.at and (due := self.at.pop(self.queued, None)) is not None:
            due()

    def advance(self, pushed: "Stream") -> None:
        """Run what the policy runs when something was queued on a stream."""
        if self.policy == "random":
            for stream in self.random.sample(self.streams, len(self.streams)):
                for _ in range(self.random.randrange(3)):
                    if not stream.step():
                        break
        elif self.policy == "eager":
            while sum(stream.step() for stream in self.streams):
                pass
        elif self.policy != "lazy" and pushed.is_default == (self.policy == "compute_first"):
            while pushed.step():
                pass


class Stream:
    """As torch.cuda.Stream: first in, first out."""

    def __init__(self, schedule: Schedule, index: int, is_default: bool = False) -> None:
        self.device, self.is_default = torch.device("cuda", index), is_default
        self._schedule, self._running = schedule, False
        self._queue: deque[Callable[[], None] | tuple[str, Mark]] = deque()
        self.ends = self.busy = (
            0.0  # reckoned: when all that is queued is done, and at work by then
        )
        self.stream_id = self.cuda_stream = 0 if is_default else next(schedule._numbers)
        schedule.streams.append(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def push(self, item: Any, seconds: float = 0.0) -> None:
        """Queue a piece of work that takes so long, or ("record" | "wait", mark)."""
        with LOCK:
            self._schedule.before_push()
            if isinstance(item, tuple):
                self.ends = max(self.ends, item[1].reckoned)
            else:
                self.ends = max(self.ends, self._schedule.host) + seconds
                self.busy += seconds
            self._queue.append(item)
            self._schedule.advance(self)

    def mark(self) -> Mark:
        """The moment behind all that is queued."""
        mark = Mark(self)
        self.push(("record", mark))
        return mark

    def step(self) -> bool:
        """Run one piece if it may run now; whether it did."""
        if self._running or not self._queue:
            return False
        head = self._queue[0]
        if isinstance(head, tuple) and head[0] == "wait" and not head[1].done:
            return False
        self._run(self._queue.popleft())
        return True

    def wait_on_host(self, mark: Mark | None = None) -> None:
        """Have this thread wait for all that is queued, or all up to a mark."""
        self._schedule.host_at(self.ends if mark is None else mark.reckoned)
        self.run_until(mark)

    def run_until(self, mark: Mark | None = None) -> None:
        """Run all that is queued, or all up to a mark, and what that waits for."""
        while self._queue and not (mark is not None and mark.done):
            self._run(self._queue.popleft())

    def _run(self, item: Any) -> None:
        if isinstance(item, tuple):
            kind, mark = item
            if kind == "record":
                mark.done, mark.when = True, time.perf_counter()
            elif not mark.done:
                mark.stream.run_until(mark)
            return
        self._running = True
        try:
            with torch.inference_mode(), torch._C._DisableTorchDispatch():
                item()
        finally:
            self._running = False

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            self.push(("wait", event.mark))

    def wait_stream(self, other: "Stream") -> None:
        self.push(("wait", other.mark()))

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        with LOCK:
            self._schedule.synchronized("stream", warns=True)
            self.wait_on_host()

    def query(self) -> bool:
        with LOCK:
            return not self._queue


class Event:
    """As torch.cuda.Event. Who waits for one sees it as it was last recorded; one that was never
    recorded has come to pass.
    """

    current: Callable[[], Stream]  # set by the interface: the thread's stream

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.enable_timing, self.blocking = enable_timing, blocking
        self.mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.mark = (stream or Event.current()).mark()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Event.current()).wait_event(self)

    def query(self) -> bool:
        with LOCK:
            return self.mark is None or self.mark.done

    def synchronize(self) -> None:
        if self.mark is None:
            return
        with LOCK:
            stream = self.mark.stream
            stream._schedule.synchronized("event" if self.blocking else "spinning event")
            stream.wait_on_host(self.mark)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between the two, on the host's clock."""
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self.mark is None or end.mark is None or not (self.mark.done and end.mark.done):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1000 * (end.mark.when - self.mark.when)


def _caller() -> str:
    """The line of the program, or of a library above torch, that made the host wait."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(f"/{part}/" in name for part in _OURS) and "simulated_cuda" not in name:
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
