"""Merging shards to one dataset: `activations.h5` refers to them (virtual) or is a copy (physical).

Either way every shard must first be there, finished, of this run and of the same schema, since HDF5
reads a missing source as NaN. The merged file gets its final name when all of it is on disk. A
job that is killed leaves a `.partial`, which the next one writes from the start: the shards still
hold everything.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from theloom.dataset import parts
from theloom.dataset.attributes import Attributes
from theloom.dataset.parts import TOKENS, Part, Source
from theloom.dataset.rows import Maps, Rows
from theloom.dataset.tables import Tables, read_columns, read_metrics, read_row_tokens, read_tables
from theloom.errors import StoreError
from theloom.precision import SCALED
from theloom.store import checksums, compression, file_format, index, token_texts
from theloom.store.encoding import scaled
from theloom.store.file_format import METRICS
from theloom.store.hdf5 import byte_source, element_types
from theloom.store.hdf5.output import written
from theloom.store.lock import WriterLock
from theloom.store.statistics import (
    Statistics,
    create_statistics,
    empty_statistics,
    read_statistics,
    statistics_columns,
)
from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column

log = logging.getLogger(__name__)

# what each job had room for: the merged file has a number for each shard
_PLAN = ("batch_tokens", "chunk_size")

# attributes of a shard, not of the run
_OWN = ("kind", "shard", "first_row", "shard_fingerprint", "rows", "tokens", *_PLAN)

# metrics of which the merged file has the maximum, not the sum
_LARGEST = ("peak_memory", "predicted_memory", "oom_level")


@dataclass(frozen=True)
class _Shard:
    """One checked shard: its rows, its attributes, and the shapes and the statistics of its hook
    points.
    """

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


def merge_shards(shards: Sequence[Path], mode: str, output: Path) -> None:
    """Write `activations.h5` from the shards of a run: the stage merge_shards.

    Args:
        shards: the shards' files, in their order.
        mode: `virtual` or `physical`.
        output: the merged file.

    Raises:
        StoreError: a shard is missing, damaged, unfinished or of another run, or another job writes
            the output.
        MemoryPlanError: the disk is full.
    """
    lock = WriterLock(output)
    lock.take()
    unfinished = output.with_name(output.name + ".partial")
    try:
        texts: dict[int, str] = {}
        checked = [_checked(path, number, texts) for number, path in enumerate(shards)]
        _check_together(checked)
        _write(checked, texts, mode, unfinished, output.parent)
        checksums.write_checksums(unfinished, *checksums.ALL)
        file_format.sync(unfinished)
        unfinished.replace(output)
        file_format.sync(output.parent)
    except (OSError, RuntimeError) as error:  # h5py raises either when a file cannot be closed
        if not file_format.is_full(error):
            raise
        unfinished.unlink(missing_ok=True)
        raise file_format.no_room_error(
            output.parent, "the merged file", _bytes_of(checked, mode)
        ) from None
    finally:
        lock.release()
    rows, hooks = sum(s.part.rows for s in checked), len(checked[0].statistics)
    log.info("%d rows of %d hook points from %d shards (%s)", rows, hooks, len(shards), mode)


def _write(
    shards: Sequence[_Shard], texts: Mapping[int, str], mode: str, target: Path, folder: Path
) -> None:
    first, rows = shards[0], sum(s.part.rows for s in shards)
    names = list(first.shapes)
    packed = first.attributes.get("compression") == "zstd"
    with written(target) as file:
        attributes = {k: v for k, v in first.attributes.items() if k not in _OWN}
        plans = {name: [s.attributes.by_shard(name)[0] for s in shards] for name in _PLAN}
        plans["shard_rows"] = [s.part.rows for s in shards]
        sizes = {"rows": rows}
        if first.row_tokens is not None:
            plans["shard_tokens"] = [s.part.count(TOKENS[0]) for s in shards]
            sizes["tokens"] = sum(plans["shard_tokens"])
        file_format.set_attributes(file, attributes | plans | sizes | {"kind": mode})
        _write_tables(file, shards)
        token_texts.write(file, texts)
        file[checksums.CHECKSUMS] = np.zeros(len(checksums.ALL), "<u8")
        precision = str(first.attributes["precision"])
        types = {name: _type(name, precision) for name in names}
        copied = {name: parts.row_type(name).itemsize for name in first.more_tables}
        for name in copied:
            kind = h5py.h5t.py_create(parts.row_type(name))
            file_format.create_contiguous(file, name, (_count(shards, name),), kind)
        if mode == "virtual":
            for name in names:
                _refer(file, name, shards, folder, types[name])
            parts.write_sources(file, [_source(s, folder) for s in shards], names)
        for name in names if mode == "physical" else ():
            shape = (_count(shards, name), *first.shapes[name][1:])
            if packed and name not in TOKENS and not parts.is_scale(name):
                compression.create_packed(file, name, shape, types[name])
                _pack(file[name], name, shards, precision, file.check)
                continue
            file_format.create_contiguous(file, name, shape, types[name])
            copied[name] = types[name].get_size() * int(np.prod(shape[1:]))
        if precision in SCALED:
            for hook in _hooks(shards):
                scaled.describe(file[file_format.hook_path(hook)], precision)
        offsets = {name: file_format.byte_offset(file[name]) for name in copied}
        index.write_index(file)
    _copy(target, offsets, copied, shards)


def _type(name: str, precision: str) -> h5py.h5t.TypeID:
    """The HDF5 type of a dataset of tokens, rows or scales."""
    if name in TOKENS:
        return h5py.h5t.STD_I32LE
    return element_types.hdf5_type("fp32" if parts.is_scale(name) else precision)


def _checked(path: Path, number: int, texts: dict[int, str]) -> _Shard:
    """Check that a shard is finished and undamaged, rows aside; its texts of tokens go to `texts`.
    Raises StoreError.
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
        return _Shard(
            part,
            attributes,
            shapes,
            read_statistics(read, hooks, widths),
            read_metrics(read),
            tables,
            read_columns(read, listed, described, len(tables.document_id)),
            read_row_tokens(read, attributes),
        )


