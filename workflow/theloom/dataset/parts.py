"""The files that hold a dataset's rows; each is checked before it is read.

HDF5 reads a source that is missing, cut short, or one file descriptor too many, as fill values. So
nothing here is read through HDF5's virtual datasets: the merged file lists the offsets of each
shard's rows, and they are mapped. A file that is opened again, for its rows or by another process,
must be the one that was opened first: `Identity` has what tells.
"""

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from theloom.errors import StoreError, printable
from theloom.precision import SCALED
from theloom.store import checksums, commit_log, file_format
from theloom.store.hdf5 import byte_source, content, element_types
from theloom.store.hdf5.byte_source import ByteSource, Readable
from theloom.store.hdf5.objects import Link, Objects
from theloom.store.index import FileIndex
from theloom.store.tables import tokens as token_tables

TOKENS = ("tokens/input_ids", "tokens/document", "tokens/position")
REMOVED = "removed.json"  # next to a merged file whose shards are elsewhere alone
_ADVICE = "run the pipeline again, or fetch the file again"


@dataclass(frozen=True)
class Identity:
    """A file, its size in bytes, and its checksums with the byte at which they begin: they cover
    all of it, the rows by their hashes.
    """

    path: Path
    size: int
    checksums: bytes
    checksums_offset: int

    @classmethod
    def of(cls, fd: Readable, listed: FileIndex) -> "Identity":
        """The identity of an open file.

        Args:
            fd: of the file, open for reading.
            listed: its index.

        Returns:
            The identity; no row is read.
        """
        written = listed.array(fd, checksums.CHECKSUMS)[: checksums.IDENTITY].tobytes()
        offset = listed.datasets[checksums.CHECKSUMS].extents[0][0]
        return cls(listed.path, byte_source.size_of(fd), written, offset)

    def open(self, referred: Path | None = None) -> BinaryIO | ByteSource:
        """Open the file again.

        Args:
            referred: the file that refers to it; None: it was opened before.

        Returns:
            The file, open for reading bytes; the caller closes it.

        Raises:
            StoreError: it is missing, cannot be opened, or is another one by now.
        """
        whose = "when it was opened" if referred is None else "at the merge"
        try:
            file = file_format.open_bytes(self.path)
        except StoreError:
            if self.path.is_file():
                raise
            if referred is not None and (url := removed_to(referred)):
                raise StoreError(
                    f"{referred} refers to {self.path}, which was removed once it was pushed; "
                    f"open {url}, or copy it back from there"
                ) from None
            missing = "is not a file" if self.path.exists() else "is missing"
            raise StoreError(
                (
                    f"{self.path}: "
                    if referred is None
                    else f"{referred} refers to {self.path}, which "
                )
                + f"{missing}; put it back, or run the pipeline again"
            ) from None
        source = byte_source.of(file)
        size = byte_source.size_of(source)
        found = byte_source.pread(source, len(self.checksums), self.checksums_offset)
        if size == self.size and found == self.checksums:
            return file
        file.__exit__(None, None, None)
        if size != self.size:
            raise StoreError(f"{self.path}: has {size} bytes, {self.size} {whose}; {_ADVICE}")
        if referred is None:
            raise StoreError(f"{self.path}: was replaced after it was opened; open it again")
        raise StoreError(
            f"{self.path}: is not the shard that {referred.name} was merged from; {_ADVICE}"
        )


