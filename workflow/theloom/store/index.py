"""The directory of a file: its attributes, and where each of its datasets lies, in one small
dataset of JSON.

Whoever reads ten thousand shards asks HDF5 for one object of each, instead of for all of them, and
then reads bytes at offsets that it knows. A file that has none is requested object by object.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom.store import file_format
from theloom.store.commit_log import RECORD

INDEX = "index"

Extent = tuple[int, int]


@dataclass(frozen=True)
class Dataset:
    """A dataset's shape and type, and the offsets and sizes in bytes of what is stored of it.

    A contiguous one has a single extent, or none if it is empty; one in chunks those of its chunks,
    run by run; a virtual one has none. `type` is numpy's; of hidden states it says nothing.
    """

    shape: tuple[int, ...]
    type: str
    layout: int  # HDF5's number: contiguous, chunked or virtual
    extents: list[Extent]

    @property
    def end(self) -> int:
        """Where the last of its bytes ends in the file."""
        return max((offset + size for offset, size in self.extents), default=0)


@dataclass(frozen=True)
class FileIndex:
    """Of one file."""

    path: Path
    attributes: dict[str, Any]
    datasets: dict[str, Dataset]

    def array(self, fd: int, name: str) -> np.ndarray:
        """The content of a small contiguous dataset, read from the open file."""
        found = self.datasets[name]
        dtype = RECORD if name == "commit_log" else np.dtype(found.type)
        data = b"".join(os.pread(fd, size, offset) for offset, size in found.extents)
        return np.frombuffer(data, dtype).reshape(found.shape)


def read(file: h5py.File) -> FileIndex:
    """The directory of an open file. Raises one of `layout.DAMAGE` for one that is damaged."""
    if INDEX not in file:
        return derive(file)
    identity = h5py.h5d.open(file.id, INDEX.encode())
    data = np.empty(identity.shape, "u1")
    identity.read(h5py.h5s.ALL, h5py.h5s.ALL, data)
    found = json.loads(data.tobytes())
    datasets = {
        n: Dataset(tuple(s), t, k, [(a, b) for a, b in e])
        for n, (s, t, k, e) in found["datasets"].items()
    }
    return FileIndex(Path(file.filename), found["attributes"], datasets)


def write_index(file: h5py.File) -> None:
    """Give a file its directory, when all else in it has its offset."""
    if INDEX in file:
        del file[INDEX]
    found = derive(file)
    datasets = {n: [d.shape, d.type, d.layout, d.extents] for n, d in found.datasets.items()}
    text = json.dumps({"attributes": found.attributes, "datasets": datasets})
    file[INDEX] = np.frombuffer(text.encode(), "u1")


def derive(file: h5py.File) -> FileIndex:
    """What HDF5 says of every object of an open file."""
    objects: list[tuple[str, h5py.Dataset]] = []
    file.visititems(
        lambda name, item: objects.append((name, item)) if isinstance(item, h5py.Dataset) else None
    )
    attributes = {k: v.item() if hasattr(v, "item") else v for k, v in file.attrs.items()}
    datasets = {name: _dataset(name, item) for name, item in objects if name != INDEX}
    return FileIndex(Path(file.filename), attributes, datasets)


def _dataset(name: str, item: h5py.Dataset) -> Dataset:
    kind = item.id.get_create_plist().get_layout()
    numpy_type = "" if name.startswith("hooks/") else item.dtype.str
    extents: list[Extent] = []
    if kind == h5py.h5d.CHUNKED:
        item.id.chunk_iter(lambda chunk: extents.append((chunk.byte_offset, chunk.size)))
    elif kind == h5py.h5d.CONTIGUOUS and (offset := file_format.byte_offset(item)):
        extents.append((offset, item.id.get_storage_size()))
    return Dataset(item.shape, numpy_type, kind, _runs(extents))


def _runs(extents: list[Extent]) -> list[Extent]:
    """Extents in the order of their offsets, those that touch as one."""
    found: list[Extent] = []
    for offset, size in sorted(extents):
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((offset, size))
    return found
