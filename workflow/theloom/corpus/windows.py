"""Which tokens are which document's, window's and shard's: tables that follow from lengths alone.

They are written piece by piece, so that memory grows with the number of documents, by some tens of
bytes each, and not with their tokens.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import IO

import h5py
import numpy as np
import xxhash

_PIECE = 1 << 18  # tokens whose tables are written together
_TEXTS = 1 << 13  # texts that are written together
_SPOOLED = 1 << 20  # bytes of texts that are written to a temporary file together
_END = 8  # bytes of where a text ends


class _Spool:
    """Bytes that only grow. Those that memory shall not hold are in a temporary file, which goes
    with the process.
    """

    def __init__(self) -> None:
        self._waiting, self._size = bytearray(), 0
        self._file: IO[bytes] | None = None

    def add(self, data: bytes) -> None:
        self._waiting += data
        self._size += len(data)
        if len(self._waiting) >= _SPOOLED:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this
            self._file.seek(0, os.SEEK_END)
            self._file.write(self._waiting)
            self._waiting.clear()

    def __len__(self) -> int:
        return self._size

    def read(self, start: int, stop: int) -> bytes:
        kept = self._size - len(self._waiting)
        found = b""
        if self._file is not None and start < kept:
            self._file.seek(start)
            found = self._file.read(min(stop, kept) - start)
        return found + bytes(self._waiting[max(0, start - kept) : max(0, stop - kept)])

    def pieces(self) -> Iterator[bytes]:
        for start in range(0, self._size, _SPOOLED):
            yield self.read(start, min(start + _SPOOLED, self._size))


class Strings:
    """Texts one after the other. Beyond a megabyte they are in a temporary file: a corpus has
    as many as documents.

    Examples:
        >>> strings = Strings()
        >>> strings.append("é")
        >>> len(strings), strings.dtype.str
        (1, '|S2')
    """

    def __init__(self) -> None:
        self._bytes, self._ends, self._longest = _Spool(), _Spool(), 1

    def append(self, text: str) -> None:
        """Take another text.

        Args:
            text: the text.
        """
        encoded = text.encode()
        self._bytes.add(encoded)
        self._ends.add(len(self._bytes).to_bytes(_END, "little"))
        self._longest = max(self._longest, len(encoded))

    def extend(self, texts: bytes, ends: np.ndarray) -> None:
        """Take other texts.

        Args:
            texts: all of them, in UTF-8.
            ends: the byte after each, (texts,) of int64.
        """
        if len(ends):
            longest = int(np.diff(ends, prepend=0).max())
            self._ends.add((ends + len(self._bytes)).astype("<i8").tobytes())
            self._bytes.add(bytes(texts))
            self._longest = max(self._longest, longest)

    def write(self, file: h5py.File, name: str) -> None:
        """Write the texts as `extend` takes them.

        Args:
            file: the open file.
            name: of the dataset with all their bytes, in UTF-8; that of the byte after each text,
                int64, is called so too, with `_end`.
        """
        for spool, dtype, path in (
            (self._bytes, np.dtype("u1"), name),
            (self._ends, np.dtype("<i8"), f"{name}_end"),
        ):
            arrays = (np.frombuffer(piece, dtype) for piece in spool.pieces())
            _write(file, path, (len(spool) // dtype.itemsize,), dtype, arrays)

    def __len__(self) -> int:
        return len(self._ends) // _END

    @property
    def dtype(self) -> np.dtype:
        """Of an array that holds them all."""
        return np.dtype(f"S{self._longest}")

    def pieces(self) -> Iterator[np.ndarray]:
        """Give all texts, array after array.

        Yields:
            Arrays (texts,) of `dtype`, in UTF-8.
        """
        begin = 0
        for first in range(0, len(self), _TEXTS):
            stop = min(first + _TEXTS, len(self))
            ends = np.frombuffer(self._ends.read(_END * first, _END * stop), "<i8").tolist()
            block = self._bytes.read(begin, ends[-1])
            at = [0, *(end - begin for end in ends)]
            yield np.array([block[a:b] for a, b in pairwise(at)], self.dtype)
            begin = ends[-1]

    def digest(self) -> str:
        """Hash all texts, one after the other.

        Returns:
            XXH3-128 in hexadecimal.
        """
        state = xxhash.xxh3_128()
        for piece in self._bytes.pieces():
            state.update(piece)
        return state.hexdigest()


def write_tables(
    file: h5py.File,
    ids: Strings,
    hashes: Strings,
    tokens: Sequence[int],
    context: int,
    shards: int,
) -> None:
    """Write which tokens are which document's, window's and shard's.

    Args:
        file: the open file.
        ids: of the documents.
        hashes: of their texts.
        tokens: of each of them.
        context: tokens of the longest window; 0: no limit.
        shards: how many.
    """
    lengths = np.asarray(tokens, "<i8")
    offsets = _offsets(lengths)
    split, window_document = split_windows(lengths, context)
    windows = _offsets(split)
    total = int(offsets[-1])
    _write(file, "tokens/document", (total,), np.dtype("<i4"), _numbers(offsets))
    _write(file, "tokens/position", (total,), np.dtype("<i4"), positions(windows))
    file["documents/offset"] = offsets
    for name, strings in (("id", ids), ("text_hash", hashes)):
        _write(file, f"documents/{name}", (len(strings),), strings.dtype, strings.pieces())
    file["windows/offset"] = windows
    file["windows/document"] = window_document
    file["shards/first_document"] = plan_shards(offsets, shards)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """The first of each, then how many there are."""
    offsets = np.zeros(len(lengths) + 1, "<i8")
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _write(
    file: h5py.File,
    name: str,
    shape: tuple[int],
    dtype: np.dtype,
    pieces: Iterator[np.ndarray],
) -> None:
    dataset, at = file.create_dataset(name, shape, dtype), 0
    for piece in pieces:
        dataset[at : at + len(piece)] = piece
        at += len(piece)


def _within(offsets: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Ranges of tokens: the first token, the one after the last, the number of the document or
    window that the first is in, and how many tokens of it and of the next ones are there.
    """
    total = int(offsets[-1])
    for start in range(0, total, _PIECE):
        stop = min(start + _PIECE, total)
        first = int(np.searchsorted(offsets, start, "right")) - 1
        last = int(np.searchsorted(offsets, stop, "left"))
        yield start, stop, first, np.diff(np.clip(offsets[first : last + 1], start, stop))


