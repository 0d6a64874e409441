"""A remote file, read by ranges: no byte is given out whose block has not the hash that was pushed.

Consecutive rows are fetched in few large ranges, several at once, since each request waits for the
network. Rows at random are fetched by their blocks. Blocks of which a part was used stay in memory.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from threading import Lock
from typing import Self

import numpy as np

from theloom.errors import StoreError
from theloom.remote import faults
from theloom.remote.manifest import Entry, Record
from theloom.remote.places import Store, join, record_url

REQUESTS = 8  # at once
LEAST_SPAN, SPAN = 4 << 20, 16 << 20  # bytes of one request; fewer where fewer are read
_AHEAD = 1 << 20  # bytes that a small read fetches, since the next one is often beside it
_CACHED = 64 << 20  # bytes of blocks in memory

_ADVICE = "the remote file was changed or damaged; push the file again"


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process, which another that is forked from it does not have."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="theloom-remote")


class BlockCache:
    """The blocks that were read last, of all files of a folder: 64 MiB of them."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, name: str, number: int) -> bytes | None:
        """A block that is still there.

        Args:
            name: of the file.
            number: of the block.

        Returns:
            Its bytes; None: it has to be fetched.
        """
        with self._lock:
            data = self._blocks.get((name, number))
            if data is not None:
                self._blocks.move_to_end((name, number))
            return data

    def put(self, name: str, number: int, data: bytes) -> None:
        """Keep a block; those that were not used for longest give way.

        Args:
            name: of the file.
            number: of the block.
            data: its bytes, which were checked.
        """
        with self._lock:
            if (name, number) not in self._blocks:
                self._bytes += len(data)
            self._blocks[name, number] = data
            while self._bytes > _CACHED:
                self._bytes -= len(self._blocks.popitem(last=False)[1])


