"""Compressed rows: HDF5 chunks, shuffled and compressed by zstd in threads.

HDF5's own filters would run in one thread, under its global lock; `write_direct_chunk` bypasses
them. A shard is written and committed uncompressed, like any other, and packed into its final file
when all of its rows are there. A job that is killed while it packs has lost nothing: the next one
packs the `.partial` file again. Any HDF5 program with the filters shuffle and zstd (number 32015;
h5py with the package hdf5plugin) reads the result.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import zstandard

from theloom.errors import StoreError
from theloom.precision import SCALED
from theloom.store import checksums, file_format
from theloom.store.encoding import scaled
from theloom.store.hdf5 import byte_source, content, element_types
from theloom.store.hdf5.byte_source import ByteSource
from theloom.store.hdf5.objects import Objects
from theloom.store.hdf5.output import written
from theloom.store.index import INDEX, write_index

ZSTD_FILTER = 32015
LEVEL = 1  # higher levels make residuals little smaller and take far longer

_CHUNK_BYTES = 1 << 18

_LARGEST_CHUNK = 1 << 30  # bytes: a row of attention of 128 heads over a million keys has half

_OVERHEAD = 1 << 10  # bytes of a chunk that zstd cannot make smaller

_CACHED_CHUNKS = 16  # of a dataset, when it is read

_local = threading.local()

Read = Callable[[int, int], np.ndarray]


def create_packed(
    group: h5py.Group, name: str, shape: tuple[int, ...], type_id: h5py.h5t.TypeID
) -> h5py.Dataset:
    """Create a chunked dataset whose filters are shuffle and zstd.

    Args:
        group: the file, or a group of it.
        name: of the dataset; groups in it are created.
        shape: of the dataset; a chunk holds whole rows, of 256 KiB or one.
        type_id: its HDF5 type, from `element_types.hdf5_type`.

    Returns:
        The dataset, empty.
    """
    rows = rows_of_chunk(shape, type_id.get_size())
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((rows, *shape[1:]))
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    properties.set_shuffle()
    # optional: a mandatory filter cannot be set where HDF5 lacks it, as h5py's own HDF5 does
    properties.set_filter(ZSTD_FILTER, h5py.h5z.FLAG_OPTIONAL, (LEVEL,))
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(
        h5py.h5d.create(group.id, name.encode(), type_id, space, dcpl=properties, lcpl=links)
    )


def rows_of_chunk(shape: tuple[int, ...], itemsize: int) -> int:
    """The size of each chunk of a packed dataset: 256 KiB of rows, or one row.

    Args:
        shape: of the dataset.
        itemsize: bytes of an element.

    Returns:
        Rows, 1 at least.

    Examples:
        >>> rows_of_chunk((1000, 576), itemsize=2)
        227
    """
    row = itemsize * int(np.prod(shape[1:]))
    return min(max(1, _CHUNK_BYTES // max(1, row)), max(1, shape[0]))


def write(dataset: h5py.Dataset, read: Read, check: Callable[[], None]) -> None:
    """Fill a packed dataset.

    Args:
        dataset: from `create_packed`.
        read: called with the first row and the end; returns the bits of these rows, (rows, …).
        check: called between writes; raises where the disk failed.
    """
    rows, step = dataset.shape[0], dataset.chunks[0]
    starts = range(0, rows, step)
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        for group in range(0, len(starts), 4 * threads):
            some = starts[group : group + 4 * threads]
            packed = pool.map(
                lambda start: _packed(read(start, min(start + step, rows)), step), some
            )
            for start, data in zip(some, packed, strict=True):
                dataset.id.write_direct_chunk((start, *(0 for _ in dataset.shape[1:])), data)
            check()


def _packed(rows: np.ndarray, step: int) -> bytes:
    if len(rows) < step:  # HDF5's chunks are all of one size
        rows = np.concatenate([rows, np.zeros((step - len(rows), *rows.shape[1:]), rows.dtype)])
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    shuffled = np.ascontiguousarray(rows).view("u1").reshape(-1, rows.itemsize).T
    return _local.compressor.compress(np.ascontiguousarray(shuffled).data)


def pack_shard(partial: Path, path: Path) -> None:
    """Pack a finished `.partial` file, and remove it.

    Args:
        partial: the unpacked file, in which all rows are committed.
        path: the shard's final file.

    Raises:
        MemoryPlanError: the disk is full.
    """
    packing = path.with_name(path.name + ".packing")
    try:
        with h5py.File(partial, "r") as source, written(packing) as target:
            copy_all_but_rows(source, target)
            target.attrs["compression"] = "zstd"
            # by name: `items()` holds h5py's lock between two items, which threads of `write` wait
            # for where the garbage collector frees an object of h5py in one of them
            for hook in list(source["hooks"]):
                rows = source["hooks"][hook]["activations"]
                precision = element_types.precision_of(rows)
                dataset = create_packed(
                    target, file_format.hook_path(hook), rows.shape, rows.id.get_type()
                )
                if precision in SCALED:
                    scaled.describe(dataset, precision)
                    source.copy(file_format.scale_path(hook), target[f"hooks/{hook}"])
                bits = element_types.bits_dtype(precision)
                offset = file_format.byte_offset(rows)
                if rows.size:
                    mapped = np.memmap(partial, bits, "r", offset, rows.shape)
                    write(dataset, _slices(mapped), target.check)
            write_index(target)
        checksums.write_checksums(packing, *checksums.ALL)
        file_format.sync(packing)
    except (OSError, RuntimeError) as error:
        if not file_format.is_full(error):
            raise
        packing.unlink(missing_ok=True)
        raise file_format.no_room_error(
            path.parent, "a packed shard", partial.stat().st_size
        ) from None
    packing.replace(path)
    file_format.sync(path.parent)
    partial.unlink()


def _slices(array: np.ndarray) -> Read:
    return lambda start, stop: array[start:stop]


def copy_all_but_rows(source: h5py.File, target: h5py.File) -> None:
    """Copy attributes, tables, hashes, log and statistics to another open file.

    Args:
        source: open for reading.
        target: open for writing.
    """
    for name, value in source.attrs.items():
        target.attrs[name] = value
    for name in source:
        if name not in ("hooks", INDEX):
            source.copy(name, target)


class ChunkCache:
    """The unpacked chunks of a dataset that were used last, over all files that hold it."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[Path, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: tuple[Path, int]) -> bool:
        return key in self._chunks

    def get(self, key: tuple[Path, int]) -> np.ndarray | None:
        """Find a chunk.

        Args:
            key: the file and the number of the chunk in it.

        Returns:
            Its rows; None where they are not there.
        """
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: tuple[Path, int], rows: np.ndarray) -> None:
        """Keep a chunk, in the place of the one that was used longest ago.

        Args:
            key: the file and the number of the chunk in it.
            rows: of the chunk.
        """
        with self._lock:
            self._chunks[key] = rows
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)


