"""The extraction of one shard layer by layer: plan, sweep, rows into the shard writer, and what a
killed job left.
"""

import logging
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from theloom import terminal
from theloom.config.schema import Config
from theloom.corpus import batching
from theloom.corpus.batching import Batch
from theloom.devices import gpu, host
from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import interrupts, model_record
from theloom.engine.context import ShardJob
from theloom.engine.handoff import Handoff
from theloom.engine.interrupts import StopRequest
from theloom.engine.layerwise import residual_store
from theloom.engine.layerwise.model import LayerwiseModel
from theloom.engine.layerwise.residual_store import ResidualSpec, ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner, Swept
from theloom.engine.row_probe import RowsDifferError, SweptProbe
from theloom.engine.selection import Selection
from theloom.errors import MemoryPlanError
from theloom.hooks.points import HookPoint
from theloom.memory.profile import ShardProfile
from theloom.planning import disk, layerwise_plan, measure
from theloom.planning.layerwise_plan import LayerwisePlan
from theloom.planning.plan import Plan
from theloom.precision import TOLERANCE
from theloom.store.partial import partial_of
from theloom.store.shard_file import ShardSpec
from theloom.store.writer import ShardWriter

log = logging.getLogger(__name__)

WAITED_TOO_LONG = 0.1  # of a sweep's time without weights, above which it is worth a word

_ADVICE = (
    "lower memory.streaming_chunk_size or corpus.context_length, or free memory, and run again"
)


@dataclass(frozen=True)
class _Measured:
    """The bytes that a sweep was predicted to take, what watches and records its memory, and what
    asks it to stop.
    """

    predicted: int
    watch: MemoryWatch
    stop: StopRequest
    profile: ShardProfile