class _WrongBlockError(Exception):
    """A block has not the hash that was pushed."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class RemoteFile:
    """A file of a pushed folder, as `theloom.store.hdf5.byte_source` reads files.

    Args:
        store: where the folder is.
        cache: of blocks, which all files of the folder share.
        folder: URL of the folder.
        name: of the file in it.
        entry: of the file in the manifest.
    """

    def __init__(
        self, store: Store, cache: BlockCache, folder: str, name: str, entry: Entry
    ) -> None:
        self._store, self._cache, self._entry = store, cache, entry
        self._folder, self._name = folder, name
        self._checksums = bytes.fromhex(entry.checksums)
        self.size = entry.size
        self.url = join(folder, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def block(self) -> int:
        """Bytes that have a hash together."""
        return self._record.block

    @cached_property
    def _record(self) -> Record:
        """The hashes of its blocks, which are read with the first of them."""
        url = record_url(self._folder, self._name)
        try:
            record = Record.decoded(self._store.read(url), self._entry.record_sha256)
        except FileNotFoundError:
            raise StoreError(f"{url}: is missing; push the file again") from None
        except (ValueError, TypeError) as error:
            raise StoreError(f"{url}: is not what was pushed ({error}); {_ADVICE}") from None
        if record.size != self.size:
            raise StoreError(f"{url}: is of a file of another size; {_ADVICE}")
        return record

    def pread(self, size: int, offset: int) -> bytes:
        """Read bytes.

        Args:
            size: how many.
            offset: of the first.

        Returns:
            The bytes; fewer where the file ends.

        Raises:
            StoreError: they cannot be read, or are not those that were pushed.
        """
        size = max(0, min(size, self.size - offset))
        known = offset - self._entry.checksums_offset
        if size and known >= 0 and known + size <= len(self._checksums):
            return self._checksums[known : known + size]  # the manifest has them
        out = bytearray(size)
        self.read_into(memoryview(out), offset, ahead=_AHEAD)
        return bytes(out)

    def prefetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch blocks that are read next, several at once.

        Args:
            spans: offset and size in bytes of each.
        """
        step = self._record.block
        numbers = {n for o, s in spans if s for n in range(o // step, -(-(o + s) // step))}
        left = [n for n in sorted(numbers) if self._cache.get(self._name, n) is None]
        self.together(self._fetch_to_cache, self._spans(left))

    def _fetch_to_cache(self, first: int, last: int) -> None:
        self._fetch(first, last, lambda n, data: self._cache.put(self._name, n, bytes(data)))

    def read_into(self, out: memoryview, offset: int, ahead: int = 0, alone: bool = False) -> None:
        """Fill memory with consecutive bytes.

        Args:
            out: the memory, of bytes.
            offset: of the first byte in the file.
            ahead: bytes that are fetched at least, and kept.
            alone: fetch one range after the other: the caller is one of several threads.

        Raises:
            StoreError: they cannot be read, or are not those that were pushed.
        """
        if not len(out):
            return
        step, stop = self._record.block, offset + len(out)
        last = -(-max(stop, min(self.size, offset + ahead)) // step)
        missing = []
        for number in range(offset // step, -(-stop // step)):
            data = self._cache.get(self._name, number)
            if data is None:
                missing.append(number)
            else:
                _copy(out, offset, data, number * step)
        if ahead and missing:
            missing += range(missing[-1] + 1, last)

        def use(number: int, data: bytes | memoryview) -> None:
            begin = number * step
            _copy(out, offset, data, begin)
            if ahead or begin < offset or begin + len(data) > stop:
                self._cache.put(self._name, number, bytes(data))

        def fetch(first: int, end: int) -> None:
            self._fetch(first, end, use)

        spans = self._spans(missing)
        if alone or len(missing) == 1:
            for span in spans:
                fetch(*span)
        else:
            self.together(fetch, spans)

    def together(self, work: Callable[[int, int], None], spans: Iterable[tuple[int, int]]) -> None:
        """Call a function for each span in threads.

        Args:
            work: what is called with the first and the end of each span.
            spans: the spans.
        """
        each = list(spans)
        if len(each) == 1:
            work(*each[0])
            return
        running = [_pool(os.getpid()).submit(work, *span) for span in each]
        try:
            for one in running:
                one.result()
        finally:
            for one in running:
                one.cancel()

    def _spans(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs of consecutive blocks, each short enough for a request: the first, and the end."""
        evenly = -(-len(numbers) // REQUESTS)
        most = max(1, min(SPAN, max(LEAST_SPAN, evenly * self.block)) // self.block)
        begin = 0
        for at in range(1, len(numbers) + 1):
            ended = at == len(numbers) or numbers[at] != numbers[at - 1] + 1
            if ended or at - begin == most:
                yield numbers[begin], numbers[at - 1] + 1
                begin = at

    def _fetch(self, first: int, end: int, use: Callable[[int, bytes | memoryview], None]) -> None:
        """Fetch consecutive blocks in one request, and hand on each that has its hash. After a
        fault the request begins at the block that is missing.
        """
        step, number = self._record.block, first

        def request() -> None:
            nonlocal number
            stop = min(end * step, self.size)
            for block in self._store.chunks(self.url, number * step, stop, step):
                self._check(number, block)
                use(number, block)
                number += 1

        wrong: _WrongBlockError | None = None
        while number < end:
            try:
                faults.retried(self.url, "read", request)
            except FileNotFoundError:
                raise StoreError(f"{self.url}: is missing; push the file again") from None
            except _WrongBlockError as error:
                if wrong is not None and wrong.number == error.number:
                    raise StoreError(str(error)) from None
                wrong = error  # the network may have changed it: once more

    def _check(self, number: int, block: bytes | memoryview) -> None:
        if not self._record.is_block(number, block):
            begin = number * self._record.block
            raise _WrongBlockError(
                number,
                f"{self.url}: bytes {begin} to {begin + len(block)} are not those that were "
                f"pushed: {_ADVICE}",
            )

    def rows(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> "RemoteRows":
        """Consecutive rows of the file, as an array that is read when it is indexed.

        Args:
            offset: of the first row, in bytes.
            shape: (rows, …).
            dtype: of the elements.

        Returns:
            The rows; nothing is read yet.

        Raises:
            StoreError: the file is shorter.
        """
        if offset + math.prod(shape) * dtype.itemsize > self.size:
            raise StoreError(f"{self.url}: is shorter than its rows; {_ADVICE}")
        return RemoteRows(self, offset, shape, dtype)


def _copy(out: memoryview, offset: int, data: bytes | memoryview, begin: int) -> None:
    """Copy what a block has of the bytes that are read; `begin` is its place in the file."""
    start, stop = max(begin, offset), min(begin + len(data), offset + len(out))
    if start < stop:
        out[start - offset : stop - offset] = data[start - begin : stop - begin]


class RemoteRows:
    """Rows of a remote file: `rows[a:b]` fetches them in large ranges, `rows[array]` those alone.

    Args:
        file: that has them.
        offset: of the first row, in bytes.
        shape: (rows, …).
        dtype: of the elements.
    """

    def __init__(
        self, file: RemoteFile, offset: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        self._file, self._offset, self.shape, self._dtype = file, offset, shape, dtype
        self._row = math.prod(shape[1:]) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: "slice | np.ndarray") -> np.ndarray:
        if not isinstance(index, slice):
            return self._gathered(index)
        start, stop, step = index.indices(len(self))
        if step != 1:
            return self._gathered(np.arange(start, stop, step))
        out = np.empty((max(0, stop - start), *self.shape[1:]), self._dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill an array with consecutive rows.

        Args:
            out: (rows, …), contiguous in memory or not.
            start: the first row.
        """
        if not out.flags.c_contiguous:
            out[:] = self[start : start + len(out)]
            return
        self._file.read_into(_bytes_of(out), self._offset + start * self._row)

    def _gathered(self, wanted: np.ndarray) -> np.ndarray:
        """Rows in any order: those that are near to each other are fetched together."""
        out = np.empty((len(wanted), *self.shape[1:]), self._dtype)
        if not out.size:
            return out
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        far = np.diff(ascending) * self._row > self._file.block
        piece = (ascending - ascending[0]) * self._row // SPAN
        ends = np.flatnonzero(far | (np.diff(piece) > 0)) + 1

        def fetch(begin: int, end: int) -> None:
            first, rows = int(ascending[begin]), ascending[begin:end]
            held = np.empty((int(rows[-1]) - first + 1, *self.shape[1:]), self._dtype)
            self._file.read_into(_bytes_of(held), self._offset + first * self._row, alone=True)
            out[order[begin:end]] = held[rows - first]

        begins = [0, *ends.tolist()]
        self._file.together(fetch, zip(begins, [*begins[1:], len(wanted)], strict=True))
        return out


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view("u1").data if array.size else memoryview(b"")