class PackedRows:
    """The rows of a packed dataset in one file, read chunk by chunk: `rows[a:b]`, `rows[array]`.

    Args:
        cache: of the dataset.
        opened: gives the open file, with whose descriptor all is read.
        path: of it, for messages.
        name: of the dataset.
        shape: of the dataset.
        dtype: of its bits, from `element_types.bits_dtype`.

    Raises:
        StoreError: the file is damaged, or lacks chunks.
    """

    def __init__(
        self,
        cache: ChunkCache,
        opened: Callable[[], BinaryIO | ByteSource],
        path: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self._opened, self._path, self._shape, self._dtype = opened, path, shape, dtype
        try:
            file = opened()
            objects = Objects(byte_source.of(file))
            header = objects.find(name)
            if header is None:
                raise ValueError(f"it lacks {name}")
            stored = content.dataset(objects, header)
        except file_format.DAMAGE as error:
            raise file_format.damaged_error(path, error) from None
        step = self._step = rows_of_chunk(shape, dtype.itemsize)
        size = step * int(np.prod(shape[1:])) * dtype.itemsize
        if stored.shape != shape or stored.chunk != (step, *shape[1:]) or size > _LARGEST_CHUNK:
            raise StoreError(
                f"{path}: its {name} has chunks that TheLoom does not write; fetch the file again"
            )
        if len(stored.places) != (expected := -(-shape[0] // step)):
            raise StoreError(
                f"{path}: has {len(stored.places)} of {expected} chunks of {name}; "
                "run the pipeline again"
            )
        if stored.starts != list(range(0, shape[0], step)):
            raise StoreError(f"{path}: its {name} lacks chunks; run the pipeline again")
        self._chunks = stored.places
        self._cache = cache

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: "slice | np.ndarray") -> np.ndarray:
        wanted = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        out = np.empty((len(wanted), *self._shape[1:]), self._dtype)
        numbers = wanted // self._step
        for place, number in enumerate(needed := np.unique(numbers).tolist()):
            if place % _CACHED_CHUNKS == 0:
                coming = needed[place : place + _CACHED_CHUNKS]
                byte_source.prefetch(
                    byte_source.of(self._opened()),
                    [self._chunks[n] for n in coming if (self._path, n) not in self._cache],
                )
            here = numbers == number
            out[here] = self._chunk(number)[wanted[here] - number * self._step]
        return out

    def _chunk(self, number: int) -> np.ndarray:
        if (known := self._cache.get((self._path, number))) is not None:
            return known
        offset, size = self._chunks[number]
        elements = self._step * int(np.prod(self._shape[1:]))
        needed = elements * self._dtype.itemsize
        file = self._opened()  # not closed before it is read
        try:
            # the rest of a chunk that is larger than zstd makes one is not read
            most = needed + needed // 128 + _OVERHEAD
            shuffled = _unpacked(
                byte_source.pread(byte_source.of(file), min(size, most), offset), needed
            )
            plain = np.frombuffer(shuffled, "u1").reshape(self._dtype.itemsize, elements).T
        except (zstandard.ZstdError, ValueError, OSError, MemoryError) as error:
            raise StoreError(
                f"{self._path}: rows from {number * self._step} on are damaged ({error})"
            ) from None
        rows = np.ascontiguousarray(plain).view(self._dtype).reshape(self._step, *self._shape[1:])
        self._cache.put((self._path, number), rows)
        return rows


def _unpacked(packed: bytes, size: int) -> bytes:
    """The content of a frame of zstd that has this size, which is compared first: zstandard would
    set aside whatever a frame states. Raises ValueError, ZstdError.
    """
    if (stated := zstandard.frame_content_size(packed)) != size:
        raise ValueError(f"a chunk of {stated} bytes instead of {size}")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    unpacked: bytes = _local.decompressor.decompress(packed)
    return unpacked
