"""Rows of a run in memory, as they are computed: `theloom.stream`.

The stages of the pipeline before the extraction run in this process: tokens, estimate, and the
record of the model go to a temporary folder, which is removed at the end, or by the next stream
where the process was killed. Then a thread extracts shard after shard, as a job of the pipeline
would, and puts the rows of each batch into a bounded queue. Rows are those of the run's
`activations.h5`, since the plan, and so every batch of windows, is the same.
"""

import logging
import multiprocessing
import multiprocessing.context
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from theloom.config import frozen, locations
from theloom.config.compose import Run, runs
from theloom.config.values import Assignment
from theloom.corpus import tokens
from theloom.corpus.tokens_file import reading
from theloom.dataset.batches import Batch, passes, process
from theloom.dataset.reader import TABLES
from theloom.devices import gpu, host
from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import context, model_record
from theloom.engine.context import ShardJob
from theloom.engine.mixing import mixed
from theloom.engine.resident import batches_of, plan_resident, stream_resident
from theloom.engine.row_queue import QueueClosedError, RowBlock, RowQueue, ShardRows
from theloom.errors import ConfigError, HookError, MemoryPlanError
from theloom.pipeline import load_model, preflight, request, stage_model
from theloom.pipeline.temporary import temporary_folder
from theloom.planning import estimate, measure, multi_gpu
from theloom.precision import BYTES, read_as
from theloom.rows.pooling import ADDED_UP
from theloom.terminal import format_bytes

if TYPE_CHECKING:
    from theloom.model.loading import LoadedModel


log = logging.getLogger(__name__)

BATCH_SIZE, SHUFFLE_BUFFER = 4096, 1 << 15

_FILES = ("extract.json", "estimate.h5", "model.h5", "tokens.h5")
_FILTER = "memory.activation_cache_filter"


def open_stream(
    profile: str | Run | None,
    hooks: str | Sequence[str] | None,
    batch_size: int,
    overrides: Sequence[str],
    config_dir: str | Path | None,
    **others: Any,
) -> "RowStream":
    """Prepare a stream; `theloom.stream` is the same.

    Args:
        profile: a profile's name, or a run; None: the profile of default.yaml.
        hooks: the hook points to give, or columns such as `input_ids`; None: as the run's keys say.
        batch_size: rows of a batch.
        overrides: `key=value` words; `overrides=FILE` reads a file of keys.
        config_dir: as of `theloom.stream`.
        **others: of `RowStream`.

    Returns:
        The stream.

    Raises:
        ConfigError: a key, a value or a hook point is wrong, or several runs are requested.
    """
    if isinstance(profile, Run):
        if overrides or hooks is not None:
            raise ConfigError("stream: a run has its keys; give hooks and overrides with a profile")
        return RowStream(profile, None, batch_size, **others)
    names = [hooks] if isinstance(hooks, str) else list(hooks or ())
    files = [Path(w.partition("=")[2]) for w in overrides if w.startswith("overrides=")]
    typed = [w for w in overrides if not w.startswith("overrides=")]
    read = request.of_words(profile, typed, files)
    assignments = list(read.assignments)
    points = tuple(name for name in names if name not in (*TABLES, "row"))
    if points:
        if any(a.key == _FILTER for a in assignments):
            raise ConfigError(f"stream: both hooks and {_FILTER} name hook points; give one")
        assignments.append(Assignment(_FILTER, (points,)))
    elif names:
        raise ConfigError(f"stream: {', '.join(names)} are no hook points; name one at least")
    folder = locations.config_folder() if config_dir is None else Path(config_dir)
    found = runs(folder, read.profiles, assignments)
    if len(found) > 1:
        raise ConfigError(
            f"stream: {len(found)} runs are requested ({', '.join(found)}); give one profile, and "
            "one value for each key"
        )
    (run,) = found.values()
    return RowStream(run, hooks, batch_size, **others)


