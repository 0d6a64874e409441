"""Shards to one dataset: `activations.h5`, which refers to them (virtual) or holds a copy (physical).

Both check first that every shard is there, finished, of this run and of one schema: HDF5 itself reads a missing source
as zeros.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom import layout
from theloom.errors import StoreError
from theloom.shard import RECORD, committed, hook_path

log = logging.getLogger(__name__)

_TOKENS = ("tokens/input_ids", "tokens/document", "tokens/position")
_PLAN = ("batch_tokens", "chunk_size")  # what each job had room for: of the merged file, one number for each shard
_OWN = ("kind", "shard", "first_row", "identity", "rows", *_PLAN)  # attributes of a shard, not of the run


@dataclass(frozen=True)
class _Shard:
    """One checked shard: its place in the whole, and where each dataset's bytes lie in its file."""

    path: Path
    rows: int
    attributes: dict[str, Any]
    places: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def merge(shards: Sequence[Path], mode: str, output: Path) -> None:
    """The merge_shards stage: write `activations.h5`. `mode` is virtual or physical. Raises StoreError."""
    checked = [_check(path, number) for number, path in enumerate(shards)]
    _check_together(checked)
    hooks = [hook_path(h) for h in json.loads(checked[0].attributes["hooks"])]
    unfinished = output.with_name(output.name + ".partial")
    with h5py.File(unfinished, "w") as file:
        attributes = {k: v for k, v in checked[0].attributes.items() if k not in _OWN}
        plans = {name: [int(s.attributes[name]) for s in checked] for name in _PLAN}
        layout.set_attributes(file, attributes | plans | {"kind": mode, "rows": sum(s.rows for s in checked)})
        _write_tables(file, checked)
        for name in (*_TOKENS, *hooks):
            if mode == "virtual":
                _refer(file, name, checked, output.parent)
            else:
                _place(file, name, checked)
        offsets = {name: layout.byte_offset(file[name]) for name in (*_TOKENS, *hooks)}
        if mode == "virtual":
            _write_sources(file, checked, output.parent)
    if mode == "physical":
        _copy(unfinished, offsets, checked)
    layout.sync(unfinished)
    unfinished.replace(output)
    layout.sync(output.parent)
    log.info(
        "%d rows of %d hook points from %d shards (%s)",
        sum(s.rows for s in checked),
        len(hooks),
        len(shards),
        mode,
    )


def _check(path: Path, number: int) -> _Shard:
    """One shard, finished and whole. Raises StoreError."""
    with layout.open_h5(path, "activations") as file:
        attributes = dict(file.attrs)
        if attributes.get("kind") != "shard" or attributes["shard"] != number:
            raise StoreError(f"{path}: is not shard {number} of a run; remove it and run again")
        done, planned = committed(file["commit_log"][:].astype(RECORD)), len(file["commit_log"])
        if done != planned:
            raise StoreError(f"{path}: only {done} of its {planned} batches are committed; remove it and run again")
        names = [*_TOKENS, *map(hook_path, json.loads(attributes["hooks"]))]
        places = {name: layout.byte_offset(file[name]) for name in names}
        shapes = {name: file[name].shape for name in names}
        end = max((places[n] + file[n].id.get_storage_size() for n in names), default=0)
    if path.stat().st_size < end:
        raise StoreError(f"{path}: is cut short at {path.stat().st_size} of {end} bytes; remove it and run again")
    return _Shard(path, int(attributes["rows"]), attributes, places, shapes)


def _check_together(shards: Sequence[_Shard]) -> None:
    """Shards of one run, in order, without a gap. Raises StoreError."""
    row = 0
    for shard in shards:
        for name in ("run_identity", "hooks", "precision"):
            if shard.attributes[name] != shards[0].attributes[name]:
                raise StoreError(
                    f"{shard.path}: its {name} is not that of {shards[0].path.name}: the shards are of different runs; "
                    "run again with --forcerun extract_shard"
                )
        if shard.attributes["first_row"] != row:
            raise StoreError(f"{shard.path}: begins at row {shard.attributes['first_row']}, expected {row}")
        row += shard.rows


def _write_tables(file: h5py.File, shards: Sequence[_Shard]) -> None:
    """The tables of documents and windows, joined: small, so always copied; offsets become rows of the whole."""
    joined: dict[str, list[np.ndarray]] = {}
    row = 0
    for shard in shards:
        with h5py.File(shard.path, "r") as source:
            for name in ("documents/offset", "windows/offset"):
                joined.setdefault(name, []).append(source[name][:-1] + row)
            for name in ("documents/id", "windows/document", "windows/hash"):
                joined.setdefault(name, []).append(source[name][:])
        row += shard.rows
    for name, parts in joined.items():
        file[name] = np.concatenate([*parts, [row]] if name.endswith("offset") else parts)


def _refer(file: h5py.File, name: str, shards: Sequence[_Shard], folder: Path) -> None:
    """A virtual dataset over the shards' datasets, by names relative to the merged file."""
    width = shards[0].shapes[name][1:]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    whole = h5py.h5s.create_simple((sum(s.rows for s in shards), *width))
    row = 0
    for shard in shards:
        if not shard.rows:
            continue
        whole.select_hyperslab((row, *(0 for _ in width)), (shard.rows, *width))
        source = h5py.h5s.create_simple((shard.rows, *width))
        properties.set_virtual(whole, _relative(shard.path, folder).encode(), name.encode(), source)
        row += shard.rows
    whole.select_all()
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    with h5py.File(shards[0].path, "r") as first:
        h5py.h5d.create(file.id, name.encode(), first[name].id.get_type(), whole, dcpl=properties, lcpl=links)


def _write_sources(file: h5py.File, shards: Sequence[_Shard], folder: Path) -> None:
    """What a reader checks before it believes a virtual dataset."""
    file["sources/file"] = layout.fixed_strings([_relative(s.path, folder) for s in shards])
    file["sources/rows"] = [s.rows for s in shards]
    file["sources/bytes"] = [s.path.stat().st_size for s in shards]
    file["sources/identity"] = layout.fixed_strings([s.attributes["identity"] for s in shards])


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())


def _place(file: h5py.File, name: str, shards: Sequence[_Shard]) -> None:
    """An empty contiguous dataset for the rows of all shards."""
    with h5py.File(shards[0].path, "r") as first:
        shape = (sum(s.rows for s in shards), *shards[0].shapes[name][1:])
        layout.create_contiguous(file, name, shape, first[name].id.get_type())


def _copy(target: Path, offsets: dict[str, int], shards: Sequence[_Shard]) -> None:
    """Bytes of every dataset from the shards to their places, without decoding."""
    row_bytes = {}
    with h5py.File(target, "r") as file:
        for name in offsets:
            rows = file[name].shape[0]
            row_bytes[name] = file[name].id.get_storage_size() // rows if rows else 0
    out = os.open(target, os.O_RDWR)
    try:
        row = 0
        for shard in shards:
            source = os.open(shard.path, os.O_RDONLY)
            try:
                for name, place in offsets.items():
                    size = shard.rows * row_bytes[name]
                    _copy_range(source, shard.places[name], out, place + row * row_bytes[name], size)
            finally:
                os.close(source)
            row += shard.rows
        os.fsync(out)
    finally:
        os.close(out)


def _copy_range(source: int, start: int, out: int, place: int, size: int) -> None:
    os.lseek(out, place, os.SEEK_SET)
    while size:
        sent = os.sendfile(out, source, start, min(size, 1 << 30))
        if not sent:
            raise StoreError(f"a shard ended {size} bytes early while it was copied; check the file system")
        start, size = start + sent, size - sent
