"""The loop over a shard's batches: each through a runner, its rows into the hand-off, what was
measured next to them.

It knows nothing of how a runner runs its blocks, nor of how rows come to be on disk.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from theloom.corpus import batching
from theloom.corpus.batching import Batch, positions_in
from theloom.devices import accelerator, gpu, pinned, streams
from theloom.devices.peak_memory import MemoryWatch
from theloom.devices.streams import Mark
from theloom.engine.handoff import Handoff, RowSink
from theloom.engine.interrupts import StopRequest
from theloom.engine.progress import Moment, Progress
from theloom.engine.row_probe import RowProbe, riskiest
from theloom.engine.selection import Selection
from theloom.errors import StoppedError
from theloom.hooks.points import HookPoint
from theloom.memory.profile import ShardProfile
from theloom.planning.plan import Plan
from theloom.store.ring_buffer import bytes_ahead
from theloom.store.shard_file import ShardTokens

if TYPE_CHECKING:
    import numpy as np
    import torch


log = logging.getLogger(__name__)

# called with a hook point's name, the first position of a chunk, and its values (window, position,
# …) on the device; they are the model's own, which may change them after the call
Sink = Callable[[str, int, "torch.Tensor"], None]


class Runner(Protocol):
    """What runs the blocks over one batch of token ids (window, position) and gives every chunk to
    a sink.
    """

    def run(
        self,
        ids: "torch.Tensor",
        sink: Sink,
        captured: "Callable[[torch.Tensor], None] | None" = None,
        lengths: Sequence[int] | None = None,
        windows: Sequence[int] = (),
    ) -> None:
        """Run the blocks over one batch.

        Args:
            ids: Token ids (window, position), padded on the right, on the host.
            sink: Takes every chunk of every hook point.
            captured: Sees each of the values before the sink; None: nothing does.
            lengths: Tokens of each window; None: there is no padding.
            windows: Their numbers in the shard.
        """
        ...

    def alone(
        self, ids: "torch.Tensor", points: Sequence[HookPoint], window: int
    ) -> "dict[str, torch.Tensor]":
        """Run one document in one pass without padding.

        Args:
            ids: Token ids (1, position).
            points: The hook points to read.
            window: Its number in the shard.

        Returns:
            By hook point, (position, …) in FP32 on the host.
        """
        ...


@dataclass(frozen=True)
class Work:
    """The batches of a shard, in the order in which they are committed, and what is read from them.

    `predicted`: the bytes that the run was predicted to take. `tolerance`: the error that rounding
    explains, as a share of the largest value. `longest_pass`: tokens of the longest document that
    fits in one pass. `pool`: how rows of a document are made one. `planned`: tokens by which each
    window is planned where these are not its own, (windows,).
    """

    batches: list[Batch]
    tokens: ShardTokens
    points: list[HookPoint]
    precision: str
    device: "torch.device"
    predicted: int
    warning_threshold: float
    tolerance: float
    longest_pass: int
    pool: str = "none"
    planned: "np.ndarray | None" = None

    @property
    def selection(self) -> Selection:
        """What is stored of the batches, from the first one on."""
        return Selection(self.tokens, self.pool, self.precision)


def run_batches(
    runner: Runner,
    work: Work,
    plan: Plan,
    writer: RowSink,
    profile: ShardProfile,
    watch: MemoryWatch,
    oom_level: int = 0,
) -> None:
    """Run all batches that are not committed yet; a batch that is larger than the plan goes in
    several passes.

    Args:
        runner: Runs the blocks.
        work: The batches of the shard, and what is read from them.
        plan: The tokens of a pass and of a chunk.
        writer: Takes the rows; its `batches_done` are not stored again.
        profile: Records what was requested of single batches.
        watch: Watches the memory in use.
        oom_level: How many times batch and chunk were halved because memory ran out.

    Raises:
        StoppedError: The job is requested to stop; all that was forwarded is committed.
    """
    batches, total = work.batches, sum(sum(b.lengths) for b in work.batches)
    first, selection = writer.batches_done, work.selection
    done = sum(sum(b.lengths) for b in batches[:first])
    rows = sum(selection.rows(b) for b in batches[:first])
    again = selection.again(batches, first)
    left = (*again, *range(first, len(batches)))
    passes = {n: _passes(batches[n], plan, work.planned) for n in left}
    every = [one for several in passes.values() for one in several]
    largest = selection.largest(every, work.points, plan.chunk_size)
    progress = Progress(total, done, work.predicted, watch)
    measured = _Measured(writer, work, watch, done, oom_level)
    longest = 0 if oom_level else work.longest_pass  # where memory ran out, no pass is longer
    probe = RowProbe(riskiest(every, plan.chunk_size, longest), work.points, work.tolerance)
    warned = False
    step = selection.step_bytes(every, work.points, plan.chunk_size)
    ahead = bytes_ahead(step, len(gpu.devices_of_job(work.device)))
    with StopRequest() as stop, Handoff(writer, work.device, largest, ahead) as handoff:
        for number, several in passes.items():
            for batch in several:
                ids = batching.padded(batch, work.tokens.input_ids, work.tokens.window_offset)

                def hand_over(
                    hook: str,
                    start: int,
                    values: "torch.Tensor",
                    batch: Batch = batch,
                    number: int = number,
                ) -> None:
                    step = selection.step(batch, start, values.shape[1], number < first)
                    handoff.rows(step, hook, step.take(values))
                    probe.keep(hook, values)

                probe.begin(batch, plan.chunk_size)
                with profile.batch(number, ids) as captured, measured.forward():
                    runner.run(
                        pinned.pinned_copy(ids, work.device),
                        hand_over,
                        captured,
                        batch.lengths,
                        batch.windows,
                    )
                measured.forwarded += positions_in(ids)
                probe.compare(runner, batch, ids)
            if number < first:
                continue
            done += sum(batches[number].lengths)
            rows += selection.rows(batches[number])
            last = number == len(batches) - 1
            ends = last or stop.requested is not None
            handoff.batch_done(rows, ends, measured.metrics(handoff, done, ends))
            warned = warned or gpu.warn_above(work.warning_threshold, work.device)
            progress.update(Moment(done, handoff.bytes_written, handoff.seconds_waiting), last)
            if stop.requested is not None and not last:
                break
    measured.log(handoff, done)
    probe.log()
    if done < total:
        raise StoppedError(
            f"stopped by {stop.requested} with {done:,} of {total:,} tokens on disk; "
            "run again to resume"
        )


def _passes(batch: Batch, plan: Plan, planned: "np.ndarray | None") -> list[Batch]:
    limits = plan.batch_tokens, plan.chunk_size, plan.streamed_windows
    return batching.smaller(batch, *limits, planned)


class _Measured:
    """The figures of a run, on top of those of earlier jobs on the same shard."""

    def __init__(
        self, writer: RowSink, work: Work, watch: MemoryWatch, first: int, oom_level: int
    ) -> None:
        self._before: dict[str, float] = dict(writer.metrics)
        self._taker = writer.taker
        self._work, self._watch, self._first, self._level = work, watch, first, oom_level
        self._began = time.perf_counter()
        self._forward = _Clock(work.device)
        self.forwarded = 0

    def forward(self) -> "_Clock":
        """Around a forward pass."""
        return self._forward

    def metrics(self, handoff: Handoff, done: int, ends: bool) -> dict[str, float]:
        """Seconds and tokens of all jobs so far, by the names that the file has for them; bytes of
        memory. Where the job ends, those of all forward passes; else of those that are over.
        """
        if ends:
            self._forward.wait()
        now = self._of_this_job(handoff, done)
        summed = {name: self._before[name] + value for name, value in now.items()}
        peak = max(self._before["peak_memory"], float(self._watch.peak))
        level = max(self._before["oom_level"], float(self._level))
        return summed | {
            "peak_memory": peak,
            "predicted_memory": float(self._work.predicted),
            "oom_level": level,
        }

    def log(self, handoff: Handoff, done: int) -> None:
        """Where the time went, and how much of what was forwarded was padding."""
        now = self._of_this_job(handoff, done)
        total = max(now["seconds_total"], 1e-9)
        shares = {
            n.removeprefix("seconds_"): 100 * v / total
            for n, v in now.items()
            if n.startswith("seconds_")
        }
        log.info(
            "of %.1f s: forward %.1f%%, copies %.1f%%, waiting for the %s %.1f%%, idle %.1f%%; "
            "the writer was busy "
            "for %.1f%%; padding: %.1f%% of the tokens forwarded",
            total,
            *(shares[n] for n in ("forward", "copy")),
            self._taker,
            *(shares[n] for n in ("waiting_for_disk", "idle")),
            100 * handoff.seconds_writing / total,
            100 * (1 - now["tokens"] / max(1, now["tokens_forwarded"])),
        )
        if shares["waiting_for_disk"] > 10 and self._taker == "disk":
            log.warning(
                "the disk is the limit: the model waited for it %.0f%% of the time, at %.1f MB/s",
                shares["waiting_for_disk"],
                handoff.bytes_written / max(handoff.seconds_writing, 1e-9) / 1e6,
            )

    def _of_this_job(self, handoff: Handoff, done: int) -> dict[str, float]:
        """`idle` is the time in which neither the device computed nor its rows were copied: disk
        waits are in it.
        """
        total = time.perf_counter() - self._began
        # on the CPU rows are copied within the forward; a GPU copies them at the same time
        copies = handoff.seconds_copying if self._work.device.type == "cpu" else 0.0
        forward = max(0.0, self._forward.seconds() - handoff.seconds_waiting - copies)
        return {
            "seconds_total": total,
            "seconds_forward": forward,
            "seconds_copy": handoff.seconds_copying,
            "seconds_waiting_for_disk": handoff.seconds_waiting,
            "seconds_idle": max(0.0, total - forward - copies),
            "tokens": float(done - self._first),
            "tokens_forwarded": float(self.forwarded),
        }


class _Clock:
    """Seconds that a job's devices spent in the `with` blocks: with streams between marks of them,
    without a wait; of several devices, which work at the same time, the slowest counts.
    """

    def __init__(self, device: "torch.device") -> None:
        self._devices = gpu.devices_of_job(device) if accelerator.has_streams(device) else ()
        self._seconds = [0.0] * max(1, len(self._devices))
        self._open: list[tuple[list[Mark], list[Mark]]] = []

    def __enter__(self) -> None:
        self._began, self._start = time.perf_counter(), self._marks()

    def __exit__(self, *_: object) -> None:
        if self._devices:
            self._open.append((self._start, self._marks()))
        else:
            self._seconds[0] += time.perf_counter() - self._began

    def wait(self) -> None:
        """Wait for the end of all blocks."""
        for _, ends in self._open:
            for end in ends:
                end.synchronize()

    def seconds(self) -> float:
        """All of them so far; with streams of the blocks that the devices are through with."""
        while self._open and all(end.query() for end in self._open[0][1]):
            for number, (start, end) in enumerate(zip(*self._open.pop(0), strict=True)):
                self._seconds[number] += start.seconds_to(end)
        return max(self._seconds)

    def _marks(self) -> list[Mark]:
        return [streams.mark(device, timing=True) for device in self._devices]