class RowStream(IterableDataset[Batch]):
    """Batches of a run's rows, computed as they are taken.

    Each iteration computes all rows anew. Leaving one early stops its thread and frees the model;
    `close`, leaving the context, or dropping the stream removes the temporary folder. The workers
    of a DataLoader (with batch_size=None) share the batches of windows, and each loads a model of
    its own; processes of torch.distributed share the shards.

    Attributes:
        hooks: names of the hook points.
        names: of what a batch has.
        rows: of the run, of all processes together.
        attributes: where the rows come from: config, model, precision, plan.
    """

    def __init__(
        self,
        run: Run,
        hooks: str | Sequence[str] | None,
        batch_size: int,
        *,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        seed: int = 0,
        epochs: int | None = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if batch_size < 1 or shuffle_buffer < 0 or (epochs is not None and epochs < 1):
            raise ConfigError(
                f"stream: batch_size {batch_size} and epochs {epochs} are at least 1, "
                f"shuffle_buffer {shuffle_buffer} at least 0"
            )
        _check_run(run)
        self.batch_size, self.shuffle_buffer, self.seed = batch_size, shuffle_buffer, seed
        self.epochs = epochs
        self.single = isinstance(hooks, str)
        self._folder, self._remove = temporary_folder(self, "theloom-stream-")
        try:
            _prepare(run, self._folder)
            self._describe(hooks)
            self._share(rank, world_size)
        except BaseException:
            self.close()
            raise

    def _describe(self, hooks: str | Sequence[str] | None) -> None:
        """What the stages found, and the plan of each shard, which all processes follow."""
        job = self._first_job()
        if job.run.record.layerwise:
            raise MemoryPlanError(
                "stream: the model does not fit as a whole and goes layer by layer, which gives no "
                "row before the last layer; run the pipeline, or set memory.quantization or a "
                "smaller model"
            )
        self.hooks = [p.name for p in job.run.points]
        given = [hooks] if isinstance(hooks, str) else self.hooks if hooks is None else list(hooks)
        known = (*self.hooks, *TABLES, "row")
        self.names = [  # a pattern stands for the hook points that it matches
            name
            for word in given
            for name in ([word] if word in known else self._matching(job, word))
        ]
        if self.single and len(self.names) != 1:
            raise HookError(
                f"hooks={hooks!r} matches {len(self.names)} hook points; give a list: [{hooks!r}]"
            )
        self.rows = reading.sizes(self._folder / "tokens.h5").rows
        run = job.run
        widths = sum(p.width(run.longest_window) for p in run.points)
        self._row_bytes = widths * BYTES[read_as(run.store)]
        self._device = run.device.type
        self._pooled = run.config.rows.pool.name in ADDED_UP
        self._room = multi_gpu.available(run.device)
        self._plans = [plan_resident(job, self._room) for job in self._jobs(job)]
        spec = job.spec(self._plans[0].plan, 0)
        of_file = ("kind", "shard", "first_row")
        self.attributes = {n: v for n, v in spec.attributes.items() if n not in of_file}

    def _matching(self, job: ShardJob, word: str) -> list[str]:
        return [p.name for p in job.run.record.catalog.select([word])]

    def _share(self, rank: int | None, world_size: int | None) -> None:
        """The shards of this process."""
        self.rank, self.world_size = process(rank, world_size)
        if self.world_size > len(self._plans):
            raise ConfigError(
                f"stream: {self.world_size} processes share the shards, and there are "
                f"{len(self._plans)}; set extraction.shards={self.world_size} or a multiple"
            )

    def __getstate__(self) -> dict[str, Any]:
        # a copy in another process reads the folder, and leaves it to this one
        return {name: value for name, value in self.__dict__.items() if name != "_remove"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder; the stream gives no more rows."""
        if hasattr(self, "_remove"):
            self._remove()

    def __iter__(self) -> Iterator[Batch]:
        """Compute all rows, and give them in batches.

        Raises:
            TheLoomError: Whatever a job of the pipeline would end on, in one line.
        """
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        self._check_process(count, worker is not None)
        queue = RowQueue()
        thread = threading.Thread(
            target=_produce,
            args=(self, queue, number, count, torch.get_num_threads()),
            name="row stream",
            daemon=True,
        )
        thread.start()
        try:
            for epoch in passes(self.epochs):
                random = np.random.default_rng([self.seed, epoch, self.rank, number])
                blocks = map(self._columns, iter(queue.get, None))
                for batch in mixed(blocks, self.batch_size, self.shuffle_buffer, random):
                    yield batch[self.names[0]] if self.single else batch
        finally:
            queue.close()
            thread.join()

    def _check_process(self, workers: int, is_worker: bool) -> None:
        if not self._folder.is_dir():
            raise ConfigError("stream: it is closed; open another one with theloom.stream")
        forked = isinstance(multiprocessing.current_process(), multiprocessing.context.ForkProcess)
        if is_worker and forked and self._device != "cpu":
            raise ConfigError(
                f"stream: forked workers cannot use {self._device}; give the DataLoader "
                'multiprocessing_context="spawn"'
            )
        shards = len(self._plans[self.rank :: self.world_size])
        if self._pooled and workers > shards:
            raise ConfigError(
                f"stream: with rows.pool, {workers} workers share shards, and there are {shards}; "
                f"set extraction.shards={workers * self.world_size}, or fewer workers"
            )
        held = max(self.shuffle_buffer, self.batch_size) * self._row_bytes
        free = host.memory().free // workers
        if held > free:
            raise MemoryPlanError(
                f"shuffle_buffer: {max(self.shuffle_buffer, self.batch_size):,} rows take "
                f"{format_bytes(held)} of host memory, and {format_bytes(free)} are free for each "
                "worker; lower it, or name fewer hook points"
            )

    def _columns(self, block: RowBlock) -> dict[str, torch.Tensor]:
        """The columns of a block that batches have, by name."""
        tables = {"row": block.number, **block.tables}
        return {
            name: block.hooks[name] if name in block.hooks else torch.from_numpy(tables[name])
            for name in self.names
        }

    # what the thread does

    def _first_job(self) -> ShardJob:
        config, estimated, model, of_corpus = (self._folder / name for name in _FILES)
        nowhere = self._folder / "shards/none"  # no file of this name is ever there
        return context.read_job(config, estimated, model, of_corpus, 0, nowhere)

    def _jobs(self, first: ShardJob) -> Iterator[ShardJob]:
        """All shards, read one after the other."""
        for number in range(first.run.config.extraction.shards or 1):
            yield self._job(first, number)

    def _job(self, first: ShardJob, number: int) -> ShardJob:
        shard = reading.read_job(self._folder / "tokens.h5", number).shard
        return replace(first, number=number, tokens=shard)

    def _extract(self, queue: RowQueue, worker: int, workers: int) -> None:
        job = self._first_job()
        run = job.run
        measure.prepare_measurement(run.config.model)
        self._check_workers(job, workers)
        watch = MemoryWatch(run.device)
        loaded = model_record.load_again(run.config, run.record, run.points, run.target)
        try:
            for epoch in passes(self.epochs):
                self._extract_epoch(job, loaded, queue, (worker, workers), epoch, watch)
                queue.put(None)
        finally:
            del loaded
            gpu.release(run.device)

    def _extract_epoch(
        self,
        first: ShardJob,
        loaded: "LoadedModel",
        queue: RowQueue,
        part: tuple[int, int],
        epoch: int,
        watch: MemoryWatch,
    ) -> None:
        worker, workers = part
        shards = np.arange(len(self._plans))[self.rank :: self.world_size]
        if self.shuffle_buffer:
            shards = np.random.default_rng([self.seed, epoch]).permutation(shards)
        if self._pooled:  # rows of a document may be of several batches
            shards = shards[worker::workers]
        for number in shards.tolist():
            queue.check()
            job = self._job(first, number)
            planned = self._plans[number]
            batches = batches_of(job, planned.plan)
            if self.shuffle_buffer and not self._pooled:
                random = np.random.default_rng([self.seed, epoch, number])
                batches = [batches[n] for n in random.permutation(len(batches))]
            if not self._pooled:
                batches = batches[worker::workers]
            if batches:
                rows = ShardRows(queue, job.spec(planned.plan, len(batches)))
                stream_resident(job, planned, batches, loaded, rows, watch)

    def _check_workers(self, job: ShardJob, workers: int) -> None:
        """All workers' models fit with the plan of one."""
        if workers == 1:
            return
        memory, others = self._room
        room = replace(memory, free=memory.free // workers), others
        for one, planned in zip(self._jobs(job), self._plans, strict=True):
            if plan_resident(one, room).plan != planned.plan:
                raise MemoryPlanError(
                    f"stream: {workers} workers leave {format_bytes(room[0].free)} to each, which "
                    "makes batches smaller; use fewer workers, or lower extraction.batch_tokens"
                )


def _produce(stream: RowStream, queue: RowQueue, worker: int, workers: int, threads: int) -> None:
    """What the thread runs: every row into the queue, or the error."""
    torch.set_num_threads(threads)  # of the thread that reads; sums depend on how they are split
    try:
        stream._extract(queue, worker, workers)
    except QueueClosedError:
        log.info("stream: the reader has left")
    except BaseException as error:
        queue.fail(error)


def _check_run(run: Run) -> None:
    """Refuse what cannot be streamed, before anything is read."""
    config = frozen.to_config(run.config)
    if config.extraction.execution.name == "layerwise":
        raise ConfigError(
            "extraction.execution=layerwise: layer by layer there is no row before the last layer; "
            "set auto or resident, or run the pipeline"
        )
    if config.answers.source is not None:
        raise ConfigError(
            f"answers.source={config.answers.source.name}: a stream samples no answers; run the "
            "pipeline, or set answers.source=null"
        )
    if config.memory.profile_shard is not None:
        raise ConfigError("memory.profile_shard: a stream writes no profile; set it to null")
    preflight.check(run)


def _prepare(run: Run, folder: Path) -> None:
    """Run the stages before the extraction."""
    for stage in ("source", "estimate", "tokens", "model", "extract"):
        frozen.freeze(run.stage(stage), folder / f"{stage}.json")

    def config(stage: str) -> Any:
        return frozen.load_frozen(folder / f"{stage}.json")

    stage_model.stage(config("source"), folder / "found.json")
    estimate.run_estimate(config("estimate"), folder / "estimate.h5")
    tokens.tokenize(config("tokens"), folder / "tokens.h5")
    files = (folder / "estimate.h5", folder / "tokens.h5", folder / "model.h5")
    load_model.record(config("model"), *files)
