"""Reading a run's hidden states: `theloom.open("results/<run>/activations.h5")`.

Rows are mapped from the files where they lie, and come as torch tensors in their stored dtype. Before anything is read,
every file that the dataset refers to is checked, since HDF5 reads a missing one as zeros.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Union

import h5py
import numpy as np

from theloom import layout
from theloom.errors import ConfigError, HookError, StoreError
from theloom.shard import RECORD, committed, hook_path

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    import torch
    import xarray as xr

    from theloom.exports import Cache

Index = Union[int, slice, EllipsisType, Sequence[int], np.ndarray, "torch.Tensor"]


def open(path: str | Path) -> "Activations":  # noqa: A001
    """Open `activations.h5` or a single shard. Raises StoreError for what is missing, cut short or of another run."""
    return Activations(path)


@dataclass(frozen=True)
class _Part:
    """Consecutive rows in one file: where the file is, how many rows, and where each dataset's bytes begin."""

    path: Path
    rows: int
    places: dict[str, int]


class Rows:
    """The rows of one dataset, over all files that hold them. Indexing gives a copy.

    `rows[i]`, `rows[a:b:c]`, `rows[[3, 1, 2]]` (any order, repeats allowed), `rows[mask]`.
    """

    def __init__(self, parts: Sequence[_Part], name: str, width: tuple[int, ...], dtype: np.dtype) -> None:
        self._arrays = [_mapped(p, name, width, dtype) for p in parts if p.rows]
        self._starts = np.cumsum([0, *(len(a) for a in self._arrays)])
        self.shape = (int(self._starts[-1]), *width)
        self._dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(np.prod(self.shape)) * self._dtype.itemsize

    def numpy(self, index: Index) -> np.ndarray:
        """Rows as an array of the stored bits (`layout.bits_dtype`), or of token numbers."""
        if isinstance(index, EllipsisType):
            index = slice(None)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
            return self._gather(np.arange(start, stop, step))
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            return self._gather(np.array([index % len(self)]))[0]
        wanted = np.asarray(index)
        if wanted.dtype == bool:
            if wanted.shape != (len(self),):
                raise IndexError(f"a mask of shape {wanted.shape} for {len(self)} rows")
            wanted = wanted.nonzero()[0]
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        return self._gather(wanted.astype(np.int64) % max(1, len(self)))

    def _range(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self._dtype)
        for first, array in zip(self._starts, self._arrays, strict=False):
            a, b = max(start, int(first)), min(stop, int(first) + len(array))
            if a < b:
                out[a - start : b - start] = array[a - first : b - first]
        return out

    def _gather(self, wanted: np.ndarray) -> np.ndarray:
        out = np.empty((*wanted.shape, *self.shape[1:]), self._dtype)
        for first, array in zip(self._starts, self._arrays, strict=False):
            here = (wanted >= first) & (wanted < first + len(array))
            out[here] = array[wanted[here] - first]
        return out


