"""All HDF5 files are created through this: HDF5 2.0 crashes where it closes a file with chunks that
it could not write, so it is not told of a failed write, and the error is raised in its place.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py


class _Guarded(io.RawIOBase):
    """A file whose first failed write is kept, and ends all writing without a word."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        size = left = view.nbytes
        while left and self.error is None:
            try:
                left -= self._file.write(view[size - left :]) or 0
            except OSError as error:
                self._keep(error)
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self._keep(error)
            return size or 0

    def _keep(self, error: OSError) -> None:
        self.error = error
        error.filename = str(self._path)  # writes know the file's number alone

    def readinto(self, buffer: Any) -> int:
        """What lies in the file; zeros behind its end, as HDF5 reads what it has not written."""
        view = memoryview(buffer).cast("B")
        got = self._file.readinto(view) or 0  # type: ignore[attr-defined]
        view[got:] = bytes(len(view) - got)
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is buffered here."""


class Output(h5py.File):
    """An HDF5 file that is written, in HDF5's oldest format, which `store.hdf5.content` reads."""

    def __init__(self, guarded: _Guarded) -> None:
        super().__init__(guarded, "w", libver="earliest")
        self._guarded = guarded

    def check(self) -> None:
        """Raise the first error of the disk so far; to be called between large writes."""
        if self._guarded.error is not None:
            raise self._guarded.error


@contextmanager
def written(path: Path) -> Iterator[Output]:
    """Create an HDF5 file.

    Args:
        path: the file; one that is there is replaced.

    Yields:
        The file, open for writing.

    Raises:
        OSError: the disk is full, or fails.
    """
    with path.open("w+b", buffering=0) as raw:
        guarded = _Guarded(raw, path)
        try:
            with Output(guarded) as file:
                yield file
        except Exception:
            if guarded.error is not None:  # what HDF5 says after it follows from it
                raise guarded.error from None
            raise
        if guarded.error is not None:
            raise guarded.error
