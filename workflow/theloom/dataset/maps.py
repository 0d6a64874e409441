"""Files of rows, mapped into memory or read in packed chunks, without a descriptor that stays open
for each: a dataset may have ten thousand of them.
"""

import ctypes
import math
import mmap
import os
import weakref
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from theloom.dataset.parts import Part
from theloom.errors import StoreError
from theloom.store.compression import ChunkCache, PackedRows
from theloom.store.hdf5 import byte_source
from theloom.store.hdf5.byte_source import ByteSource

_OPEN = 64  # packed files that stay open, those that were read last


class Maps:
    """Maps each file once for all of its datasets, when it is first read, in each process; checks
    that it is still the same.
    """

    def __init__(self) -> None:
        self._mapped: dict[Path, np.ndarray] = {}
        self._open: OrderedDict[Path, BinaryIO | ByteSource] = OrderedDict()
        self._chunks: dict[str, ChunkCache] = {}  # by name of the dataset
        self._lock = Lock()  # threads may read the same dataset

    def rows(self, part: Part, name: str, width: tuple[int, ...], dtype: np.dtype) -> Any:
        """The rows of a dataset in one file.

        Args:
            part: the file, and where its datasets begin.
            name: of the dataset.
            width: the shape of a row.
            dtype: of its elements, or of their bits.

        Returns:
            A mapped array (rows, *width), packed rows, or rows that are elsewhere.

        Raises:
            StoreError: the file is missing, cut short or another one by now, or the process may
                open no more files.
        """
        shape, offset = (part.count(name), *width), part.offsets[name]
        if offset < 0:
            with self._lock:
                cache = self._chunks.setdefault(name, ChunkCache())
            return PackedRows(cache, partial(self._opened, part), part.path, name, shape, dtype)
        if not isinstance(part.path, Path):
            source = byte_source.of(part.file.open())
            assert not isinstance(source, int)
            return source.rows(offset, shape, dtype)
        with self._lock:
            if part.path not in self._mapped:
                with part.file.open() as file:
                    self._mapped[part.path] = mapped(byte_source.descriptor(file))
            whole = self._mapped[part.path]
        size = math.prod(shape) * dtype.itemsize
        if min(len(whole), _size_now(part.path, len(whole))) < offset + size:
            raise StoreError(
                f"{part.path}: was cut short after it was opened; run the pipeline again"
            )
        return whole[offset : offset + size].view(dtype).reshape(shape)

    def _opened(self, part: Part) -> BinaryIO | ByteSource:
        """A packed file; it is closed once nobody reads it and others were read since."""
        with self._lock:
            file = self._open.get(part.path)
            if file is None:
                file = self._open[part.path] = part.file.open()
                if len(self._open) > _OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(part.path)
            return file

    def __reduce__(self) -> tuple[type["Maps"], tuple[()]]:
        return Maps, ()  # another process opens the files itself, and checks them again


def mapped(fd: int) -> np.ndarray:
    """Map a file for reading. Python's own maps hold a descriptor each; this one holds none.

    Args:
        fd: of the file, which may be closed after the call.

    Returns:
        Its bytes, read-only. They are unmapped with the last array over them.

    Raises:
        OSError: the system does not map it.
    """
    size, libc = os.fstat(fd).st_size, _libc()
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    whole = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(whole, libc.munmap, address, size).atexit = False
    return np.frombuffer(memoryview(whole).toreadonly(), "u1")


def release(rows: np.ndarray) -> None:
    """Give back the pages of a mapped array. Those of a file stay in the system's cache, and come
    back when they are read.

    Args:
        rows: a part of what `mapped` gave, without gaps.
    """
    begin = rows.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    end = rows.ctypes.data + rows.nbytes
    if rows.nbytes:
        _libc().madvise(begin, end - begin, mmap.MADV_DONTNEED)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    return libc


def _size_now(path: Path, otherwise: int) -> int:
    """Bytes of a file; one that was removed since keeps those that are mapped."""
    try:
        return path.stat().st_size
    except OSError:
        return otherwise
