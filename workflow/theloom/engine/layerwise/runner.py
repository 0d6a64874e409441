"""Extraction with one block on the device at a time: all documents of a shard go through it before
the next one comes.

A forward pass over a prompt has no dependency between documents, so a model need not be on the
device as a whole. The residuals of the shard wait in host memory; the weights of each block are
read once a shard, while the block before is computing. Blocks, batches, chunks and taps are those
of resident execution, and so are the rows.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch

from theloom.corpus.batching import positions_in
from theloom.engine import handoff
from theloom.engine.layerwise.block_loader import BlockSource
from theloom.engine.layerwise.residual_store import ResidualSpec, ResidualStore
from theloom.engine.layerwise.skeleton import Shell
from theloom.engine.progress import SweepProgress
from theloom.errors import HookError, StoppedError
from theloom.hooks.blocks import Architecture
from theloom.hooks.locate import Anatomy
from theloom.hooks.points import LAST_STATE, HookPoint
from theloom.hooks.taps import Taps
from theloom.model.block_calls import BlockCache, Call
from theloom.model.forward import spans
from theloom.model.length_switches import length_switches, ways
from theloom.precision import torch_dtype

log = logging.getLogger(__name__)

# called with a batch's number, a hook point's name, the first position of a chunk, its values
# (window, position, …) on the device, to which nothing writes any more if that is a GPU, and which
# window of the batch is the first of theirs
SweepSink = Callable[[int, str, int, torch.Tensor, int], None]

# sees captured values, where a batch's memory is recorded
Captured = Callable[[torch.Tensor], None] | None

# around a batch: its number, its token ids, and what gives the tensors that were there before
Profile = Callable[
    [int, torch.Tensor, Callable[[], list[torch.Tensor]]], AbstractContextManager[Captured]
]


@dataclass
class Swept:
    """What a sweep took: seconds in all, those of them without weights to compute with, bytes read
    of the weights, tokens that went through, and blocks that they went through.
    """

    seconds: float = 0.0
    waited: float = 0.0
    bytes_read: int = 0
    tokens: int = 0
    blocks: int = 0


class LayerwiseRunner:
    """Runs all batches of a shard through a model of which one block is on the device.

    Units of work, in the order in which they end: for each of `stages` (the blocks with hook points
    that are requested; -1 before the first block, the number of blocks after the last), each batch.
    The windows of a batch go through a block in so many `groups`, one after the other, where memory
    has run out.
    """

    def __init__(
        self,
        shell: Shell,
        source: BlockSource,
        points: Sequence[HookPoint],
        chunk_size: int,
        store: str | None,
        groups: int = 1,
    ) -> None:
        self._shell, self._source, self._chunk_size, self._most_groups = (
            shell,
            source,
            chunk_size,
            groups,
        )
        self._dtype = None if store is None else torch_dtype(store)
        if any(p.value == LAST_STATE for p in points):
            _check_last_state(shell.architecture)
        self._points: dict[int, list[HookPoint]] = defaultdict(list)
        for point in points:
            self._points[point.block].append(point)
        self._over_keys = {p.name for p in points if p.over_keys}
        self.stages = sorted(self._points)
        self._last = min(self.stages[-1], len(shell.blocks) - 1)
        self._switches = length_switches(shell.model.config)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._sizes: list[int] = []
        self._pieces: list[int] = []  # the first of each batch

    def residuals(
        self,
        batches: Sequence[torch.Tensor],
        identity: str,
        chunk_sizes: Sequence[int] | None = None,
    ) -> ResidualSpec:
        """The residuals of a shard, chunk by chunk of each batch.

        Args:
            batches: Token ids (window, position) of each batch.
            identity: Whose the residuals are.
            chunk_sizes: Tokens of a chunk, for each batch; None: the runner's.

        Returns:
            Their shapes and their dtype; nothing is allocated.
        """
        hidden, sizes = (
            self._shell.architecture.hidden_size,
            chunk_sizes or [self._chunk_size] * len(batches),
        )
        shapes = tuple(
            (ids.shape[0], end - start, hidden)
            for ids, size in zip(batches, sizes, strict=True)
            for start, end in spans(ids.shape[1], size)
        )
        return ResidualSpec(shapes, self._shell.residual_dtype, identity)

    @torch.inference_mode()
    def sweep(
        self,
        batches: Sequence[torch.Tensor],
        residuals: ResidualStore,
        sink: SweepSink,
        *,
        chunk_sizes: Sequence[int] | None = None,
        done: int = 0,
        again: Collection[int] = (),
        unit_done: Callable[[int], None] = lambda batch: None,
        commit: Callable[[], None] = lambda: None,
        stop: Callable[[], str | None] = lambda: None,
        profile: Profile = lambda batch, ids, there: nullcontext(),
    ) -> Swept:
        """Run all batches through all blocks, up to the deepest hook point.

        Args:
            batches: Token ids (window, position) of each batch.
            residuals: Holds the residuals between blocks.
            sink: Takes the values of the hook points.
            chunk_sizes: Tokens of a chunk, for each batch; None: the runner's.
            done: Units that are stored already, which are not handed to `sink` again.
            again: Batches of the stage under way that are handed to it all the same, and not
                counted.
            unit_done: Called with the number of the batch when a unit ends.
            commit: Called before the residuals that a later job would continue from are made safe.
            stop: Says by what the job is requested to stop; None: it goes on.
            profile: Is open while a batch goes through a block; what it gives sees captured values.

        Returns:
            Seconds, bytes read, tokens and blocks of this sweep.

        Raises:
            StoppedError: `stop` named a request; what was done is committed.
        """
        self._sizes = list(chunk_sizes or [self._chunk_size] * len(batches))
        counts = [-(-ids.shape[1] // size) for ids, size in zip(batches, self._sizes, strict=True)]
        self._pieces = [0, *accumulate(counts)]
        started, waited, read = time.perf_counter(), self._source.waited, self._source.bytes_read
        units = _Units(self, self._shell.architecture, sink, len(batches), done, unit_done, again)
        first = residuals.take_up()
        if first > self._last + 1 or (first and done < self._units_through(first, len(batches))):
            first = 0  # a checkpoint ahead of the rows, or of another run's depth
        if first:
            log.info("resuming after block %d, whose residuals are on disk", first - 1)
        self._enter(batches, residuals, units, fresh=first == 0)
        progress = SweepProgress(first, self._last + 1, sum(positions_in(ids) for ids in batches))
        blocks = range(first, self._last + 1)
        for block in self._source.sweep(blocks):
            with closing(self._incoming(batches, residuals)) as units.incoming:
                for number, ids in enumerate(batches):
                    pieces = range(self._pieces[number], self._pieces[number + 1])
                    with profile(
                        number,
                        ids,
                        lambda: [residuals.read(p) for p in pieces],  # noqa: B023
                    ) as units.captured:
                        self._through_block(block, number, ids, residuals, units)
                    progress.update(block, number + 1, len(batches), positions_in(ids))
                    if requested := stop():
                        commit()
                        raise StoppedError(
                            f"stopped by {requested} in block {block} of {self._last + 1}; "
                            "run again to resume"
                        )
            residuals.block_done(block + 1, commit, last=block == self._last)
        if self.stages[-1] > self._last:
            self._after(batches, residuals, units)
        tokens = sum(positions_in(ids) for ids in batches)
        return Swept(
            time.perf_counter() - started,
            self._source.waited - waited,
            self._source.bytes_read - read,
            tokens,
            len(blocks),
        )

    def _units_through(self, blocks: int, batches: int) -> int:
        """The units that have ended when so many blocks are done."""
        return batches * sum(stage < blocks for stage in self.stages)

    def _enter(
        self,
        batches: Sequence[torch.Tensor],
        residuals: ResidualStore,
        units: "_Units",
        fresh: bool,
    ) -> None:
        """The residuals before the first block, if `fresh`; and how every block is called, for each
        shape.
        """
        with self._shell.embedded(self._source):
            for number, ids in enumerate(batches):
                for group in self._groups(ids):
                    for start, chunk, streamed in self._chunks(number, ids[group]):
                        key = self._key(ids, start, chunk, streamed)
                        if key not in self._calls:
                            calls = self._shell.record(chunk, start, streamed, ids.shape[1])
                            self._calls[key] = calls[: self._last + 1]
                if not fresh:
                    continue
                with units.unit(-1, number) as taps, _Outputs(residuals, len(ids)) as outputs:
                    for group in self._groups(ids):
                        units.group(group.start)
                        for start, chunk, streamed in self._chunks(number, ids[group]):
                            entering = _through(
                                taps,
                                chunk,
                                start,
                                self._shell.enter,
                                chunk,
                                start,
                                streamed,
                                ids.shape[1],
                            )
                            outputs.write(self._piece(number, start), entering)
        if fresh:
            residuals.entered()

    def _through_block(
        self, block: int, number: int, ids: torch.Tensor, residuals: ResidualStore, units: "_Units"
    ) -> None:
        module = self._shell.blocks[block]
        with units.unit(block, number) as taps, _Outputs(residuals, len(ids)) as outputs:
            for group in self._groups(ids):
                cache = None
                units.group(group.start)
                for start, chunk, streamed in self._chunks(number, ids[group]):
                    if streamed and cache is None:
                        cache = BlockCache(self._shell.model.config, block)
                    call = self._calls[self._key(ids, start, chunk, streamed)][block]
                    piece, residual = self._piece(number, start), next(units.incoming)
                    outputs.write(
                        piece, _through(taps, chunk, start, call.run, module, residual, cache)
                    )

    def _after(
        self, batches: Sequence[torch.Tensor], residuals: ResidualStore, units: "_Units"
    ) -> None:
        """The final norm."""
        norm = Anatomy.of(self._shell.architecture).final_norm
        assert norm is not None
        with (
            self._shell.embedded(self._source),
            closing(self._incoming(batches, residuals)) as incoming,
        ):
            for number, ids in enumerate(batches):
                with units.unit(self.stages[-1], number) as taps:
                    for group in self._groups(ids):
                        units.group(group.start)
                        for start, chunk, _ in self._chunks(number, ids[group]):
                            _through(taps, chunk, start, norm, next(incoming))

    def _incoming(
        self, batches: Sequence[torch.Tensor], residuals: ResidualStore
    ) -> Generator[torch.Tensor]:
        """The residuals of all batches on the device, in the order in which they go through."""
        return residuals.incoming(
            (self._piece(number, start), group)
            for number, ids in enumerate(batches)
            for group in self._groups(ids)
            for start, _, _ in self._chunks(number, ids)
        )

    def _key(
        self, ids: torch.Tensor, start: int, chunk: torch.Tensor, streamed: bool
    ) -> tuple[int, ...]:
        """What the arguments of a block depend on: a chunk's shape, what came before, and how the
        model computes documents of the batch's length.
        """
        return (*chunk.shape, start if streamed else -1, *ways(self._switches, ids.shape[1]))

    def _groups(self, ids: torch.Tensor) -> Iterator[slice]:
        """The windows of a batch that go through a block together."""
        size = max(1, -(-len(ids) // self._most_groups))
        for first in range(0, len(ids), size):
            yield slice(first, min(first + size, len(ids)))

    def _chunks(self, number: int, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, bool]]:
        """A batch as resident execution cuts it: whole if it fits a chunk, else in chunks."""
        size = self._sizes[number]
        for start, end in spans(ids.shape[1], size):
            yield start, ids[:, start:end], ids.shape[1] > size

    def _piece(self, number: int, start: int) -> int:
        """Of the residuals, that of a batch's chunk, which may begin one token early (`spans`)."""
        return self._pieces[number] + -(-start // self._sizes[number])

    def points(self, stage: int) -> list[HookPoint]:
        """The hook points of a stage.

        Args:
            stage: One of `stages`.

        Returns:
            In the order in which they were requested.
        """
        return self._points[stage]

    def to_rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A value as the hand-off takes it.

        Args:
            name: Of the hook point.
            value: As a tap reads it, with windows first.

        Returns:
            (window, position, …) in the dtype of the store.
        """
        return handoff.rows_of(value, self._dtype, name in self._over_keys)


def _check_last_state(architecture: Architecture) -> None:
    """Raise HookError if more than the final norm makes the model's last hidden state."""
    anatomy = Anatomy.of(architecture)
    if anatomy.end is not anatomy.final_norm:
        raise HookError(
            f"{LAST_STATE}: layer by layer it is read where the final norm gives it, which in "
            f"{type(architecture.model).__name__} is not so; take the last block's "
            "hook_resid_post, or set extraction.execution=resident"
        )


class _Outputs:
    """What a block gives for the pieces of a batch, on its way into the store: of several groups
    once all are there.
    """

    def __init__(self, residuals: ResidualStore, windows: int) -> None:
        self._residuals, self._windows = residuals, windows
        self._kept: dict[int, list[torch.Tensor]] = defaultdict(list)

    def __enter__(self) -> "_Outputs":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for piece, values in sorted(self._kept.items()):
                self._residuals.write(piece, torch.cat(values))

    def write(self, piece: int, values: torch.Tensor) -> None:
        """The windows of one group."""
        if len(values) == self._windows:
            self._residuals.write(piece, values)
        else:
            self._kept[piece].append(values.cpu())


class _Units:
    """Opens the taps of a unit of work, where it is one that is not done yet, and counts it when it
    ends.
    """

    def __init__(
        self,
        runner: LayerwiseRunner,
        architecture: Architecture,
        sink: SweepSink,
        batches: int,
        done: int,
        unit_done: Callable[[int], None],
        again: Collection[int] = (),
    ) -> None:
        self._runner, self._architecture, self._sink, self._batches = (
            runner,
            architecture,
            sink,
            batches,
        )
        self._done, self._unit_done, self._again = done, unit_done, again
        self.captured: Captured = None
        self.incoming: Iterator[torch.Tensor] = iter(())
        self._first = 0
        self._position: dict[str, int] = defaultdict(int)

    def group(self, first: int) -> None:
        """The windows from this one on come next."""
        self._first = first
        self._position.clear()

    @contextmanager
    def unit(self, stage: int, batch: int) -> Iterator[Taps | None]:
        """The taps of a stage for a batch, None where nothing is to be read."""
        stages = self._runner.stages
        first = stages.index(stage) * self._batches if stage in stages else None
        done = first is not None and first + batch < self._done
        under_way = first == self._done // self._batches * self._batches
        if first is None or (done and not (under_way and batch in self._again)):
            yield None
            return

        def hand_over(name: str, value: torch.Tensor) -> None:
            rows = self._runner.to_rows(name, value)
            if self.captured is not None:
                self.captured(rows)
            self._sink(batch, name, self._position[name], rows, self._first)
            self._position[name] += rows.shape[1]

        with Taps(self._architecture, self._runner.points(stage), hand_over) as taps:
            yield taps
        if not done:
            self._unit_done(batch)


def _through(
    taps: Taps | None, chunk: torch.Tensor, seen: int, part: Callable[..., torch.Tensor], *args: Any
) -> torch.Tensor:
    """A part of the model with what it is given, read by taps where there are any."""
    if taps is None:
        return part(*args)
    return taps.through(lambda: part(*args), (chunk.shape[0], chunk.shape[1]), seen)
