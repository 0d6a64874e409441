"""A job that is requested to stop (Ctrl-C, or a scheduler's SIGTERM) ends after its batch, with all
rows committed.
"""

import logging
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from theloom.devices import accelerator, gpu
from theloom.errors import MemoryPlanError
from theloom.planning.plan import Plan

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


class StopRequest:
    """Within the context, the first SIGINT or SIGTERM is only noted in `requested`; a second one
    ends the job at once.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        log.warning("%s: stopping after this batch; once more to stop at once", self.requested)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


# failures at the smallest batch and chunk after which a job gives up: memory may be freed meanwhile
_LAST_ATTEMPTS = 3


def until_it_fits(
    run: Callable[[int], None],
    cut: Callable[[int], Plan],
    level: int,
    device: "torch.device",
    advice: Callable[[Plan], str],
) -> None:
    """Run with the planned batches; where memory runs out, again with smaller ones.

    Args:
        run: runs with a level of cuts; it resumes from the last committed row.
        cut: the plan of a level; once a level's is no smaller, it is tried again.
        level: the first one.
        device: whose memory is released between attempts.
        advice: what to do, in words, about a plan that does not fit.

    Raises:
        MemoryPlanError: three attempts failed at the smallest size; with `advice`.
    """
    failures = 0
    while True:
        smaller = cut(level)
        error = _out_of_memory(partial(run, level))
        if error is None:
            return
        gpu.release(device)
        below = cut(level + 1)
        if below != smaller:
            level += 1
            log.warning(
                "out of memory with batches of %d tokens in chunks of %d (%s): "
                "resuming from the last committed row with batches of %d in chunks of %d",
                smaller.batch_tokens,
                smaller.chunk_size,
                error,
                below.batch_tokens,
                below.chunk_size,
            )
            continue
        failures += 1
        if failures == _LAST_ATTEMPTS:
            raise MemoryPlanError(
                f"memory ran out {failures} times with the smallest batches "
                f"({smaller.batch_tokens} tokens in chunks of {smaller.chunk_size}): {error}; "
                f"{advice(smaller)}"
            )
        log.warning("out of memory with the smallest batches (%s): trying once more", error)


def _out_of_memory(work: Callable[[], None]) -> str | None:
    """Run something; the error in one line if memory ran out, else None. Nothing of what failed is
    kept alive.
    """
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not accelerator.is_out_of_memory(error):
            raise
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
