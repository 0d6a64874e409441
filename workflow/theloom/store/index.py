"""The index of a file: its attributes, and where each of its datasets is stored, in one small
dataset of JSON.

A reader of ten thousand shards has HDF5 open one object of each, the index, instead of all of them,
and then reads bytes at known offsets. Of a file without an index the objects are opened one by one.
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

    A contiguous dataset has a single extent, or none if it is empty; a chunked one has the extents
    of its chunks, adjacent ones joined; a virtual one has none. `type` is NumPy's; it is empty for
    hidden states, since NumPy has no bfloat16.
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
    """The index of one file: attributes of the root, and datasets by name."""

    path: Path
    attributes: dict[str, Any]
    datasets: dict[str, Dataset]

    def array(self, fd: int, name: str) -> np.ndarray:
        """The content of a small contiguous dataset.

        Args:
            fd: of the file, open for reading.
            name: of the dataset.
        """
        dataset = self.datasets[name]
        dtype = RECORD if name == "commit_log" else np.dtype(dataset.type)
        data = b"".join(os.pread(fd, size, offset) for offset, size in dataset.extents)
        return np.frombuffer(data, dtype).reshape(dataset.shape)


def read(file: h5py.File) -> FileIndex:
    """Read the index of an open file; one without an index is read object by object.

    Raises:
        file_format.DAMAGE: any of these, where the file is damaged.
    """
    if INDEX not in file:
        return derive(file)
    identity = h5py.h5d.open(file.id, INDEX.encode())
    data = np.empty(identity.shape, "u1")
    identity.read(h5py.h5s.ALL, h5py.h5s.ALL, data)
    content = json.loads(data.tobytes())
    datasets = {
        n: Dataset(tuple(s), t, k, [(a, b) for a, b in e])
        for n, (s, t, k, e) in content["datasets"].items()
    }
    return FileIndex(Path(file.filename), content["attributes"], datasets)


def write_index(file: h5py.File) -> None:
    """Write the index of an open file, or replace it; all other datasets must be there by now."""
    if INDEX in file:
        del file[INDEX]
    derived = derive(file)
    datasets = {n: [d.shape, d.type, d.layout, d.extents] for n, d in derived.datasets.items()}
    text = json.dumps({"attributes": derived.attributes, "datasets": datasets})
    file[INDEX] = np.frombuffer(text.encode(), "u1")


def derive(file: h5py.File) -> FileIndex:
    """Compute the index of an open file from its HDF5 objects."""
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
    """Extents in ascending order, adjacent ones joined."""
    runs: list[Extent] = []
    for offset, size in sorted(extents):
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((offset, size))
    return runs
