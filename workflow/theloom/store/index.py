"""The index of a file: its attributes, and where each of its datasets is stored, in one small
dataset of JSON.

A reader of ten thousand shards has HDF5 open one object of each, the index, instead of all of them,
and then reads bytes at known offsets. Of a file without an index the objects are opened one by one.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom.store import file_format
from theloom.store.commit_log import RECORD
from theloom.store.hdf5 import byte_source, content
from theloom.store.hdf5.byte_source import Readable
from theloom.store.hdf5.objects import Objects
from theloom.store.tables import tokens as token_tables

INDEX = "index"

_LARGEST = 32 << 20  # bytes of an index: ten thousand shards or hook points take 2 MiB
_AT_ONCE = 1 << 20  # bytes of a piece

# The types of the tables that readers take, by name or by group; of others any number will do
_TYPES = {
    "tokens": "<i4",
    **{token_tables.path(name): numpy_type for name, numpy_type in token_tables.TYPES.items()},
    token_tables.ROW_TOKEN: "<i8",
    "documents/offset": "<i8",
    "documents/id": "|S",
    "windows/offset": "<i8",
    "windows/document": "<i4",
    "windows/hash": "<u8",
    "windows/batch": "<u4",
    "statistics/offset": "<i8",
    "statistics": "<f8",
    "metrics": "<f8",
    "vocabulary/id": "<i4",
    "vocabulary/offset": "<i8",
    "vocabulary/text": "|u1",
    "checksums": "<u8",
    "commit_log": f"|V{RECORD.itemsize}",
    "sources/file": "|S",
    "sources/checksums": "<u8",
    "sources/shard_fingerprint": "|S",
    "sources": "<i8",
}

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

    def array(self, fd: Readable, name: str) -> np.ndarray:
        """The content of a small contiguous dataset.

        Args:
            fd: of the file, open for reading.
            name: of the dataset.

        Returns:
            The content, in the type and shape of the dataset.

        Raises:
            KeyError: the file has no such dataset.
            ValueError: it has another type or layout than TheLoom writes, or the file ends early.
        """
        dtype, count, offset = self._stored(name)
        data = bytearray(count * dtype.itemsize)
        if not byte_source.read_into(fd, memoryview(data), offset):
            raise ValueError(f"it ends within its {name}")
        return np.frombuffer(data, dtype).reshape(self.datasets[name].shape)

    def pieces(self, fd: Readable, name: str) -> Iterator[np.ndarray]:
        """The content of a contiguous dataset that memory does not hold, piece after piece.

        Args:
            fd: of the file, open for reading.
            name: of the dataset.

        Yields:
            The elements, (elements,), a megabyte at a time.

        Raises:
            KeyError: the file has no such dataset.
            ValueError: it has another type or layout than TheLoom writes, or the file ends early.
        """
        dtype, count, offset = self._stored(name)
        together = max(1, _AT_ONCE // dtype.itemsize)
        for first in range(0, count, together):
            size = min(together, count - first) * dtype.itemsize
            data = byte_source.pread(fd, size, offset + first * dtype.itemsize)
            if len(data) != size:
                raise ValueError(f"it ends within its {name}")
            yield np.frombuffer(data, dtype)

    def _stored(self, name: str) -> tuple[np.dtype, int, int]:
        """The type of a contiguous dataset, its elements, and where it begins in the file."""
        dataset = self.datasets[name]
        expected = _TYPES.get(name) or _TYPES.get(name.partition("/")[0], "")
        if not dataset.type.startswith(expected) or not re.fullmatch(
            r"[<|][iuf][1248]|\|S[1-9]\d*|\|V32", dataset.type
        ):
            raise ValueError(f"its {name} has the type {dataset.type!r}")
        dtype = RECORD if name == "commit_log" else np.dtype(dataset.type)
        count = math.prod(dataset.shape)
        size = count * dtype.itemsize
        if dataset.layout != content.CONTIGUOUS or [s for _, s in dataset.extents] != [size] * (
            size > 0
        ):
            raise ValueError(f"its {name} is not stored as TheLoom does it")
        return dtype, count, dataset.extents[0][0] if size else 0


def read(file: h5py.File) -> FileIndex:
    """Read the index of a file that HDF5 has open for reading.

    Args:
        file: with a descriptor of its own, which `of` reads from.

    Returns:
        The index.
    """
    return of(Objects(file.id.get_vfd_handle()), Path(file.filename))


def of(file: Objects, path: Path) -> FileIndex:
    """Read the index of an open file; one without an index is read object by object.

    Args:
        file: the open file.
        path: of it.

    Returns:
        The index.

    Raises:
        file_format.DAMAGE: any of these, where the file is damaged.
    """
    header = file.find(INDEX)
    if header is None:
        return derived(file, path)
    stored = content.dataset(file, header)
    if (stored.type, len(stored.shape), len(stored.places)) != ("|u1", 1, 1):
        raise ValueError("its index is not stored as TheLoom does it")
    ((offset, size),) = stored.places
    if size > _LARGEST:
        raise ValueError(f"its index has {size} bytes")
    file.allow(size)
    parsed = json.loads(file.read(offset, size))
    attributes, datasets = parsed["attributes"], parsed["datasets"]
    if not all(isinstance(value, str | int | float) for value in attributes.values()):
        raise ValueError("its index has attributes that are neither text nor number")
    texts = [*attributes, *(value for value in attributes.values() if isinstance(value, str))]
    if b"\0" in "".join(texts).encode():  # which fails at half a character
        raise ValueError("its index has attributes that are no text")
    return FileIndex(
        path, attributes, {name: _listed(file, *entry) for name, entry in datasets.items()}
    )


def _listed(
    file: Objects, shape: list[int], numpy_type: str, layout: int, extents: list[list[int]]
) -> Dataset:
    """One dataset of an index. Raises ValueError where it is none."""
    numbers = [*shape, layout, *(n for extent in extents for n in extent)]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("its index has shapes or offsets that are no numbers")
    pairs = [(offset, size) for offset, size in extents]
    if any(offset + size > file.size for offset, size in pairs):
        raise ValueError("its index refers to bytes beyond its end")
    return Dataset(tuple(shape), str(numpy_type), layout, pairs)


def derived(file: Objects, path: Path) -> FileIndex:
    """Compute the index of an open file from its objects, without HDF5's library.

    Args:
        file: the open file.
        path: of it.

    Returns:
        The index.

    Raises:
        file_format.DAMAGE: any of these, where the file is damaged.
    """
    datasets = {}
    for name, header in file.datasets():
        if name == INDEX:
            continue
        found = content.dataset(file, header)
        numpy_type = found.type
        if name == "commit_log" and numpy_type == ",".join(RECORD.names or ()):
            numpy_type = _TYPES[name]
        if name.startswith("hooks/"):
            numpy_type = ""
        datasets[name] = Dataset(found.shape, numpy_type, found.layout, _runs(found.places))
    return FileIndex(path, content.attributes(file, file.root()), datasets)


def write_index(file: h5py.File) -> None:
    """Write the index of an open file, or replace it; all other datasets must be there by now.

    Args:
        file: open for writing.
    """
    if INDEX in file:
        del file[INDEX]
    derived = derive(file)
    datasets = {n: [d.shape, d.type, d.layout, d.extents] for n, d in derived.datasets.items()}
    text = json.dumps({"attributes": derived.attributes, "datasets": datasets})
    file[INDEX] = np.frombuffer(text.encode(), "u1")


def derive(file: h5py.File) -> FileIndex:
    """Compute the index of a file that HDF5 has open, for writing it.

    Args:
        file: open for writing.

    Returns:
        The index.
    """
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