def _mapped(part: _Part, name: str, width: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.memmap(part.path, dtype, "r", offset=part.places[name], shape=(part.rows, *width))


class HookRows(Rows):
    """The rows of one hook point: indexing gives torch tensors (rows, width) in the stored dtype."""

    def __init__(self, parts: Sequence[_Part], name: str, width: tuple[int, ...], precision: str) -> None:
        super().__init__(parts, name, width, layout.bits_dtype(precision))
        self._precision = precision

    def __getitem__(self, index: Index) -> "torch.Tensor":
        return layout.tensor_from_bits(self.numpy(index), self._precision)


@dataclass(frozen=True)
class DocumentRows:
    """One document: its id, its rows in the dataset, its tokens, and by hook point its hidden states."""

    id: str
    rows: slice
    input_ids: np.ndarray
    position: np.ndarray
    activations: "Activations"

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def __getitem__(self, hook: str) -> "torch.Tensor":
        return self.activations[hook][self.rows]


class Activations:
    """The hidden states of a run. Row r of every hook point, and of the token tables, is the same token.

    `hooks`: names of the hook points; `dtype`: the stored one; `len`: rows; `attributes`: where the file came from.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with layout.open_h5(self.path, "activations") as file:
            self.attributes = {k: v.item() if hasattr(v, "item") else v for k, v in file.attrs.items()}
            self.hooks: list[str] = json.loads(self.attributes["hooks"])
            self.precision: str = self.attributes["precision"]
            self._names = [
                "tokens/input_ids",
                "tokens/document",
                "tokens/position",
                *map(hook_path, self.hooks),
            ]
            self._widths = {name: file[name].shape[1:] for name in self._names}
            if "sources" in file:
                self._parts = _sources(file, self.path, self._names)
            else:
                self._parts = [_part(file, self.path, self._names)]
            self._document_offset = file["documents/offset"][:]
            self._document_id = file["documents/id"][:]
            self.window_offset: np.ndarray = file["windows/offset"][:]
            self.window_document: np.ndarray = file["windows/document"][:]
            self.window_hash: np.ndarray = file["windows/hash"][:]
        if sum(p.rows for p in self._parts) != self.attributes["rows"]:
            raise StoreError(f"{self.path}: its parts hold other rows than it says; run the merge again")

    def __len__(self) -> int:
        return int(self.attributes["rows"])

    def __repr__(self) -> str:
        from theloom import exports

        return exports.describe(self)

    def _repr_html_(self) -> str:
        from theloom import exports

        return exports.describe_html(self)

    def to_dataframe(self, of: str = "documents", rows: slice | None = None) -> "pd.DataFrame":
        """A table of the `documents`, or of the `tokens` (of some rows); `theloom.exports` has more."""
        from theloom import exports

        if of not in ("documents", "tokens"):
            raise ConfigError(f"to_dataframe({of!r}): give 'documents' or 'tokens'; hidden states: acts.to_xarray()")
        return exports.documents_frame(self) if of == "documents" else exports.tokens_frame(self, rows)

    def to_xarray(self, hooks: Sequence[str] | None = None, rows: slice | None = None) -> "xr.Dataset":
        """Hidden states with their tokens as coordinates: `exports.to_xarray`."""
        from theloom import exports

        return exports.to_xarray(self, hooks, rows)

    def to_datasets(self, hooks: Sequence[str] | None = None) -> "datasets.Dataset":
        """A `datasets.Dataset`, a row for each token: `exports.to_datasets`."""
        from theloom import exports

        return exports.to_datasets(self, hooks)

    def cache(self, document: int | str) -> "Cache":
        """One document's hidden states as TransformerLens shapes them: `exports.Cache`."""
        from theloom import exports

        return exports.Cache(self, document)

    def __contains__(self, hook: object) -> bool:
        return hook in self.hooks

    def __getitem__(self, hook: str) -> HookRows:
        if hook not in self.hooks:
            raise HookError(f"no hook point {hook!r} in {self.path}; it has {', '.join(self.hooks)}")
        name = hook_path(hook)
        return HookRows(self._parts, name, self._widths[name], self.precision)

    @property
    def dtype(self) -> "torch.dtype":
        from theloom.precision import torch_dtype

        return torch_dtype(self.precision)

    @cached_property
    def input_ids(self) -> Rows:
        """The token of each row; `input_ids.numpy(rows)`."""
        return self._table("tokens/input_ids")

    @cached_property
    def document_of(self) -> Rows:
        """The number of the document of each row."""
        return self._table("tokens/document")

    @cached_property
    def position(self) -> Rows:
        """The position of each row in its window: what the model saw."""
        return self._table("tokens/position")

    def _table(self, name: str) -> Rows:
        return Rows(self._parts, name, (), np.dtype("<i4"))

    @property
    def documents(self) -> list[str]:
        """The ids of the documents, in the order of their rows."""
        return [d.decode() for d in self._document_id]

    @property
    def document_offset(self) -> np.ndarray:
        """The first row of each document, and behind the last one the number of rows."""
        return self._document_offset

    def document(self, which: int | str) -> DocumentRows:
        """One document, by number or id."""
        if isinstance(which, str):
            number = next(iter(np.flatnonzero(self._document_id == which.encode())), None)
            if number is None:
                raise KeyError(f"no document {which!r} in {self.path}")
            which = int(number)
        count = len(self._document_id)
        if not -count <= which < count:
            raise IndexError(f"document {which} of {count}")
        which %= count
        rows = slice(int(self._document_offset[which]), int(self._document_offset[which + 1]))
        return DocumentRows(
            id=self._document_id[which].decode(),
            rows=rows,
            input_ids=self.input_ids.numpy(rows),
            position=self.position.numpy(rows),
            activations=self,
        )


def _part(file: h5py.File, path: Path, names: Sequence[str]) -> _Part:
    """A file that holds its own rows: a shard or a physical merge, checked for its length and its commit log."""
    places = {name: layout.byte_offset(file[name]) for name in names}
    end = max(places[n] + file[n].id.get_storage_size() for n in names)
    if path.stat().st_size < end:
        raise StoreError(f"{path}: is cut short at {path.stat().st_size} of {end} bytes; run the pipeline again")
    if "commit_log" in file and committed(file["commit_log"][:].astype(RECORD)) != len(file["commit_log"]):
        raise StoreError(f"{path}: is not finished; run the pipeline again")
    return _Part(path, int(file.attrs["rows"]), places)


def _sources(file: h5py.File, path: Path, names: Sequence[str]) -> list[_Part]:
    """The shards of a virtual dataset: each there, of the size and the identity that the merge saw."""
    parts = []
    table = [file[f"sources/{column}"][:].tolist() for column in ("file", "rows", "bytes", "identity")]
    for name, rows, size, identity in zip(*table, strict=True):
        shard = path.parent / name.decode()
        if not shard.is_file():
            raise StoreError(f"{path} refers to {shard}, which is missing; put it back, or run the pipeline again")
        if shard.stat().st_size != size:
            raise StoreError(f"{shard}: has {shard.stat().st_size} bytes, {size} at the merge; run the pipeline again")
        with layout.open_h5(shard, "activations") as source:
            if source.attrs["identity"] != identity.decode() or source.attrs["rows"] != rows:
                raise StoreError(f"{shard}: is not the shard that {path.name} was merged from; run the pipeline again")
            parts.append(_part(source, shard, names))
    return parts
