"""What a job does when memory runs out all the same: the same work in smaller pieces, behind what is committed."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from theloom import gpu
from theloom.errors import MemoryPlanError
from theloom.plan import Plan

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# failures at the smallest batch and chunk after which a job gives up: memory may be freed meanwhile
_LAST_ATTEMPTS = 3


def until_it_fits(
    run: Callable[[int], None],
    cut: Callable[[int], Plan],
    level: int,
    device: "torch.device",
    advice: Callable[[Plan], str],
) -> None:
    """Call `run(level)`; where memory runs out, again with the next level, as long as its `cut` is smaller.

    Raises MemoryPlanError, with `advice`, after three failures at the smallest size.
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
                "out of memory with batches of %d tokens in chunks of %d (%s): going on from the last committed row "
                "with batches of %d in chunks of %d",
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
                f"memory ran out {failures} times with the smallest batches ({smaller.batch_tokens} tokens in chunks "
                f"of {smaller.chunk_size}): {error}; {advice(smaller)}"
            )
        log.warning("out of memory with the smallest batches (%s): trying once more", error)


def _out_of_memory(work: Callable[[], None]) -> str | None:
    """Run something; the error in one line if memory ran out, else None. Nothing of what failed is kept alive."""
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        # torch's allocator on the CPU raises a plain RuntimeError
        if isinstance(error, RuntimeError) and not (
            type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        ):
            raise
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
