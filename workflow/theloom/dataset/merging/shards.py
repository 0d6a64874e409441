"""The shards of a merge: each is checked, alone and against those before; of each is kept where its
rows lie, and of all of them their tables, statistics and metrics.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from theloom.dataset import parts
from theloom.dataset.attributes import Attributes
from theloom.dataset.merging.joined import JoinedTables
from theloom.dataset.parts import TOKENS, Part
from theloom.dataset.tables import Tables, read_columns, read_metrics, read_row_tokens, read_tables
from theloom.errors import StoreError
from theloom.store import checksums, file_format, index, token_texts
from theloom.store.statistics import Statistics, empty_statistics, read_statistics
from theloom.store.tables import columns
from theloom.store.tables.columns import Column

# what each job had room for: the merged file has a number for each shard
PLAN = ("batch_tokens", "chunk_size")

# attributes of a shard, not of the run
OWN = ("kind", "shard", "first_row", "shard_fingerprint", "rows", "tokens", *PLAN)

# metrics of which the merged file has the maximum, not the sum
_LARGEST = ("peak_memory", "predicted_memory", "oom_level")


@dataclass(frozen=True)
class ReadShard:
    """One checked shard with all but its rows."""

    part: Part
    attributes: Attributes
    shapes: dict[str, tuple[int, ...]]
    statistics: list[Statistics]
    metrics: dict[str, float]
    tables: Tables
    columns: dict[str, Column]
    row_tokens: np.ndarray | None

    @property
    def more_tables(self) -> list[str]:
        """Names of the token tables beside those that every file has."""
        return [name for name in self.part.offsets if name not in self.shapes]


@dataclass(frozen=True)
class Shard:
    """What is kept of each shard: where its rows lie, and what identifies it."""

    part: Part
    fingerprint: str
    plan: dict[str, int]  # by names of `PLAN`


class Whole:
    """What the merged file has of all shards, which are added one after the other: of each its rows
    stay where they are, and its tables go to `joined`.

    Args:
        first: the first shard.
        folder: of temporary files.

    Attributes:
        attributes: of the first shard.
        shapes: of its hook points and tables.
        more_tables: names of the token tables beside those that every file has.
        packed: whether rows are compressed.
        rows: how many there are.
        shards: in their order.
        joined: the tables of documents and windows.
        statistics: of each hook point.
        metrics: sums, or maxima, of those of the jobs.
    """

    def __init__(self, first: ReadShard, folder: Path) -> None:
        self.attributes, self.shapes = first.attributes, first.shapes
        self.more_tables, self._schema = first.more_tables, columns.schema(first.columns)
        self.packed = first.attributes.get("compression") == "zstd"
        self._first, self.rows, self.shards = first.part.path.name, 0, list[Shard]()
        self.joined = JoinedTables(folder)
        self.statistics = [
            empty_statistics(h, w) for h, w in zip(self.hooks, self.widths, strict=True)
        ]
        self.metrics: dict[str, float] = {}

    @property
    def hooks(self) -> list[str]:
        """Names of the hook points."""
        return json.loads(self.attributes["hooks"])

    @property
    def widths(self) -> list[int]:
        """Elements of a row, by hook point."""
        return [math.prod(self.shapes[file_format.hook_path(h)][1:]) for h in self.hooks]

    def add(self, read: ReadShard) -> None:
        """Check that the next shard is of this run and schema, without a gap, and take it.

        Args:
            read: the shard.

        Raises:
            StoreError: it is not.
        """
        self._check(read)
        part, tokens = read.part, read.part.count(TOKENS[0])
        plan = {name: read.attributes.by_shard(name)[0] for name in PLAN}
        self.shards.append(Shard(part, str(read.attributes["shard_fingerprint"]), plan))
        self.rows += part.rows
        self.joined.add(read.tables, read.columns, read.row_tokens, tokens)
        for mine, others in zip(self.statistics, read.statistics, strict=True):
            mine.join(others)
        for name, value in read.metrics.items():
            known = self.metrics.setdefault(name, 0)
            self.metrics[name] = max(known, value) if name in _LARGEST else known + value

    def _check(self, shard: ReadShard) -> None:
        path = shard.part.path
        for name in ("run_fingerprint", "hooks", "precision", "compression"):
            if shard.attributes.get(name) != self.attributes.get(name):
                raise StoreError(
                    f"{path}: its {name} is not that of {self._first}: the shards are of "
                    "different runs; delete the shards and run again"
                )
        if shard.more_tables != self.more_tables:
            raise StoreError(
                f"{path}: its tables of tokens are not those of {self._first}: the shards "
                "are of different versions; delete the shards and run again"
            )
        if columns.schema(shard.columns) != self._schema:
            raise StoreError(
                f"{path}: its columns are not those of {self._first}: the shards are of "
                "different runs; delete the shards and run again"
            )
        for name, shape in shard.shapes.items():
            if shape[1:] != self.shapes[name][1:]:
                raise StoreError(
                    f"{path}: its rows of {name} have the shape {shape[1:]}, "
                    f"not {self.shapes[name][1:]}"
                )
        if shard.attributes["first_row"] != self.rows:
            raise StoreError(
                f"{path}: begins at row {shard.attributes['first_row']}, expected {self.rows}"
            )

    def count(self, name: str) -> int:
        """The entries of a dataset over all shards.

        Args:
            name: of the dataset.

        Returns:
            Tokens for a table of tokens, else rows.
        """
        return sum(s.part.count(name) for s in self.shards)


def read_shard(path: Path, number: int, texts: dict[int, str]) -> ReadShard:
    """Read a shard, and check that it is finished and undamaged, rows aside.

    Args:
        path: of the shard.
        number: of the shard, from 0.
        texts: takes its texts of tokens.

    Returns:
        All of the shard but its rows.

    Raises:
        StoreError: it is not; or it is another shard.
    """
    with file_format.reading(path) as file:
        listed = index.of(file, path)
        attributes, read = Attributes(path, listed.attributes), partial(listed.array, file.fd)
        file_format.check_format(path, "activations", attributes)
        if attributes.get("kind") != "shard" or attributes["shard"] != number:
            raise StoreError(f"{path}: is not shard {number} of a run; remove it and run again")
        part = parts.own(file.fd, listed)
        if broken := checksums.changed_parts(file.fd, listed, *checksums.ALL):
            raise StoreError(
                f"{path}: {', '.join(broken)} were changed after it was written; "
                "remove it and run again"
            )
        if f"{token_texts.GROUP}/id" in listed.datasets:
            texts |= token_texts.read(read, texts)
        hooks = attributes.parsed("hooks", list)
        shapes = {name: listed.datasets[name].shape for name in parts.names_of(attributes)}
        tables = read_tables(read, part.count(TOKENS[0]), len(hooks))
        described = attributes.parsed("columns", list) if "columns" in attributes else []
        widths = [math.prod(shapes[file_format.hook_path(hook)][1:]) for hook in hooks]
        return ReadShard(
            part,
            attributes,
            shapes,
            read_statistics(read, hooks, widths),
            read_metrics(read),
            tables,
            read_columns(read, listed, described, len(tables.document_id)),
            read_row_tokens(read, partial(listed.pieces, file.fd), attributes),
        )
