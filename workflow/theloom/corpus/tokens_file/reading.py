"""What the stages behind tokenize_corpus read of `tokens.h5`."""

import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom.corpus.batching import Lengths
from theloom.corpus.targets.sources import source_lengths
from theloom.store import file_format, token_texts
from theloom.store.shard_file import ShardTokens
from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables

_WINDOWS = 1 << 18  # windows whose lengths are read together
_NOT_IN_SHARDS = ("documents/text_hash", "shards/first_document")


def _shard(file: h5py.File, shard: int) -> ShardTokens:
    first, last = (int(d) for d in file["shards/first_document"][shard : shard + 2])
    document_offset = file["documents/offset"][first : last + 1]
    rows = slice(int(document_offset[0]), int(document_offset[-1]))
    windows = _range(file["windows/document"], first, last)
    window_offset = file["windows/offset"][windows.start : windows.stop + 1]
    input_ids = file["tokens/input_ids"][rows]
    more = {
        name: file[token_tables.path(name)][rows]
        for name in token_tables.TYPES
        if token_tables.path(name) in file
    }
    listed = json.loads(file.attrs.get("columns", "[]"))

    def of_shard(name: str) -> np.ndarray | None:
        if name not in file:
            return None
        whole = name.startswith(columns.NAMES)  # of categories
        values: np.ndarray = file[name][:] if whole else file[name][first:last]
        return values

    texts = token_texts.read(lambda name: file[name][:]) if token_texts.GROUP in file else {}
    first_row, row_token = rows.start, None
    if token_tables.ROW_TOKEN in file:
        of_all = file[token_tables.ROW_TOKEN]
        kept = _range(of_all, rows.start, rows.stop)
        first_row, row_token = kept.start, of_all[kept] - rows.start
    return ShardTokens(
        first_row=first_row,
        input_ids=input_ids,
        document=file["tokens/document"][rows],
        position=file["tokens/position"][rows],
        document_offset=document_offset - rows.start,
        document_id=file["documents/id"][first:last],
        window_offset=window_offset - rows.start,
        window_document=file["windows/document"][windows],
        texts={n: texts[n] for n in np.unique(input_ids).tolist() if n in texts},
        columns=columns.read(of_shard, listed, last - first),
        row_token=row_token,
        **more,
    )


def _range(ascending: h5py.Dataset, first: int, last: int) -> slice:
    """Where a sorted dataset has values from `first` on, and below `last`: it is not read whole."""
    return slice(bisect_left(ascending, first), bisect_left(ascending, last))


def _longest(file: h5py.File) -> int:
    """Tokens of the longest window; 1 at least."""
    offsets, longest = file["windows/offset"], 1
    for start in range(0, len(offsets) - 1, _WINDOWS):
        piece = np.diff(offsets[start : start + _WINDOWS + 1])
        longest = max(longest, int(piece.max()))
    return longest


@dataclass(frozen=True)
class JobTokens:
    """What an extraction job needs of `tokens.h5`."""

    attributes: dict[str, Any]
    longest_window: int  # tokens, of the whole corpus
    shard: ShardTokens
    answered_by: str | None = None  # fingerprint of the model whose answers they hold


def read_job(path: Path, shard: int) -> JobTokens:
    """Read what an extraction job needs of `tokens.h5`, opening it once.

    Args:
        path: of `tokens.h5`.
        shard: number of the shard, from 0.

    Returns:
        The tokens of the shard, the attributes, and tokens of the run's longest window.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        longest = _longest(file)
        answered_by = file["answers"].attrs.get("model_fingerprint") if "answers" in file else None
        return JobTokens(_attributes(file), longest, _shard(file, shard), answered_by)


def window_lengths(path: Path) -> Lengths:
    """The lengths of all windows, shard by shard, by which passes are planned.

    Args:
        path: of `tokens.h5`.

    Returns:
        Lengths in tokens; of a decoder's window that of its source where it is longer.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        return Lengths.of(_lengths_of_shards(file))


def _part(file: h5py.File, entries: slice, name: str) -> np.ndarray | None:
    """Some entries of a dataset; None where there is none."""
    found: np.ndarray | None = file[name][entries] if name in file else None
    return found


def _lengths_of_shards(file: h5py.File) -> Iterator[np.ndarray]:
    """Tokens of each window by which passes are planned, shard by shard."""
    documents = file["shards/first_document"][:]
    windows = np.zeros(len(documents), "<i8")  # that are before each of these documents
    for start in range(0, len(file["windows/document"]), _WINDOWS):
        windows += np.searchsorted(file["windows/document"][start : start + _WINDOWS], documents)
    for (first, last), (start, stop) in zip(pairwise(documents), pairwise(windows), strict=True):
        lengths = np.diff(file["windows/offset"][start : stop + 1])
        sources = source_lengths(partial(_part, file, slice(first, last)))
        if sources is not None:
            of_window = file["windows/document"][start:stop] - first
            lengths = np.maximum(lengths, sources[of_window])
        yield lengths


@dataclass(frozen=True)
class Sizes:
    """How much a run stores: rows, tokens, windows, and the bytes of the tables of `tokens.h5` that
    go into its shards.
    """

    rows: int
    tokens: int
    windows: int
    tables: int


def sizes(path: Path) -> Sizes:
    """How much a run stores.

    Args:
        path: of `tokens.h5`.

    Returns:
        Rows, tokens and windows, and the bytes of what goes with the tokens into the shards.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        count, windows = len(file["tokens/input_ids"]), len(file["windows/document"])
        found: dict[str, int] = {}

        def add(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset) and name not in _NOT_IN_SHARDS:
                found[name] = item.size * item.dtype.itemsize

        file.visititems(add)
        return Sizes(int(file.attrs.get("rows", count)), count, windows, sum(found.values()))


def attributes(path: Path) -> dict[str, Any]:
    """The attributes of `tokens.h5`.

    Args:
        path: of `tokens.h5`.

    Returns:
        Plain Python values by name.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        return _attributes(file)


def _attributes(file: h5py.File) -> dict[str, Any]:
    return {
        name: value.item() if hasattr(value, "item") else value
        for name, value in file.attrs.items()
    }
