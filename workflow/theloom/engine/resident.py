"""Resident execution: the model as a whole on the device, batch by batch."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from theloom.corpus import batching
from theloom.corpus.batching import Batch
from theloom.corpus.media.chat_inputs import ChatInputs
from theloom.corpus.media.inputs import Inputs
from theloom.corpus.targets.sources import Sources
from theloom.devices import gpu
from theloom.devices.host import DeviceMemory
from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import interrupts, model_record
from theloom.engine.batch_loop import Sink, Work, run_batches
from theloom.engine.context import RunContext, ShardJob
from theloom.engine.handoff import RowSink, rows_of
from theloom.engine.selection import Selection
from theloom.hooks.points import HookPoint
from theloom.hooks.taps import Taps
from theloom.memory.profile import ShardProfile
from theloom.model.forward import prefill
from theloom.model.loading import LoadedModel
from theloom.planning import disk, measure, multi_gpu
from theloom.planning.plan import Plan, Planned, longest_pass, plan_advice
from theloom.precision import torch_dtype
from theloom.store.partial import committed_batches
from theloom.store.writer import ShardWriter

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


class ResidentRunner:
    """Runs batches through a model that is on the device as a whole."""

    def __init__(
        self,
        loaded: LoadedModel,
        points: list[HookPoint],
        chunk_size: int,
        store: str | None,
        offloaded: bool = False,
        causal: bool = True,
        sources: Sources | Inputs | ChatInputs | None = None,
    ) -> None:
        self._loaded, self._points, self._chunk_size = loaded, points, chunk_size
        self._store, self._offloaded, self._causal = store, offloaded, causal
        self._sources = sources
        self._dtype = None if store is None else torch_dtype(store)

    def run(
        self,
        ids: "torch.Tensor",
        sink: Sink,
        captured: "Callable[[torch.Tensor], None] | None" = None,
        lengths: Sequence[int] | None = None,
        windows: Sequence[int] = (),
    ) -> None:
        """Forward one batch; hand every chunk of every hook point to `sink`.

        Args:
            ids: Token ids (window, position), padded on the right.
            sink: Takes values in the dtype of the store, or the model's own where none was given.
            captured: Sees each of these values before the sink; None: nothing does.
            lengths: Tokens of each window, by which a model that is not causal masks its padding;
                None: there is no padding.
            windows: Their numbers in the shard, by which a decoder gets its sources.
        """
        position = dict.fromkeys((p.name for p in self._points), 0)
        over_keys = {p.name for p in self._points if p.over_keys}

        def hand_over(name: str, value: "torch.Tensor") -> None:
            rows = rows_of(value, self._dtype, name in over_keys)
            if captured is not None:
                captured(rows)
            sink(name, position[name], rows)
            position[name] += rows.shape[1]

        with Taps(self._loaded.architecture, self._points, hand_over) as taps:
            masked = None if self._causal else lengths or [ids.shape[1]] * len(ids)
            sources = {} if self._sources is None else self._sources.of(windows)
            whole = sources and isinstance(self._sources, ChatInputs)
            chunk_size = ids.shape[1] if whole else self._chunk_size  # pixels are of no chunk
            prefill(taps, ids, chunk_size, masked, self._offloaded, sources)

    def alone(
        self, ids: "torch.Tensor", points: Sequence[HookPoint], window: int
    ) -> "dict[str, torch.Tensor]":
        """The rows of one document, in one pass without padding.

        Args:
            ids: Token ids (1, position).
            points: The hook points to read.
            window: Its number in the shard.

        Returns:
            By hook point, (position, …) in FP32 on the host; of a state the last position alone.
        """
        rows: dict[str, torch.Tensor] = {}
        first = {p.name: p.first for p in points}
        whole = ResidentRunner(
            self._loaded,
            list(points),
            ids.shape[1],
            self._store,
            causal=self._causal,
            sources=self._sources,
        )
        whole.run(
            ids,
            lambda hook, _, values: rows.update({hook: values[0, first[hook] :].float().cpu()}),
            None,
            None,
            [window],
        )
        return rows


class KeptModel:
    """A run's model, loaded for the first shard that needs it and kept for those after it.

    Every shard is planned for the memory that was free before the model was loaded, so that its
    plan is the one that a job of its own would have.

    Args:
        run: The run.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.room = multi_gpu.available(run.device)
        self._loaded: tuple[LoadedModel, MemoryWatch] | None = None

    def load(self) -> tuple[LoadedModel, MemoryWatch]:
        """The model on its device, and what watches the memory since before it was loaded.

        Returns:
            Both; the peak is of the time since this call.

        Raises:
            ModelError: The model's files have changed.
        """
        run = self._run
        if self._loaded is None:
            # The import of code is not the run's memory.
            measure.prepare_measurement(run.config.model)
            watch, begun = MemoryWatch(run.device), time.perf_counter()
            loaded = model_record.load_again(run.config, run.record, run.points, run.target)
            log.info("model loaded in %.1f s", time.perf_counter() - begun)
            self._loaded = loaded, watch
        else:
            self._loaded[1].restart()
        return self._loaded