def _numbers(offsets: np.ndarray) -> Iterator[np.ndarray]:
    """The number of each token's document, array after array."""
    for _, _, first, counts in _within(offsets):
        yield np.repeat(np.arange(first, first + len(counts), dtype="<i4"), counts)


def positions(windows: np.ndarray) -> Iterator[np.ndarray]:
    """The position of each token in its window, which is what the model sees.

    Args:
        windows: first token of each window, then the number of tokens, (windows + 1,).

    Yields:
        The positions of all tokens, array after array, int32.

    Examples:
        >>> [piece.tolist() for piece in positions(np.array([0, 3, 4]))]
        [[0, 1, 2, 0]]
    """
    for start, stop, first, counts in _within(windows):
        begins = np.repeat(windows[first : first + len(counts)], counts)
        yield (np.arange(start, stop) - begins).astype("<i4")


def split_windows(lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Split documents into windows.

    Args:
        lengths: tokens of each document, (documents,).
        context: tokens of a window at most; 0: no limit.

    Returns:
        Tokens of each window, and the number of its document, (windows,) each.

    Examples:
        >>> lengths, document = split_windows(np.array([5, 2]), 4)
        >>> lengths.tolist(), document.tolist()
        ([4, 1, 2], [0, 0, 1])
    """
    if not context:
        return lengths, np.arange(len(lengths), dtype="<i4")
    counts = -(-lengths // context)
    document = np.repeat(np.arange(len(lengths), dtype="<i4"), counts)
    split = np.full(len(document), context, "<i8")
    split[np.cumsum(counts) - 1] = lengths - (counts - 1) * context
    return split, document


def plan_shards(offsets: np.ndarray, shards: int) -> np.ndarray:
    """Divide documents among shards, as equally in tokens as whole documents allow.

    Args:
        offsets: first token of each document, then the number of tokens, (documents + 1,).
        shards: how many; with fewer documents some are empty.

    Returns:
        First document of each shard, then the number of documents, (shards + 1,) int64.

    Examples:
        >>> plan_shards(np.array([0, 10, 20, 40]), 2).tolist()
        [0, 2, 3]
    """
    targets = np.arange(1, shards) * (offsets[-1] / shards)
    after = np.clip(np.searchsorted(offsets, targets), 1, len(offsets) - 1)
    nearer = targets - offsets[after - 1] <= offsets[after] - targets
    return np.concatenate([[0], np.where(nearer, after - 1, after), [len(offsets) - 1]]).astype(
        "<i8"
    )
