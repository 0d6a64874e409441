"""Batches of rows for training: read in blocks, mixed in a buffer, split among processes.

Single rows at random cost a seek each; whole blocks are read ten times as fast. So a shuffled pass
takes blocks of consecutive rows in random order, fills a buffer with them, and takes its rows out
in random order. How well that mixes: two rows of a batch are of the same block with a probability
of (block_rows - 1) / (buffer_rows - 1), by default 0.8%; in a shuffle of all rows it would be
block_rows / rows. A larger buffer, or smaller blocks, mix better.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from theloom.devices import pinned
from theloom.precision import torch_dtype

Batch = torch.Tensor | dict[str, torch.Tensor]

BLOCK_ROWS = 128
BUFFER_ROWS = 1 << 14

_OF_RUN = ("model_source", "corpus", "run_fingerprint")  # attributes that tell where rows are from


def process(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Tell which of how many processes this one is.

    Args:
        rank: its number; None: that of torch.distributed, else 0.
        world_size: how many there are; None: as many as torch.distributed has, else 1.

    Returns:
        Both.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    return rank, world_size or (torch.distributed.get_world_size() if distributed else 1)


def passes(epochs: int | None) -> Iterable[int]:
    """Count passes over rows.

    Args:
        epochs: how many; None: without end.

    Returns:
        Their numbers, from 0.
    """
    return itertools.count() if epochs is None else range(epochs)


class RowSource(Protocol):
    """What batches are read from: a dataset, or several of the same tokens."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def rows_of(self, name: str) -> Any:
        """The rows of one column, as `theloom.dataset.rows.Rows` reads them.

        Args:
            name: a hook point, or a column such as `input_ids`.

        Returns:
            What is indexed by rows, and gives tensors.
        """
        ...


