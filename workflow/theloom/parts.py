"""The files that hold a dataset's rows: each is checked before a byte of it is believed.

HDF5 reads a missing source, one that is cut short, or one that it has no file descriptor for, as zeros. So nothing here
is read through HDF5's virtual datasets: the merged file says where each shard's bytes lie, and they are mapped.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom import commit, layout, seals, untrusted
from theloom.commit import RECORD
from theloom.errors import StoreError

TOKENS = ("tokens/input_ids", "tokens/document", "tokens/position")
_AGAIN = "run the pipeline again, or fetch the file again"


@dataclass(frozen=True)
class Part:
    """Consecutive rows in one file: how many, and where each dataset's bytes begin; -1: packed, in chunks."""

    path: Path
    rows: int
    places: dict[str, int]


def names_of(attributes: dict[str, Any]) -> list[str]:
    """The datasets that have a row for each token: the token tables, then the hook points."""
    return [*TOKENS, *map(layout.hook_path, json.loads(attributes["hooks"]))]


def own(file: h5py.File, path: Path, attributes: dict[str, Any]) -> Part:
    """A file that holds its own rows, a shard or a physical merge: all of it there, and finished. Raises StoreError."""
    rows, places, size = int(attributes["rows"]), {}, path.stat().st_size
    for name in names_of(attributes):
        dataset = file[name]
        shape = dataset.shape
        width = int(np.prod(shape[1:])) * dataset.id.get_type().get_size()
        kind = dataset.id.get_create_plist().get_layout()
        if shape[0] != rows:
            raise StoreError(f"{path}: its {name} has {shape[0]} rows instead of {rows}; {_AGAIN}")
        if kind == h5py.h5d.CHUNKED and attributes.get("compression") == "zstd":
            places[name], end = -1, _end_of_chunks(file, name, path)
        elif kind == h5py.h5d.CONTIGUOUS:
            places[name] = layout.byte_offset(dataset)
            end = places[name] + rows * width if places[name] or not rows * width else size + 1
        else:
            raise StoreError(f"{path}: its {name} is not laid out as theloom does it; {_AGAIN}")
        if size < end:
            raise StoreError(f"{path}: is cut short at {size} of {end} bytes; {_AGAIN}")
    if "commit_log" in file:
        log = file["commit_log"][:].astype(RECORD)
        done = commit.committed(log)
        if done != len(log):
            raise StoreError(f"{path}: only {done} of its {len(log)} batches are committed; {_AGAIN}")
    return Part(path, rows, places)


def _end_of_chunks(file: h5py.File, name: str, path: Path) -> int:
    ends = [0]
    file[name].id.chunk_iter(lambda chunk: ends.append(chunk.byte_offset + chunk.size))
    expected = -(-file[name].shape[0] // file[name].chunks[0])
    if len(ends) - 1 != expected:
        raise StoreError(f"{path}: has {len(ends) - 1} of {expected} chunks of {name}; {_AGAIN}")
    return max(ends)


def referred(file: h5py.File, path: Path, allow: Collection[str]) -> list[Part]:
    """The shards of a virtual dataset: each there, of the size, identity and seals that the merge saw."""
    parts = []
    names = names_of(dict(file.attrs))
    table = [file[f"sources/{column}"][:].tolist() for column in ("file", "rows", "bytes", "identity", "seal", "place")]
    for encoded, rows, size, identity, seal, places in zip(*table, strict=True):
        name = encoded.decode()
        untrusted.check_name(path, name, allow, "it refers to")
        shard = path.parent / name
        if not shard.is_file():
            raise StoreError(f"{path} refers to {shard}, which is missing; put it back, or run the pipeline again")
        found = shard.stat().st_size
        if found != size:
            raise StoreError(f"{shard}: has {found} bytes, {size} at the merge; {_AGAIN}")
        with layout.open_h5(shard, "activations") as source:
            same = source.attrs.get("identity") == identity.decode() and source.attrs.get("rows") == rows
            if not same or seals.SEAL not in source or source[seals.SEAL][:].tolist() != seal:
                raise StoreError(f"{shard}: is not the shard that {path.name} was merged from; {_AGAIN}")
        by_name = dict(zip(names, places, strict=True))
        itemsize = layout.bits_dtype(file.attrs["precision"]).itemsize
        for dataset, place in by_name.items():
            width = int(np.prod(file[dataset].shape[1:])) * (4 if dataset in TOKENS else itemsize)
            if place < -1 or place + rows * width > size:
                raise StoreError(f"{path}: refers to bytes that {shard} does not have; {_AGAIN}")
        parts.append(Part(shard, rows, by_name))
    return parts


def write_sources(file: h5py.File, parts: Sequence[Part], names: Sequence[str], relative: Sequence[str]) -> None:
    """What `referred` checks, and where the rows are."""
    seal, identity = [], []
    for part in parts:
        with h5py.File(part.path, "r") as source:
            seal.append(source[seals.SEAL][:])
            identity.append(source.attrs["identity"])
    file["sources/file"] = layout.fixed_strings(list(relative))
    file["sources/rows"] = [p.rows for p in parts]
    file["sources/bytes"] = [p.path.stat().st_size for p in parts]
    file["sources/identity"] = layout.fixed_strings(identity)
    file["sources/seal"] = np.array(seal, "<u8")
    file["sources/place"] = np.array([[p.places[n] for n in names] for p in parts], "<i8")