def _check_together(shards: Sequence[_Shard]) -> None:
    """Check that shards are of one run and one schema, without a gap. Raises StoreError."""
    row, first = 0, shards[0]
    for shard in shards:
        path = shard.part.path
        for name in ("run_fingerprint", "hooks", "precision", "compression"):
            if shard.attributes.get(name) != first.attributes.get(name):
                raise StoreError(
                    f"{path}: its {name} is not that of {first.part.path.name}: the shards are of "
                    "different runs; delete the shards and run again"
                )
        if shard.more_tables != first.more_tables:
            raise StoreError(
                f"{path}: its tables of tokens are not those of {first.part.path.name}: the shards "
                "are of different versions; delete the shards and run again"
            )
        if columns.schema(shard.columns) != columns.schema(first.columns):
            raise StoreError(
                f"{path}: its columns are not those of {first.part.path.name}: the shards are of "
                "different runs; delete the shards and run again"
            )
        for name, shape in shard.shapes.items():
            if shape[1:] != first.shapes[name][1:]:
                raise StoreError(
                    f"{path}: its rows of {name} have the shape {shape[1:]}, "
                    f"not {first.shapes[name][1:]}"
                )
        if shard.attributes["first_row"] != row:
            raise StoreError(
                f"{path}: begins at row {shard.attributes['first_row']}, expected {row}"
            )
        row += shard.part.rows


def _write_tables(file: h5py.File, shards: Sequence[_Shard]) -> None:
    """Write documents, windows, statistics and metrics of all shards: they are small, so copied
    even in virtual mode. Offsets become tokens of the merged dataset.
    """
    first_tokens = np.cumsum([0, *(s.part.count(TOKENS[0]) for s in shards)])
    tables = [s.tables for s in shards]
    for name, column in (
        ("documents/offset", "document_offset"),
        ("windows/offset", "window_offset"),
    ):
        pairs = zip(tables, first_tokens, strict=False)
        joined = [getattr(t, column)[:-1] + token for t, token in pairs]
        file[name] = np.concatenate([*joined, first_tokens[-1:]])
    rows = [
        shard.row_tokens + token
        for shard, token in zip(shards, first_tokens, strict=False)
        if shard.row_tokens is not None
    ]
    if rows:
        file[token_tables.ROW_TOKEN] = np.concatenate(rows)
    file["documents/id"] = np.concatenate([t.document_id for t in tables])
    columns.write(file, columns.join([s.columns for s in shards]))
    file["windows/document"] = np.concatenate([t.window_document for t in tables])
    file["windows/hash"] = np.concatenate([t.window_hash for t in tables])
    shapes = shards[0].shapes
    widths = [int(np.prod(shapes[file_format.hook_path(h)][1:])) for h in _hooks(shards)]
    create_statistics(file, widths)
    total = [
        empty_statistics(hook, width) for hook, width in zip(_hooks(shards), widths, strict=True)
    ]
    for shard in shards:
        for mine, others in zip(total, shard.statistics, strict=True):
            mine.join(others)
    for name, values in statistics_columns(total).items():
        file[name][:] = values
    joint = {n: (max if n in _LARGEST else sum)(s.metrics[n] for s in shards) for n in METRICS}
    file["metrics"] = np.array(list(joint.values()), "<f8")