def extract_layerwise(job: ShardJob) -> None:
    """Extract a shard with one block at a time on the device.

    Args:
        job: The shard; a partial file of it is resumed. Its `oom_level` is how many times the
            windows of a batch are halved from the start.

    Raises:
        ModelError: The model cannot be run layer by layer, or a document is too long for it.
        MemoryPlanError: It does not fit.
        StoppedError: The job was requested to stop.
    """
    run, device, output = job.run, job.run.device, job.output
    measure.prepare_measurement(run.config.model)
    watch = MemoryWatch(device)
    with model_record.open_again(run.config, run.record, run.target) as model:
        planned = _plan(job, model)
        batches = batching.plan_batches(
            job.lengths,
            planned.plan.batch_tokens,
            planned.plan.chunk_size,
            planned.plan.streamed_windows,
            run.record.switches,
        )
        tolerance = max(model.loaded.tolerance, TOLERANCE[run.handed])
        probe = SweptProbe(batches, planned.plan.chunk_size, run.points, tolerance)
        ids = [
            batching.padded(b, job.tokens.input_ids, job.tokens.window_offset)
            for b in (*batches, *probe.batches)
        ]
        most = max((len(b.windows) for b in batches), default=1)
        largest = batching.largest(batches, 0, planned.plan.chunk_size) if job.profiled else ()
        profile = ShardProfile(model.loaded, output, largest)
        predicted = planned.need.device - planned.need.fixed
        if device.type == "cpu":
            predicted = planned.need.cpu + run.record.correction.overhead
            if not planned.spilled:
                predicted += model.residual_row * sum(b.tokens for b in probe.batches)

        # the batches of a partial file go in groups where they are larger than now requested
        requested = run.estimate.batch_tokens or planned.plan.batch_tokens
        least = max(0, (-(-planned.plan.batch_tokens // requested) - 1).bit_length())

        @cache
        def memory(residuals: ResidualSpec) -> torch.Tensor:
            return residual_store.host_memory(residuals, device, planned.spilled)

        def extract(level: int) -> None:
            groups = 1 << max(level, least)
            selection = Selection(job.tokens, run.config.rows.pool.name, run.handed)
            runner = LayerwiseRunner(
                model.shell,
                model.source,
                run.points,
                planned.plan.chunk_size,
                selection.handed,
                groups,
            )
            for stage in runner.stages:
                selection.check_room(batches, runner.points(stage))
            spec = job.spec(planned.plan, len(runner.stages) * len(ids))
            residual_spec = runner.residuals(ids, job.fingerprint)
            _check_disk(spec, output, residual_spec.nbytes)
            try:
                with ShardWriter(output, spec) as writer:
                    store = ResidualStore(
                        residual_spec, output, planned.spilled, device, memory(residual_spec)
                    )
                    if writer.batches_done < spec.batches:
                        writer.metrics["oom_level"] = max(writer.metrics["oom_level"], level)
                        largest = selection.largest(batches, run.points, planned.plan.chunk_size)
                        with (
                            store,
                            StopRequest() as stop,
                            Handoff(writer, device, largest) as handoff,
                        ):
                            measured = _Measured(predicted, watch, stop, profile)
                            swept = _sweep(
                                runner,
                                ids,
                                batches,
                                selection,
                                probe,
                                store,
                                writer,
                                handoff,
                                measured,
                            )
                        _say(swept, run.config)
                        probe.log()
                        gpu.warn_above(run.threshold, device)
                    store.remove()
                    writer.finish()
            except RowsDifferError:  # a job that resumes would not see it again
                store.remove()
                partial_of(output).unlink()
                raise

        def cut(level: int) -> Plan:
            """Batches get smaller as long as one has several windows; what is committed keeps its
            chunks.
            """
            halved = min(level, (most - 1).bit_length())
            return replace(
                planned.plan, batch_tokens=-(-planned.plan.batch_tokens // (1 << halved))
            )

        interrupts.until_it_fits(extract, cut, job.oom_level, device, lambda _: _ADVICE)


def _plan(job: ShardJob, model: LayerwiseModel) -> LayerwisePlan:
    """What fits now; a partial shard keeps the batches that it was started with."""
    run, windows, started = job.run, job.windows, job.started_plan()
    points, overhead = run.points, run.record.correction.overhead
    if started is None:
        planned = model.fit(
            run.estimate, points, windows, run.threshold, overhead, streams=job.streams
        )
    else:
        row_bytes = run.estimate.largest_capture[model.kind.name]
        largest = row_bytes * started.copied_rows(run.estimate.kept_of_window)
        planned = _as_started(model, points, started, windows.tokens, overhead, largest)
    device = model.loaded.device.type
    needed = planned.need.cpu if device == "cpu" else planned.need.device
    log.info(
        "plan: layer by layer, batches of %d tokens, chunks of %d; %s%s",
        planned.plan.batch_tokens,
        planned.plan.chunk_size,
        terminal.format_bytes(needed),
        "" if device == "cpu" else f", host {terminal.format_bytes(planned.need.host)}",
    )
    for change in planned.changes:
        log.warning("to fit: %s", change)
    return planned


def _as_started(
    model: LayerwiseModel,
    points: list[HookPoint],
    cut: Plan,
    tokens: int,
    overhead: int,
    largest: int,
) -> LayerwisePlan:
    device, row = model.loaded.device.type, model.residual_row
    available, _ = gpu.available_memory(model.loaded.device)
    for spilled in (False, True):
        needed = layerwise_plan.need(
            model.sizes(points),
            model.pass_of(points),
            cut.passes,
            tokens * row,
            row,
            device,
            spilled,
            largest=largest,
            capability=gpu.compute_capability(model.loaded.device),
        )
        on_host = needed.cpu if device == "cpu" else needed.host
        if on_host + overhead <= host.memory().free and (
            device == "cpu" or needed.device <= available.free
        ):
            return LayerwisePlan(cut, spilled, needed)
    raise MemoryPlanError(
        f"a shard was started layer by layer with batches of {cut.batch_tokens} tokens, which take "
        f"{terminal.format_bytes(needed.cpu if device == 'cpu' else needed.device)}, and {device} "
        "has "
        f"{terminal.format_bytes(available.free)} free; free some, or remove its .partial file to "
        "start over"
    )


def _check_disk(spec: ShardSpec, output: Path, residuals: int) -> None:
    """The shard, and twice the residuals: files of earlier jobs count as free."""
    there = [
        *output.parent.glob(f"{output.name}.partial"),
        *output.parent.glob(f"{output.name}.residuals.*"),
    ]
    taken = sum(file.stat().st_blocks * 512 for file in there)
    needed = spec.nbytes + 2 * residuals
    disk.check_disk(output.parent, max(0, needed - taken), shutil.disk_usage(output.parent).free)


def _sweep(
    runner: LayerwiseRunner,
    ids: list[torch.Tensor],
    batches: list[Batch],
    selection: Selection,
    probe: SweptProbe,
    store: ResidualStore,
    writer: ShardWriter,
    handoff: Handoff,
    measured: _Measured,
) -> Swept:
    """All blocks; rows reach the writer hook point by hook point, and are whole with the last
    block. `ids` are of the batches, and of those of the probe.
    """
    rows = sum(map(selection.rows, batches))
    last_stage, total = (len(runner.stages) - 1) * len(ids), len(runner.stages) * len(ids)
    ready, first_unit = 0, writer.batches_done
    units = first_unit  # handed over: the writer's own number comes later
    under_way = first_unit % len(ids)  # batches of that stage that are done

    def write(number: int, name: str, start: int, values: torch.Tensor, first: int) -> None:
        if number >= len(batches):
            probe.compare(number - len(batches), name, values)
            return
        batch, own = batches[number], slice(first, first + len(values))
        part = Batch(batch.windows[own], batch.lengths[own])
        again = units == first_unit and number < under_way
        step = selection.step(part, start, values.shape[1], again)
        handoff.rows(step, name, step.take(values))
        probe.keep(part, name, values)

    def unit_done(number: int) -> None:
        nonlocal ready, units
        if units >= last_stage:
            whole = number >= len(batches) - 1
            ready = rows if whole else ready + selection.rows(batches[number])
        handoff.batch_done(ready, units == total - 1, {})
        units += 1

    def commit() -> None:
        handoff.drain()
        writer.commit()

    swept = runner.sweep(
        ids,
        store,
        write,
        done=first_unit,
        again=selection.again(batches, min(under_way, len(batches))),
        unit_done=unit_done,
        commit=commit,
        stop=lambda: measured.stop.requested,
        profile=lambda number, ids, there: measured.profile.batch(
            number, ids, lambda: [*there(), handoff.buffer]
        ),
    )
    handoff.drain()
    writer.metrics["peak_memory"] = max(writer.metrics["peak_memory"], float(measured.watch.peak))
    writer.metrics["predicted_memory"] = float(measured.predicted)
    taken = {
        "seconds_total": swept.seconds,
        "seconds_waiting_for_weights": swept.waited,
        "bytes_of_weights": swept.bytes_read,
        "tokens": sum(sum(b.lengths) for b in batches),
        "tokens_forwarded": swept.tokens,
    }
    taken |= {
        "seconds_copy": handoff.seconds_copying,
        "seconds_waiting_for_disk": handoff.seconds_waiting,
    }
    for name, value in taken.items():
        writer.metrics[name] += value
    return swept


def _say(swept: Swept, frozen: Config) -> None:
    share = swept.waited / max(swept.seconds, 1e-9)
    words = "%d tokens through %d blocks in %.1f s; %s of weights read, waited for %.1f s (%.0f%%)"
    read = terminal.format_bytes(swept.bytes_read)
    log.info(words, swept.tokens, swept.blocks, swept.seconds, read, swept.waited, 100 * share)
    if share > WAITED_TOO_LONG and (frozen.extraction.shards or 1) > 1:
        fewer = max(1, int((frozen.extraction.shards or 1) * WAITED_TOO_LONG / share))
        log.warning(
            "%.0f%% of the time went by waiting for weights: shards this small do not hide the "
            "reads; "
            "extraction.shards=%d would, where host memory or disk holds their residuals",
            100 * share,
            fewer,
        )
