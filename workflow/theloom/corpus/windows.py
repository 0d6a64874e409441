"""Which tokens are which document's, window's and shard's: tables that follow from lengths alone.

They are made and written piece by piece, so that memory does not grow with the documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import h5py
import numpy as np

from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.store.hdf5.pieces import write_array

_PIECE = 1 << 18  # tokens whose tables are written together
_OFFSETS = 1 << 16  # documents among which shards are cut at once


def write_tables(
    file: h5py.File,
    ids: Strings,
    hashes: Strings,
    tokens: Numbers,
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
    count, total = len(tokens), tokens.total
    windows = sum(len(_split(part, context)[0]) for part in _together(tokens))
    parts = partial(_together, tokens)
    of_tokens, of_all = np.dtype("<i4"), np.dtype("<i8")
    write_array(file, "tokens/document", total, of_tokens, _numbers(parts()))
    write_array(file, "tokens/position", total, of_tokens, _positions(parts(), context))
    offsets = _running(part.tokens for part in parts())
    write_array(file, "documents/offset", count + 1, of_all, offsets)
    for name, strings in (("id", ids), ("text_hash", hashes)):
        write_array(file, f"documents/{name}", len(strings), strings.dtype, strings.pieces())
    offsets = _running(_split(part, context)[0] for part in parts())
    write_array(file, "windows/offset", windows + 1, of_all, offsets)
    documents = (_split(part, context)[1] for part in parts())
    write_array(file, "windows/document", windows, of_tokens, documents)
    file["shards/first_document"] = plan_shards(file["documents/offset"], shards)


@dataclass(frozen=True)
class _Part:
    """Documents whose tables are written together. `first`: the number of the first. `tokens`: of
    each, (documents,) int64.
    """

    first: int
    tokens: np.ndarray


def _together(tokens: Numbers) -> Iterator[_Part]:
    """All documents, in parts of so many tokens that memory holds their tables."""
    first = 0
    for lengths in tokens.pieces():
        groups = np.cumsum(lengths) // _PIECE
        for part in np.split(lengths, np.flatnonzero(np.diff(groups)) + 1):
            yield _Part(first, part)
            first += len(part)


def _split(part: _Part, context: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a part, as of `split_windows`."""
    lengths, document = split_windows(part.tokens, context)
    return lengths, document + np.int32(part.first)


def _running(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The first of each, then how many there are, array after array."""
    yield np.zeros(1, "<i8")
    total = 0
    for piece in pieces:
        yield np.cumsum(piece) + total
        total += int(piece.sum())


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """The first of each, then how many there are."""
    offsets = np.zeros(len(lengths) + 1, "<i8")
    np.cumsum(lengths, out=offsets[1:])
    return offsets


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


def _numbers(parts: Iterator[_Part]) -> Iterator[np.ndarray]:
    """The number of each token's document, array after array."""
    for part in parts:
        for _, _, first, counts in _within(_offsets(part.tokens)):
            first += part.first
            yield np.repeat(np.arange(first, first + len(counts), dtype="<i4"), counts)


def _positions(parts: Iterator[_Part], context: int) -> Iterator[np.ndarray]:
    """The position of each token in its window, array after array."""
    for part in parts:
        yield from positions(_offsets(_split(part, context)[0]))


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


def plan_shards(offsets: Any, shards: int) -> np.ndarray:
    """Divide documents among shards, as equally in tokens as whole documents allow.

    Args:
        offsets: first token of each document, then the number of tokens, (documents + 1,): an
            array, or a dataset, of which a piece is read at a time.
        shards: how many; with fewer documents some are empty.

    Returns:
        First document of each shard, then the number of documents, (shards + 1,) int64.

    Examples:
        >>> plan_shards(np.array([0, 10, 20, 40]), 2).tolist()
        [0, 2, 3]
    """
    last = len(offsets) - 1
    total = offsets[last]
    targets = np.arange(1, shards) * (total / shards)
    cuts = [np.zeros(1, "<i8")]
    for first in range(0, last, _OFFSETS):
        stop = min(first + _OFFSETS, last)
        piece = offsets[first : stop + 1]
        begin, end = np.searchsorted(targets, [piece[0], piece[-1]], "right")
        here = targets[begin : None if stop == last else end]
        after = np.clip(np.searchsorted(piece, here), 1, len(piece) - 1)
        nearer = here - piece[after - 1] <= piece[after] - here
        cuts.append(first + np.where(nearer, after - 1, after))
    return np.concatenate([*cuts, [last]]).astype("<i8")