def _hooks(shards: Sequence[_Shard]) -> list[str]:
    return json.loads(shards[0].attributes["hooks"])


def _refer(
    file: h5py.File, name: str, shards: Sequence[_Shard], folder: Path, type_id: h5py.h5t.TypeID
) -> None:
    """Create a virtual dataset over those of the shards, by paths relative to the merged file."""
    width = shards[0].shapes[name][1:]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    if type_id.get_class() == h5py.h5t.FLOAT:  # what HDF5 reads of a shard that is not there
        properties.set_fill_value(np.array(np.nan, "f4"))
    whole = h5py.h5s.create_simple((_count(shards, name), *width))
    row = 0
    for shard in shards:
        rows = shard.part.count(name)
        if not rows:
            continue
        whole.select_hyperslab((row, *(0 for _ in width)), (rows, *width))
        source = h5py.h5s.create_simple((rows, *width))
        properties.set_virtual(
            whole, _relative(shard.part.path, folder).encode(), name.encode(), source
        )
        row += rows
    whole.select_all()
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    h5py.h5d.create(file.id, name.encode(), type_id, whole, dcpl=properties, lcpl=links)


def _count(shards: Sequence[_Shard], name: str) -> int:
    """The entries of a dataset over all shards."""
    return sum(s.part.count(name) for s in shards)


def _source(shard: _Shard, folder: Path) -> Source:
    fingerprint = str(shard.attributes["shard_fingerprint"])
    return Source(shard.part, _relative(shard.part.path, folder), fingerprint)


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.absolute(), folder.absolute())


def _pack(
    dataset: h5py.Dataset,
    name: str,
    shards: Sequence[_Shard],
    precision: str,
    check: Callable[[], None],
) -> None:
    """Unpack the rows of all shards and pack them again: the new chunks begin elsewhere."""
    rows = Rows(
        [s.part for s in shards],
        Maps(),
        name,
        dataset.shape[1:],
        element_types.bits_dtype(precision),
    )
    compression.write(dataset, lambda start, stop: rows.numpy(slice(start, stop)), check)


def _copy(
    target: Path, offsets: dict[str, int], row_bytes: dict[str, int], shards: Sequence[_Shard]
) -> None:
    """Copy the bytes of every contiguous dataset from the shards, without decoding them."""
    out = os.open(target, os.O_RDWR)
    try:
        at, sizes = dict(offsets), {n: _count(shards, n) * row_bytes[n] for n in offsets}
        os.posix_fallocate(out, 0, max([1, *(p + sizes[n] for n, p in offsets.items())]))
        for shard in shards:
            with shard.part.file.open() as source:
                fd = byte_source.descriptor(source)
                for name in offsets:
                    size = shard.part.count(name) * row_bytes[name]
                    _copy_range(fd, shard.part.offsets[name], out, at[name], size)
                    at[name] += size
        os.fsync(out)
    finally:
        os.close(out)


def _copy_range(source: int, start: int, out: int, offset: int, size: int) -> None:
    os.lseek(out, offset, os.SEEK_SET)
    while size:
        sent = os.sendfile(out, source, start, min(size, 1 << 30))
        if not sent:
            raise StoreError(
                f"a shard ended {size} bytes early while it was copied; check the file system"
            )
        start, size = start + sent, size - sent


def _bytes_of(shards: Sequence[_Shard], mode: str) -> int:
    """About how many bytes the merged file takes."""
    return sum(s.part.path.stat().st_size for s in shards) if mode == "physical" else 0
