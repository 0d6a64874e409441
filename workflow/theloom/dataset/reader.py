"""The rows of a run's hidden states, mapped from the files where they lie.

`ActivationsReader` is what exports, batches and token texts work on;
`theloom.dataset.activations.Activations` adds these to it as methods.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from theloom.dataset import parts
from theloom.dataset.parts import Part
from theloom.dataset.rows import HookRows, Maps, RowNumbers, Rows
from theloom.errors import HookError, StoreError
from theloom.store import checksums, file_format, index
from theloom.store.file_format import METRICS, hook_path
from theloom.store.statistics import Statistics, read_statistics

if TYPE_CHECKING:
    import torch


# names that batches accept next to hook points: tables with a row for each token
TABLES = {
    "input_ids": "tokens/input_ids",
    "document": "tokens/document",
    "position": "tokens/position",
}


@dataclass(frozen=True)
class DocumentRows:
    """One document: its id, its rows in the dataset, its tokens, and by hook point its hidden
    states.
    """

    id: str
    rows: slice
    input_ids: np.ndarray
    position: np.ndarray
    activations: "ActivationsReader"

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def __getitem__(self, hook: str) -> "torch.Tensor":
        return self.activations[hook][self.rows]


class ActivationsReader:
    """The hidden states of a run. Row r of every hook point, and of the token tables, is the same
    token.

    `hooks`: names of the hook points; `dtype`: the stored one; `len`: rows; `attributes`: where the
    rows come from.

    Args:
        path: `activations.h5`, or a single shard.
        allow: names of files outside of its own folder that it may refer to, as it spells them.

    Raises:
        StoreError: a file is missing, cut short, damaged or of another run.
    """

    def __init__(self, path: str | Path, allow: Collection[str] = ()) -> None:
        self.path = Path(path)
        if self.path.is_symlink():  # its shards lie next to the file itself
            self.path = self.path.resolve()
        self._maps = Maps()
        with file_format.open_h5(self.path, "activations") as file:
            parts.check_references(file, self.path, allow)
            listed = index.read(file)
            self.attributes = listed.attributes
            self.hooks: list[str] = json.loads(self.attributes["hooks"])
            self.precision: str = self.attributes["precision"]
            self._names = parts.names_of(self.attributes)
            self._widths = {name: file[name].shape[1:] for name in self._names}
            self.is_virtual = "sources" in file
            with self.path.open("rb") as f:
                if checksums.CHECKSUMS not in listed.datasets or checksums.changed_parts(
                    f.fileno(), listed, checksums.METADATA
                ):
                    raise StoreError(
                        f"{self.path}: its metadata is not as it was written: a program or the "
                        "disk has changed it; run the pipeline again, or fetch the file again"
                    )
                own = [] if self.is_virtual else [parts.own(f.fileno(), listed)]
            self._parts: list[Part] = own or parts.referred(file, self.path, allow)
            self._document_offset = file["documents/offset"][:]
            self._document_id = file["documents/id"][:]
            self.window_offset: np.ndarray = file["windows/offset"][:]
            self.window_document: np.ndarray = file["windows/document"][:]
            self.window_hash: np.ndarray = file["windows/hash"][:]
            self.metrics: dict[str, float] = dict(
                zip(METRICS, file["metrics"][:].tolist(), strict=True)
            )
        if sum(p.rows for p in self._parts) != self.attributes["rows"]:
            raise StoreError(
                f"{self.path}: its parts hold other rows than it states; run the merge again"
            )
        for offset in (self._document_offset, self.window_offset):
            if offset[0] or offset[-1] != len(self) or (np.diff(offset) < 0).any():
                raise StoreError(
                    f"{self.path}: its tables of documents and windows are damaged; "
                    "run the merge again"
                )
        parts.allow_open_files(
            len(self._parts), f"{len(self._parts)} shards"
        )  # each stays open while its rows are mapped

    def __len__(self) -> int:
        return int(self.attributes["rows"])

    def __contains__(self, hook: object) -> bool:
        return hook in self.hooks

    def __getitem__(self, hook: str) -> HookRows:
        if hook not in self.hooks:
            raise HookError(
                f"no hook point {hook!r} in {self.path}; it has {', '.join(self.hooks)}"
            )
        name = hook_path(hook)
        return HookRows(self._parts, self._maps, name, self._widths[name], self.precision)

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

    @property
    def files(self) -> list[Path]:
        """The files that hold the rows: the shards of a virtual dataset, else this file itself."""
        return [p.path for p in self._parts]

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """By hook point: count, mean and variance of each element of a row; the mean norm; the
        number of NaN and infinite values.
        """
        with h5py.File(self.path, "r") as file:
            return dict(
                zip(
                    self.hooks, read_statistics(lambda name: file[name][:], self.hooks), strict=True
                )
            )

    def rows_of(self, name: str) -> Rows:
        """The rows of one column.

        Args:
            name: a hook point, or `input_ids`, `document`, `position` or `row` (the number of the
                row in the dataset).

        Raises:
            HookError: the dataset has no hook point of this name.
        """
        if name == "row":
            return RowNumbers(len(self))
        return self._table(TABLES[name]) if name in TABLES else self[name]

    def _table(self, name: str) -> Rows:
        return Rows(self._parts, self._maps, name, (), np.dtype("<i4"))

    @property
    def documents(self) -> list[str]:
        """The ids of the documents, in the order of their rows."""
        return [d.decode() for d in self._document_id]

    @property
    def document_offset(self) -> np.ndarray:
        """The first row of each document, then the number of rows: (documents + 1,) int64."""
        return self._document_offset

    def document(self, which: int | str) -> DocumentRows:
        """One document.

        Args:
            which: its number (negative ones count from the end), or its id.

        Raises:
            IndexError: no document has this number.
            KeyError: no document has this id.
        """
        if isinstance(which, str):
            number = next(iter(np.flatnonzero(self._document_id == which.encode())), None)
            if number is None:
                raise KeyError(f"no document {which!r} in {self.path}; acts.documents lists them")
            which = int(number)
        count = len(self._document_id)
        if not -count <= which < count:
            raise IndexError(f"no document {which} in {self.path}; it has {count}, from 0")
        which %= count
        rows = slice(int(self._document_offset[which]), int(self._document_offset[which + 1]))
        return DocumentRows(
            id=self._document_id[which].decode(),
            rows=rows,
            input_ids=self.input_ids.numpy(rows),
            position=self.position.numpy(rows),
            activations=self,
        )