class RowBatches(IterableDataset[Batch]):
    """Batches of one pass over a dataset's rows; `set_epoch` gives the next pass another order.

    DataLoader workers, and the processes of torch.distributed, share the rows in blocks: each row
    is read by one of them. Give DataLoader batch_size=None, since the batches are made here.

    Args:
        activations: the dataset.
        hooks: a hook point (then batches are tensors) or several (then dicts by name); also
            `input_ids`, `document`, `position` and `row`.
        batch_size: rows of a batch.
        shuffle: mix the rows.
        seed: of the order.
        drop_last: give every process the same number of batches, all of `batch_size` rows; up to
            two blocks of rows for each process are left out.
        block_rows: consecutive rows that are read together.
        buffer_rows: rows that are mixed in memory.
        rank: of this process; by default that of torch.distributed.
        world_size: number of processes; by default that of torch.distributed.

    Raises:
        HookError: the dataset has no such hook point.
        ValueError: a size is less than 1.
    """

    def __init__(
        self,
        activations: RowSource,
        hooks: str | Sequence[str],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        block_rows: int = BLOCK_ROWS,
        buffer_rows: int = BUFFER_ROWS,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if min(batch_size, block_rows, buffer_rows) < 1:
            raise ValueError(
                f"batch_size {batch_size}, block_rows {block_rows}, buffer_rows {buffer_rows}: "
                "at least 1"
            )
        self.names = [hooks] if isinstance(hooks, str) else list(hooks)
        self.single = isinstance(hooks, str)
        self.batch_size, self.shuffle, self.seed, self.drop_last = (
            batch_size,
            shuffle,
            seed,
            drop_last,
        )
        self.block_rows, self.buffer_rows = (
            block_rows,
            max(batch_size, buffer_rows // batch_size * batch_size),
        )
        self.epoch = 0
        self._activations = activations
        # looked up here, so that an unknown name is an error at once
        self._rows = [activations.rows_of(name) for name in self.names]
        self.rank, self.world_size = process(rank, world_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the order of the next pass.

        Args:
            epoch: number of the pass. Call this before each, in the process that makes the
                iterator of the DataLoader.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this process, when one worker reads them all."""
        return self._batches(self._blocks(self.rank, self.world_size), self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        reader, readers = (
            self.rank * workers + (worker.id if worker else 0),
            self.world_size * workers,
        )
        blocks = self._blocks(reader, readers)
        left = self._batches(blocks, readers)
        random = np.random.default_rng([self.seed, self.epoch, reader])
        for rows in self._buffers(blocks):
            order = random.permutation(len(rows)) if self.shuffle else None
            buffered = [self._read(n, rows) for n in range(len(self._rows))]
            for start in range(0, len(rows), self.batch_size):
                if not left:
                    return
                left -= 1
                part = slice(start, start + self.batch_size)
                columns = [
                    b[part].copy() if order is None else b.take(order[part], axis=0)
                    for b in buffered
                ]
                tensors = [self._tensor(n, values) for n, values in enumerate(columns)]
                yield tensors[0] if self.single else dict(zip(self.names, tensors, strict=True))

    def _blocks(self, reader: int, readers: int) -> np.ndarray:
        """The first rows of the blocks of a reader, in its order."""
        starts = np.arange(0, len(self._activations), self.block_rows)
        if self.shuffle:
            starts = np.random.default_rng([self.seed, self.epoch]).permutation(starts)
        return starts[reader::readers]

    def _batches(self, blocks: np.ndarray, readers: int) -> int:
        total = len(self._activations)
        if self.drop_last:
            # as many as the reader with the fewest rows has: it may lack a block, and have the last
            # one, which may be short
            count = -(-total // self.block_rows)
            short = count * self.block_rows - total
            return max(0, count // readers * self.block_rows - short) // self.batch_size
        return -(-int(np.minimum(self.block_rows, total - blocks).sum()) // self.batch_size)

    def _buffers(self, blocks: np.ndarray) -> Iterator[np.ndarray]:
        """The row numbers of one buffer after the other."""
        total = len(self._activations)
        step = -(-self.buffer_rows // self.block_rows)
        kept = np.zeros(0, np.int64)
        for start in range(0, len(blocks), step):
            rows = (blocks[start : start + step, None] + np.arange(self.block_rows)).reshape(-1)
            kept = np.concatenate([kept, rows[rows < total]])
            while len(kept) >= self.buffer_rows:
                yield kept[: self.buffer_rows]
                kept = kept[self.buffer_rows :]
        if len(kept):
            yield kept

    def _read(self, number: int, rows: np.ndarray) -> np.ndarray:
        """The rows of one buffer; consecutive ones are copied together."""
        source = self._rows[number]
        if getattr(source, "is_remote", False):  # all of them are requested together
            return source.numpy(rows)
        out = np.empty((len(rows), *source.shape[1:]), source.stored)
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
            source.read_into(out[begin:end], int(rows[begin]))
        return out

    def _tensor(self, number: int, values: np.ndarray) -> torch.Tensor:
        source = self._rows[number]
        return source.tensor(values) if hasattr(source, "tensor") else torch.from_numpy(values)


class BatchIterator(Iterator[Batch]):
    """Batches of one pass after the other, as trainers of sparse autoencoders take them.

    SAELens' trainers take any iterator as their data provider, and never expect its end, so give
    them `epochs=None`. dictionary_learning's `trainSAE` takes it as its buffer, and saves `config`
    next to what it trains.

    Args:
        rows: the batches of a pass; the order of each pass is another.
        epochs: passes; None: without end.
        dtype: of hook points, `fp32`, `fp16` or `bf16`; None: as stored, FP32 where `scale` is set.
        device: of the batches; None: the CPU.
        scale: a factor for hook points, such as `acts.scale(hook, "dictionary_learning")`.
        config: what a trainer saves about the rows.

    Raises:
        ValueError: `epochs` is less than 1, or there is no such dtype.
    """

    def __init__(
        self,
        rows: RowBatches,
        *,
        epochs: int | None = 1,
        dtype: str | None = None,
        device: "torch.device | str | None" = None,
        scale: float | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs {epochs}: at least 1, or None for no end")
        if dtype is None and scale is not None:
            dtype = "fp32"
        if dtype not in (None, "fp32", "fp16", "bf16"):
            raise ValueError(f"dtype {dtype!r}: give fp32, fp16 or bf16")
        self.config = {**(config or {}), "device": str(device or "cpu")}
        self._rows, self._epochs, self._scale = rows, epochs, scale
        self._dtype = None if dtype is None else torch_dtype(dtype)
        self._device = torch.device(device or "cpu")
        self._batches = self._passes()

    def __next__(self) -> Batch:
        return next(self._batches)

    def _passes(self) -> Iterator[Batch]:
        first = self._rows.epoch
        for epoch in passes(self._epochs):
            self._rows.set_epoch(first + epoch)
            number = 0
            for batch in self._rows:
                number += 1
                if isinstance(batch, dict):
                    yield {name: self._ready(values) for name, values in batch.items()}
                else:
                    yield self._ready(batch)
            if not number:  # a pass without a batch would be repeated for ever
                return

    def _ready(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cpu":
            there = pinned.pinned_copy(values, self._device)
            values = there.to(self._device, non_blocking=True)
        if not values.is_floating_point():
            return values
        if self._scale is not None:
            values = values.float() * self._scale
        return values if self._dtype is None else values.to(self._dtype)


def trainer_config(
    hook: str, width: Sequence[int], batch_size: int, attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """What dictionary_learning saves of its buffer, and where the rows come from.

    Args:
        hook: the hook point.
        width: shape of a row.
        batch_size: rows of a batch.
        attributes: of the dataset.

    Returns:
        By the names that dictionary_learning has for them.

    Examples:
        >>> config = trainer_config("blocks.1.hook_resid_post", (32,), 64, {"context_length": 128})
        >>> config["d_submodule"], config["io"], config["ctx_len"], config["out_batch_size"]
        (32, 'out', 128, 64)
    """
    return {
        "d_submodule": int(np.prod(width)),
        "io": "in" if hook.endswith("_pre") else "out",
        "ctx_len": int(attributes.get("context_length", 0)),
        "out_batch_size": batch_size,
        "hook_name": hook,
        **{name: str(attributes[name]) for name in _OF_RUN if name in attributes},
    }
