"""Merging shards to one dataset: `activations.h5` refers to them (virtual) or is a copy (physical).

Either way every shard must first be there, finished, of this run and of the same schema, since HDF5
reads a missing source as NaN. The merged file gets its final name when all of it is on disk. A
job that is killed leaves a `.partial`, which the next one writes from the start: the shards still
hold everything.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from theloom.dataset import parts
from theloom.dataset.merging.shards import OWN, PLAN, Shard, Whole, read_shard
from theloom.dataset.parts import TOKENS, Source
from theloom.dataset.rows import Maps, Rows
from theloom.errors import StoreError
from theloom.precision import SCALED
from theloom.store import checksums, compression, file_format, index, token_texts
from theloom.store.encoding import scaled
from theloom.store.file_format import METRICS
from theloom.store.hdf5 import byte_source, element_types
from theloom.store.hdf5.output import written
from theloom.store.lock import WriterLock
from theloom.store.statistics import create_statistics, statistics_columns

log = logging.getLogger(__name__)


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
    whole: Whole | None = None
    try:
        texts: dict[int, str] = {}
        for number, path in enumerate(shards):
            read = read_shard(path, number, texts)
            whole = Whole(read, output.parent) if whole is None else whole
            whole.add(read)
        assert whole is not None, "a run has a shard"
        _write(whole, texts, mode, unfinished, output.parent)
        checksums.write_checksums(unfinished, *checksums.ALL)
        file_format.sync(unfinished)
        unfinished.replace(output)
        file_format.sync(output.parent)
    except (OSError, RuntimeError) as error:  # h5py raises either when a file cannot be closed
        if not file_format.is_full(error):
            raise
        unfinished.unlink(missing_ok=True)
        raise file_format.no_room_error(
            output.parent, "the merged file", _bytes_of(shards, mode)
        ) from None
    finally:
        lock.release()
    hooks = len(whole.statistics)
    log.info("%d rows of %d hook points from %d shards (%s)", whole.rows, hooks, len(shards), mode)


def _write(whole: Whole, texts: Mapping[int, str], mode: str, target: Path, folder: Path) -> None:
    names, shards = list(whole.shapes), whole.shards
    with written(target) as file:
        attributes = {k: v for k, v in whole.attributes.items() if k not in OWN}
        plans = {name: [s.plan[name] for s in shards] for name in PLAN}
        plans["shard_rows"] = [s.part.rows for s in shards]
        sizes = {"rows": whole.rows}
        if shards[0].part.tokens is not None:
            plans["shard_tokens"] = [s.part.count(TOKENS[0]) for s in shards]
            sizes["tokens"] = sum(plans["shard_tokens"])
        file_format.set_attributes(file, attributes | plans | sizes | {"kind": mode})
        _write_tables(file, whole)
        token_texts.write(file, texts)
        file[checksums.CHECKSUMS] = np.zeros(len(checksums.ALL), "<u8")
        precision = str(whole.attributes["precision"])
        types = {name: _type(name, precision) for name in names}
        copied = {name: parts.row_type(name).itemsize for name in whole.more_tables}
        for name in copied:
            kind = h5py.h5t.py_create(parts.row_type(name))
            file_format.create_contiguous(file, name, (whole.count(name),), kind)
        if mode == "virtual":
            for name in names:
                _refer(file, name, whole, folder, types[name])
            parts.write_sources(file, [_source(s, folder) for s in shards], names)
        for name in names if mode == "physical" else ():
            shape = (whole.count(name), *whole.shapes[name][1:])
            if whole.packed and name not in TOKENS and not parts.is_scale(name):
                compression.create_packed(file, name, shape, types[name])
                _pack(file[name], name, shards, precision, file.check)
                continue
            file_format.create_contiguous(file, name, shape, types[name])
            copied[name] = types[name].get_size() * int(np.prod(shape[1:]))
        if precision in SCALED:
            for hook in whole.hooks:
                scaled.describe(file[file_format.hook_path(hook)], precision)
        offsets = {name: file_format.byte_offset(file[name]) for name in copied}
        index.write_index(file)
    _copy(target, offsets, copied, shards)


def _type(name: str, precision: str) -> h5py.h5t.TypeID:
    """The HDF5 type of a dataset of tokens, rows or scales."""
    if name in TOKENS:
        return h5py.h5t.STD_I32LE
    return element_types.hdf5_type("fp32" if parts.is_scale(name) else precision)


def _write_tables(file: h5py.File, whole: Whole) -> None:
    """Write documents, windows, statistics and metrics of all shards: they are small, so copied
    even in virtual mode.
    """
    whole.joined.write(file)
    create_statistics(file, whole.widths)
    for name, values in statistics_columns(whole.statistics).items():
        file[name][:] = values
    file["metrics"] = np.array([whole.metrics[name] for name in METRICS], "<f8")


def _refer(
    file: h5py.File, name: str, whole: Whole, folder: Path, type_id: h5py.h5t.TypeID
) -> None:
    """Create a virtual dataset over those of the shards, by paths relative to the merged file."""
    width = whole.shapes[name][1:]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    if type_id.get_class() == h5py.h5t.FLOAT:  # what HDF5 reads of a shard that is not there
        properties.set_fill_value(np.array(np.nan, "f4"))
    space = h5py.h5s.create_simple((whole.count(name), *width))
    row = 0
    for shard in whole.shards:
        rows = shard.part.count(name)
        if not rows:
            continue
        space.select_hyperslab((row, *(0 for _ in width)), (rows, *width))
        source = h5py.h5s.create_simple((rows, *width))
        properties.set_virtual(
            space, _relative(shard.part.path, folder).encode(), name.encode(), source
        )
        row += rows
    space.select_all()
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    h5py.h5d.create(file.id, name.encode(), type_id, space, dcpl=properties, lcpl=links)


def _source(shard: Shard, folder: Path) -> Source:
    return Source(shard.part, _relative(shard.part.path, folder), shard.fingerprint)


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.absolute(), folder.absolute())


def _pack(
    dataset: h5py.Dataset,
    name: str,
    shards: Sequence[Shard],
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
    target: Path, offsets: dict[str, int], row_bytes: dict[str, int], shards: Sequence[Shard]
) -> None:
    """Copy the bytes of every contiguous dataset from the shards, without decoding them."""
    out = os.open(target, os.O_RDWR)
    try:
        at = dict(offsets)
        sizes = {n: sum(s.part.count(n) for s in shards) * row_bytes[n] for n in offsets}
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


def _bytes_of(shards: Sequence[Path], mode: str) -> int:
    """About how many bytes the merged file takes."""
    return sum(path.stat().st_size for path in shards) if mode == "physical" else 0