def removed_to(merged: Path) -> str | None:
    """Find where the shards of a merged file are that the pipeline has removed.

    Args:
        merged: the merged file.

    Returns:
        The URL of the run; None: nothing was removed.
    """
    if not isinstance(merged, Path):
        return None
    try:
        record = json.loads((merged.parent / REMOVED).read_text(encoding="utf-8"))
        return printable(str(record["url"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Part:
    """Consecutive rows in one file: how many, and the offset in bytes of each dataset; -1 where it
    is packed, in chunks. `tokens`: how many it has where not every token has a row.
    """

    file: Identity
    rows: int
    offsets: dict[str, int]
    tokens: int | None = None

    def count(self, name: str) -> int:
        """The entries of a dataset: tokens of a token table, else rows.

        Args:
            name: of a dataset in the file.

        Returns:
            Tokens for a table of tokens, else rows.
        """
        return self.tokens if self.tokens is not None and _of_tokens(name) else self.rows

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path


@dataclass(frozen=True)
class Source:
    """A shard that a virtual dataset refers to: its rows, its relative path, and what identifies
    it.
    """

    part: Part
    name: str
    fingerprint: str


def names_of(attributes: dict[str, Any]) -> list[str]:
    """Name the datasets of tokens and rows.

    Args:
        attributes: of a file.

    Returns:
        The token tables, then the hook points, then the scales of their rows where these have
        scales, as paths in the file.

    Examples:
        >>> names_of({"hooks": '["hook_embed"]'})[-1]
        'hooks/hook_embed/activations'
    """
    hooks = json.loads(attributes["hooks"])
    scales = hooks if attributes.get("precision") in SCALED else []
    return [
        *TOKENS,
        *map(file_format.hook_path, hooks),
        *map(file_format.scale_path, scales),
    ]


def is_scale(name: str) -> bool:
    """Whether a dataset has the scales of rows.

    Args:
        name: of the dataset in the file.

    Returns:
        False for rows and tables.

    Examples:
        >>> is_scale("hooks/hook_embed/activations_scale"), is_scale("tokens/position")
        (True, False)
    """
    return name.startswith("hooks/") and name.endswith("/activations_scale")


def numpy_type(name: str, precision: str) -> np.dtype:
    """NumPy's type of a dataset of `names_of`.

    Args:
        name: of the dataset in the file.
        precision: of the stored rows.

    Returns:
        `row_type` of a table of tokens, float32 of scales, `element_types.bits_dtype` of rows.
    """
    if _of_tokens(name):
        return row_type(name)
    return np.dtype("<f4") if is_scale(name) else element_types.bits_dtype(precision)


def more_tables(listed: FileIndex) -> list[str]:
    """Name the datasets that a file may have beside `names_of`, with an entry for each token. They
    lie in the file itself, in a virtual dataset too.

    Args:
        listed: the index of the file.

    Returns:
        Those that it has, as paths in the file.
    """
    return [name for name in map(token_tables.path, token_tables.TYPES) if name in listed.datasets]


def own(fd: Readable, listed: FileIndex, names: Sequence[str] | None = None) -> Part:
    """Find the part of a file that holds its own rows: a shard or a physical dataset.

    Args:
        fd: of the file, open for reading.
        listed: its index.
        names: of the datasets; None: all with a row for each token.

    Returns:
        The part, with the offset in bytes of each dataset.

    Raises:
        StoreError: the file is cut short or not finished, or its layout is another one.
    """
    path, attributes = listed.path, listed.attributes
    part = Part(Identity.of(fd, listed), int(attributes["rows"]), {}, attributes.get("tokens"))
    offsets, size = part.offsets, byte_source.size_of(fd)
    for name in [*names_of(attributes), *more_tables(listed)] if names is None else names:
        dataset, rows = listed.datasets[name], part.count(name)
        if dataset.shape[0] != rows:
            raise StoreError(
                f"{path}: its {name} has {dataset.shape[0]} rows instead of {rows}; {_ADVICE}"
            )
        needed = rows * _row_bytes(name, dataset.shape, attributes["precision"])
        if dataset.layout == content.CHUNKED and attributes.get("compression") == "zstd":
            offsets[name] = -1
        elif dataset.layout == content.CONTIGUOUS and (dataset.extents or not needed):
            offsets[name] = dataset.extents[0][0] if dataset.extents else 0
        else:
            raise StoreError(
                f"{path}: its {name} has not the layout that TheLoom writes; {_ADVICE}"
            )
        end = dataset.end if offsets[name] < 0 else offsets[name] + needed
        if size < end:
            raise StoreError(f"{path}: is cut short at {size} of {end} bytes; {_ADVICE}")
    if "commit_log" in listed.datasets:
        log = listed.array(fd, "commit_log")
        done = commit_log.committed(log)
        if done != len(log):
            raise StoreError(
                f"{path}: only {done} of its {len(log)} batches are committed; {_ADVICE}"
            )
    return part


def referred(fd: Readable, listed: FileIndex, allow: Collection[str]) -> list[Part]:
    """Find the parts of a virtual dataset: its shards.

    Args:
        fd: of the virtual dataset, open for reading.
        listed: its index.
        allow: names of shards outside of its folder that it may refer to, as it spells them.

    Returns:
        The parts in the order of their rows.

    Raises:
        StoreError: a shard is missing, differs in size or checksums from the one that was merged,
            or is outside of the folder and not allowed.
    """
    path, names = listed.path, names_of(listed.attributes)
    tokens = "tokens" if "tokens" in listed.attributes else "rows"
    columns = ("file", "rows", tokens, "bytes", "checksums_offset")
    table = [listed.array(fd, f"sources/{column}").tolist() for column in columns]
    checksum = listed.array(fd, "sources/checksums")
    offset = listed.array(fd, "sources/byte_offset")
    if checksum.shape[1:] != (checksums.IDENTITY,) or offset.shape[1:] != (len(names),):
        raise ValueError("its table of sources is damaged")
    precision, shapes = listed.attributes["precision"], [listed.datasets[n].shape for n in names]
    items = [_row_bytes(name, shape, precision) for name, shape in zip(names, shapes, strict=True)]
    numbers = [n for column in table[1:] for n in column]
    if min(numbers, default=0) < 0 or max(numbers, default=0) * max(items) >= 1 << 62:
        raise ValueError("its table of sources is damaged")
    counts = np.array([table[2 if _of_tokens(name) else 1] for name in names], "<i8").T
    ends = offset + counts.reshape(offset.shape) * np.array(items, "<i8")
    beyond = (offset < -1) | ((offset >= 0) & (ends > np.array(table[3], "<i8")[:, None]))
    wrong = (beyond | (offset >= 1 << 62)).any(axis=1)
    parts = []
    for number, entry in enumerate(zip(*table, strict=True)):
        encoded, rows, of_tokens, size, checksums_offset = entry
        name = encoded.decode()
        check_reference(path, name, allow, "it refers to")
        identity = Identity(path.parent / name, size, checksum[number].tobytes(), checksums_offset)
        with identity.open(path):
            pass
        if wrong[number]:
            raise StoreError(
                f"{path}: refers to bytes that {identity.path} does not have; {_ADVICE}"
            )
        offsets = dict(zip(names, offset[number].tolist(), strict=True))
        parts.append(Part(identity, rows, offsets, of_tokens if tokens == "tokens" else None))
    return parts


def _row_bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    """Bytes of a row of a token table, of a hook point or of its scales."""
    return math.prod(shape[1:]) * numpy_type(name, precision).itemsize


def _of_tokens(name: str) -> bool:
    return name.startswith("tokens/")


def row_type(name: str) -> np.dtype:
    """NumPy's type of a token table.

    Args:
        name: of the dataset in the file.

    Returns:
        That of `store.tables.tokens`, else little-endian int32.

    Examples:
        >>> row_type("tokens/input_ids")
        dtype('int32')
    """
    return np.dtype(token_tables.TYPES.get(name.partition("/")[2], "<i4"))


def write_sources(file: h5py.File, shards: Sequence[Source], names: Sequence[str]) -> None:
    """Write the table of sources, which `referred` reads.

    Args:
        file: the open virtual dataset.
        shards: what it refers to.
        names: of the datasets of tokens and rows, from `names_of`.
    """
    file["sources/file"] = file_format.fixed_strings([s.name for s in shards])
    files = [s.part.file for s in shards]
    if any(s.part.tokens is not None for s in shards):
        file["sources/tokens"] = [s.part.count("tokens/") for s in shards]
    file["sources/rows"] = [s.part.rows for s in shards]
    file["sources/bytes"] = [f.size for f in files]
    file["sources/shard_fingerprint"] = file_format.fixed_strings([s.fingerprint for s in shards])
    file["sources/checksums"] = np.array([np.frombuffer(f.checksums, "<u8") for f in files])
    file["sources/checksums_offset"] = [f.checksums_offset for f in files]
    file["sources/byte_offset"] = np.array(
        [[s.part.offsets[n] for n in names] for s in shards], "<i8"
    )


def check_references(file: Objects, path: Path, allow: Collection[str] = ()) -> None:
    """Check where every link and every dataset of a file leads, since the file may be untrusted.

    Args:
        file: the open file.
        path: of it.
        allow: names outside of its folder that it may refer to, as it spells them.

    Raises:
        StoreError: something refers to the file itself, or to one outside of the folder that is not
            allowed, or is a soft link.
    """
    checked: set[str] = set()
    for name, found in file.walk():
        if not isinstance(found, Link):
            for stored in content.external_files(file, found):
                check_reference(path, stored, allow, f"its {name} is stored in")
            for source in content.virtual_files(file, found):
                if source not in checked:  # every dataset refers to each of the shards
                    check_reference(path, source, allow, f"its {name} refers to")
                    checked.add(source)
        elif found.kind == "external":
            check_reference(path, found.target, allow, f"its {name} is a link to")
        else:
            raise StoreError(
                f"{path}: its {name} is a soft link, which no file of TheLoom has; "
                "do not use this file"
            )


def check_reference(path: Path, source: str, allow: Collection[str], what: str) -> None:
    """Check that a name in a file leads to a file in its folder, or is allowed.

    Args:
        path: the file.
        source: the name in it.
        allow: names that are allowed.
        what: the beginning of the message: what refers to the name.

    Raises:
        StoreError: the name leads elsewhere.
    """
    if source in allow:
        return
    if source == "." or path.name == os.path.normpath(source):
        raise StoreError(f"{path}: {what} the file itself; do not use this file")
    if Path(source).is_absolute() or os.path.normpath(source).startswith(".."):
        raise StoreError(
            f"{path}: {what} {source}, which is outside of its folder; if you trust it: "
            f"theloom.open(..., allow=[{source!r}])"
        )
