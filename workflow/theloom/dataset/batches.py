"""Batches of rows for training: read in blocks, mixed in a buffer, split among processes.

Single rows at random cost a seek each; whole blocks are read ten times as fast. So a shuffled pass
takes blocks of consecutive rows in random order, fills a buffer with them, and takes its rows out
in random order. How well that mixes: two rows of a batch are of the same block with a probability
of (block_rows - 1) / (buffer_rows - 1), by default 0.8%; in a shuffle of all rows it would be
block_rows / rows. A larger buffer, or smaller blocks, mix better.

Rows that are not stored come in the order in which they are computed: `MixingBuffer` takes each
batch at random from as many rows as it holds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

Batch = torch.Tensor | dict[str, torch.Tensor]

BLOCK_ROWS = 128
BUFFER_ROWS = 1 << 14


class RowSource(Protocol):
    """What batches are read from: a dataset, or several of the same tokens."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def rows_of(self, name: str) -> Any:
        """The rows of one column, as `theloom.dataset.rows.Rows` reads them."""
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
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self.world_size = world_size or (torch.distributed.get_world_size() if distributed else 1)

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
        out = np.empty((len(rows), *source.shape[1:]), source.stored)
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
            source.read_into(out[begin:end], int(rows[begin]))
        return out

    def _tensor(self, number: int, values: np.ndarray) -> torch.Tensor:
        source = self._rows[number]
        return source.tensor(values) if hasattr(source, "tensor") else torch.from_numpy(values)


class MixingBuffer:
    """Rows that wait, of which a batch is taken at random; those that come next fill the gaps.

    A row waits for as many batches as the buffer holds of them, on average. So rows that came next
    to each other go to different batches.

    Args:
        rows: that it holds.
        random: of the order.

    Examples:
        >>> buffer = MixingBuffer(4, np.random.default_rng(0))
        >>> buffer.add({"row": torch.arange(6)})  # it takes what there is room for
        4
        >>> sorted(buffer.take(4)["row"].tolist()), len(buffer)
        ([0, 1, 2, 3], 0)
    """

    def __init__(self, rows: int, random: np.random.Generator) -> None:
        self.rows, self._random = rows, random
        self._held: dict[str, torch.Tensor] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether there is no room for another row."""
        return self._count == self.rows

    def add(self, columns: Mapping[str, torch.Tensor]) -> int:
        """Take rows, the first ones, as far as there is room.

        Args:
            columns: by name, (rows, …) each; the same names every time.

        Returns:
            How many were taken.
        """
        if not self._held:
            self._held = {
                name: torch.empty((self.rows, *values.shape[1:]), dtype=values.dtype)
                for name, values in columns.items()
            }
        taken = min(self.rows - self._count, len(next(iter(columns.values()))))
        for name, held in self._held.items():
            held[self._count : self._count + taken] = columns[name][:taken]
        self._count += taken
        return taken

    def take(self, count: int) -> dict[str, torch.Tensor]:
        """Take rows out, at random.

        Args:
            count: how many, at most as many as there are.

        Returns:
            Columns by name, (count, …) each.
        """
        chosen = self._random.choice(self._count, count, replace=False)
        left = self._count - count
        taken = {name: held[torch.from_numpy(chosen)] for name, held in self._held.items()}
        gaps = torch.from_numpy(chosen[chosen < left])
        behind = torch.from_numpy(np.setdiff1d(np.arange(left, self._count), chosen))
        for held in self._held.values():
            held[gaps] = held[behind]
        self._count = left
        return taken


def mixed(
    blocks: Iterable[Mapping[str, torch.Tensor]],
    batch_size: int,
    buffer_rows: int,
    random: np.random.Generator,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of rows that come in blocks of any size, through a buffer; every row once.

    Args:
        blocks: columns by name, (rows, …) each.
        batch_size: rows of a batch; the last one may have fewer.
        buffer_rows: rows that are mixed; at least `batch_size` of them. 0: they stay in order.
        random: of the order.

    Yields:
        Columns by name, (batch_size, …) each.

    Examples:
        >>> blocks = [{"row": torch.arange(5)}, {"row": torch.arange(5, 8)}]
        >>> [b["row"].tolist() for b in mixed(blocks, 3, 0, np.random.default_rng())]
        [[0, 1, 2], [3, 4, 5], [6, 7]]
    """
    if not buffer_rows:
        yield from _in_order(blocks, batch_size)
        return
    buffer = MixingBuffer(max(buffer_rows, batch_size), random)
    for block in blocks:
        rows, begin = len(next(iter(block.values()))), 0
        while begin < rows:
            begin += buffer.add({name: values[begin:] for name, values in block.items()})
            if buffer.full:
                yield buffer.take(batch_size)
    while len(buffer):
        yield buffer.take(min(batch_size, len(buffer)))


def _in_order(
    blocks: Iterable[Mapping[str, torch.Tensor]], batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    waiting: dict[str, list[torch.Tensor]] = {}
    count = 0
    for block in blocks:
        rows, begin = len(next(iter(block.values()))), 0
        while begin < rows:
            end = min(rows, begin + batch_size - count)
            for name, values in block.items():
                waiting.setdefault(name, []).append(values[begin:end])
            count, begin = count + end - begin, end
            if count == batch_size:
                yield {name: torch.cat(parts) for name, parts in waiting.items()}
                waiting, count = {}, 0
    if count:
        yield {name: torch.cat(parts) for name, parts in waiting.items()}
