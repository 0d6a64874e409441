"""Files that are read by their bytes: a local one by its descriptor, another by what reads it.

The store understands a file from its bytes alone, so that a file needs not be a local one: whatever
gives bytes at an offset will do.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np


class ByteSource(Protocol):
    """A file that is not on a local disk. It gives bytes that it has checked, or raises."""

    size: int

    def pread(self, size: int, offset: int) -> bytes:
        """Read bytes.

        Args:
            size: how many.
            offset: of the first.

        Returns:
            The bytes; fewer where the file ends.
        """
        ...

    def prefetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch what is read next, together.

        Args:
            spans: offset and size in bytes of each.
        """
        ...

    def rows(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array that is read when it is indexed, with a slice or an array of rows.

        Args:
            offset: of the first row, in bytes.
            shape: (rows, …).
            dtype: of the elements.

        Returns:
            The array.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class SourcePath(Protocol):
    """Where a `ByteSource` is: what messages, and files that refer to it, need of a path."""

    name: str

    @property
    def parent(self) -> "SourcePath":
        """The folder."""
        ...

    def __truediv__(self, name: str) -> "SourcePath": ...

    def open_bytes(self) -> ByteSource:
        """Open the file.

        Returns:
            The file.

        Raises:
            StoreError: it is missing.
        """
        ...


Readable = int | ByteSource


def of(file: "BinaryIO | ByteSource") -> Readable:
    """What the functions of the store read a file with.

    Args:
        file: an open file.

    Returns:
        The descriptor of a local one, else the file.
    """
    return file.fileno() if hasattr(file, "fileno") else file


def descriptor(file: "BinaryIO | ByteSource") -> int:
    """The descriptor of a local file, for what only the operating system does.

    Args:
        file: an open file.

    Returns:
        Its descriptor.

    Raises:
        TypeError: it is no local file.
    """
    source = of(file)
    if not isinstance(source, int):
        raise TypeError(f"{file} is not on a local disk")
    return source


def size_of(source: Readable) -> int:
    """The size of a file.

    Args:
        source: its descriptor, or what reads it.

    Returns:
        Bytes.
    """
    return os.fstat(source).st_size if isinstance(source, int) else source.size


def pread(source: Readable, size: int, offset: int) -> bytes:
    """Read bytes of a file.

    Args:
        source: its descriptor, or what reads it.
        size: how many.
        offset: of the first.

    Returns:
        The bytes; fewer where the file ends.
    """
    if isinstance(source, int):
        return os.pread(source, size, offset)
    return source.pread(size, offset)


def read_into(source: Readable, out: memoryview, offset: int) -> bool:
    """Fill memory with bytes of a file; those of a local one are not there twice.

    Args:
        source: its descriptor, or what reads it.
        out: the memory, of bytes.
        offset: of the first.

    Returns:
        False where the file ends before.
    """
    if not isinstance(source, int):
        data = source.pread(len(out), offset)
        out[: len(data)] = data
        return len(data) == len(out)
    at = 0
    while at < len(out):
        if not (got := os.preadv(source, [out[at:]], offset + at)):
            return False
        at += got
    return True


def prefetch(source: Readable, spans: Sequence[tuple[int, int]]) -> None:
    """Tell what is read next, so that it is fetched together; of a local file nothing happens.

    Args:
        source: the descriptor of the file, or what reads it.
        spans: offset and size in bytes of each.
    """
    if not isinstance(source, int):
        source.prefetch(spans)


def as_path(path: "str | Path | SourcePath") -> Any:
    """A path as the readers take it.

    Args:
        path: of a local file, or where another is.

    Returns:
        A `Path`, or the latter as it is.
    """
    return Path(path) if isinstance(path, str | os.PathLike) else path