def extract_resident(job: ShardJob, kept: KeptModel) -> None:
    """Extract a shard with the model as a whole on the device.

    Args:
        job: The shard; a partial file of it is resumed.
        kept: The model of its run, which earlier shards may have loaded.

    Raises:
        ModelError: The model's files have changed, or a document is too long for it.
        MemoryPlanError: It does not fit.
        StoppedError: The job was requested to stop.
    """
    run = job.run
    fitting = plan_resident(job, kept.room)
    plan = fitting.plan
    # the batches of a partial file stay what is committed; one too large for this plan goes in
    # several passes
    whole = job.started_plan() or plan
    batches = batches_of(job, whole)
    spec = job.spec(whole, len(batches))
    disk.check_disk(
        job.output.parent, job.bytes_to_write(spec), shutil.disk_usage(job.output.parent).free
    )
    Selection(job.tokens, run.config.rows.pool.name, run.handed).check_room(batches, run.points)
    first = committed_batches(job.output, job.fingerprint)
    if first == len(batches):  # an earlier job was killed between its last row and the rename
        with ShardWriter(job.output, spec) as writer:
            if writer.batches_done == len(batches):
                writer.finish()
                return
    loaded, watch = kept.load()
    largest = batching.largest(batches, first, plan.chunk_size) if job.profiled else ()
    profile = ShardProfile(loaded, job.output, largest)
    _run(job, fitting, batches, loaded, lambda: ShardWriter(job.output, spec), profile, watch)


def stream_resident(
    job: ShardJob,
    fitting: Planned,
    batches: Sequence[Batch],
    loaded: LoadedModel,
    into: RowSink,
    watch: MemoryWatch,
) -> None:
    """Extract batches of a shard with a model that is loaded, and hand the rows to a sink; no file
    is written.

    Args:
        job: The shard.
        fitting: What `plan_resident` gave for it.
        batches: All or some of `batches_of` its plan, in any order.
        loaded: The model of the job's record.
        into: Takes the rows, and counts the batches that it has all rows of.
        watch: The memory since before the model was loaded.

    Raises:
        MemoryPlanError: It does not fit.
    """
    run = job.run
    Selection(job.tokens, run.config.rows.pool.name, run.handed).check_room(batches, run.points)
    unrecorded = ShardProfile(loaded, job.output, ())
    _run(job, fitting, batches, loaded, lambda: into, unrecorded, watch)


def batches_of(job: ShardJob, plan: Plan) -> list[Batch]:
    """The batches of a shard by a plan.

    Args:
        job: The shard.
        plan: The tokens of a pass and of a chunk.

    Returns:
        In the order in which they are committed.
    """
    batches = batching.plan_batches(
        job.planned_lengths,
        plan.batch_tokens,
        plan.chunk_size,
        plan.streamed_windows,
        job.run.record.switches,
        job.sources.alike,
    )
    return batches if job.sources.lengths is None else batching.of_lengths(batches, job.lengths)


def _run(
    job: ShardJob,
    fitting: Planned,
    batches: Sequence[Batch],
    loaded: LoadedModel,
    open_sink: Callable[[], RowSink],
    profile: ShardProfile,
    watch: MemoryWatch,
) -> None:
    """Run the batches that a sink lacks, in smaller passes wherever memory runs out."""
    run, plan, predicted = job.run, fitting.plan, fitting.components
    work = Work(
        list(batches),
        job.tokens,
        run.points,
        run.handed,
        run.device,
        predicted.allocated if run.device.type != "cpu" else predicted.total,
        run.threshold,
        loaded.tolerance,
        longest_pass(run.estimate, run.weight_format.name, plan, job.planned_lengths.tolist()),
        run.config.rows.pool.name,
        None if job.sources.lengths is None else job.planned_lengths,
    )

    def smaller(level: int) -> Plan:
        return plan.backed_off(level, streams=run.record.streams)

    def extract(level: int) -> None:
        """Resume behind the last committed row, and go to the end."""
        cut = smaller(level)
        handed = work.selection.handed
        runner = ResidentRunner(
            loaded,
            run.points,
            cut.chunk_size,
            handed,
            cut.offloaded,
            run.record.causal,
            job.sources,
        )
        with open_sink() as sink:
            run_batches(runner, work, cut, sink, profile, watch, level)
            sink.finish()

    def advice(smallest: Plan) -> str:
        free, _ = gpu.available_memory(run.device)
        name, correction = run.weight_format.name, run.record.correction
        capability = gpu.compute_capability(run.device)
        return plan_advice(
            run.estimate, name, run.device.type, free, smallest, correction, capability
        )

    interrupts.until_it_fits(extract, smaller, job.oom_level, run.device, advice)


def plan_resident(job: ShardJob, room: "tuple[DeviceMemory, str] | None" = None) -> Planned:
    """The plan that fits the device.

    Args:
        job: The shard.
        room: The memory to plan for, as `multi_gpu.available` gave it; None: what is free now.

    Returns:
        The plan, its bytes, and what was changed for it to fit.

    Raises:
        MemoryPlanError: Nothing fits.
    """
    run = job.run
    return multi_gpu.fit_plan(
        run.estimate,
        run.weight_format,
        run.device,
        run.threshold,
        job.windows,
        run.record.correction,
        job.streams,
        room,
    )
