"""The rows of a run's hidden states, mapped from the files where they lie.

`ActivationsReader` is what exports, batches and token texts work on;
`theloom.dataset.activations.Activations` adds these to it as methods.
"""

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from theloom.dataset import parts
from theloom.dataset.attributes import Attributes
from theloom.dataset.maps import Maps
from theloom.dataset.parts import Identity, Part
from theloom.dataset.rows import HookRows, RowNumbers, Rows, ScaledRows
from theloom.dataset.tables import read_columns, read_metrics, read_row_tokens, read_tables
from theloom.errors import ConfigError, HookError, StoreError
from theloom.precision import SCALED, read_as
from theloom.remote.folder import find
from theloom.store import checksums, file_format, index, token_texts
from theloom.store.file_format import hook_path
from theloom.store.hdf5 import byte_source, content, element_types
from theloom.store.hdf5.objects import Objects
from theloom.store.statistics import Statistics, read_statistics
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column

if TYPE_CHECKING:
    import torch


_T = TypeVar("_T")

_TOGETHER = 1 << 16  # windows whose documents are looked up together

# names that batches accept next to hook points: tables with a row for each token
TABLES = {
    "input_ids": "tokens/input_ids",
    "document": "tokens/document",
    "position": "tokens/position",
}


def _attribute(of: object, name: str) -> object:
    return getattr(type(of), name, None)


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
    token. Where rows are pooled it is the last of the tokens that a row is made of.

    `hooks`: names of the hook points; `precision`, `dtype`: of the rows as they are read;
    `stored_as`: their precision in the file, `fp8_e4m3` and `int8` being read as FP32; `len`: rows;
    `attributes`: where the rows come from; `metrics_checked`: whether `theloom verify` checks the
    metrics, too.

    Args:
        path: `activations.h5`, or a single shard; or the URL of a pushed one.
        allow: names of files outside of its own folder that it may refer to, as it spells them.

    Raises:
        StoreError: a file is missing, cut short, damaged or of another run.
    """

    def __init__(self, path: str | Path, allow: Collection[str] = ()) -> None:
        self.path: Path = find(path)
        # its shards lie next to the file itself
        if isinstance(self.path, Path) and self.path.is_symlink():
            self.path = self.path.resolve()
        self._maps = Maps()
        with file_format.reading(self.path) as file:
            self._read(file, allow)

    def _read(self, file: Objects, allow: Collection[str]) -> None:
        """Read and check all but the rows, with one descriptor."""
        root = content.attributes(file, file.root(), ("format", "format_version"))
        file_format.check_format(self.path, "activations", root)
        parts.check_references(file, self.path, allow)
        self._listed = listed = index.of(file, self.path)
        self.attributes: Attributes = Attributes(self.path, listed.attributes)
        self.hooks: list[str] = self.attributes.parsed("hooks", list)
        self.stored_as: str = self.attributes["precision"]
        self.precision: str = read_as(self.stored_as)
        rows = self.attributes["rows"]
        if not isinstance(rows, int) or rows < 0 or len({*self.hooks}) != len(self.hooks):
            raise ValueError("its attributes rows or hooks have another form")
        element_types.bits_dtype(self.stored_as)
        self._names = parts.names_of(self.attributes)
        self._widths = {name: listed.datasets[name].shape[1:] for name in self._names}
        more = parts.more_tables(listed)
        flat = (*parts.TOKENS[1:], *more)
        if any(len(listed.datasets[name].shape) != 1 for name in flat) or not self._ids_fit():
            raise ValueError("its tables of tokens have another form")
        if any(self._widths[name] for name in self._names if parts.is_scale(name)):
            raise ValueError("its scales have another form")
        self.is_virtual = "sources/file" in listed.datasets
        if checksums.CHECKSUMS not in listed.datasets or checksums.changed_parts(
            file.fd, listed, checksums.METADATA
        ):
            raise StoreError(
                f"{self.path}: its metadata is not as it was written: a program or the "
                "disk has changed it; run the pipeline again, or fetch the file again"
            )
        self._identity = Identity.of(file.fd, listed)
        self.metrics_checked = checksums.covers_metrics(listed)
        self._parts: list[Part] = (
            parts.referred(file.fd, listed, allow)
            if self.is_virtual
            else [parts.own(file.fd, listed)]
        )
        self._tables = (  # of a virtual dataset they lie in the file itself
            parts.own(file.fd, listed, more) if self.is_virtual else self._parts[0]
        )
        read = partial(listed.array, file.fd)
        tokens = self.attributes.get("tokens", rows)
        tables = read_tables(read, tokens, len(self.hooks))
        self._document_tokens, self._document_id = tables.document_offset, tables.document_id
        one_each = np.array_equal(tables.window_offset, tables.document_offset)  # held once
        self.window_tokens: np.ndarray = (
            tables.document_offset if one_each else tables.window_offset
        )
        self._row_tokens = read_row_tokens(read, partial(listed.pieces, file.fd), self.attributes)
        self._chosen: np.ndarray | None = None  # of the file's rows, those that are seen
        self.window_hash: np.ndarray = tables.window_hash
        self.metrics: dict[str, float] = read_metrics(read)
        counts = [sum(p.count(name) for p in self._parts) for name in (self._names[-1], "tokens/")]
        if counts != [rows, tokens]:
            raise StoreError(
                f"{self.path}: its parts hold other rows than it states; run the merge again"
            )

    def _ids_fit(self) -> bool:
        """Whether there is an id for each token, or there are as many codes as codebooks."""
        width = self._widths[TABLES["input_ids"]]
        return len(width) <= 1 and all(width)

    @property
    def codebooks(self) -> int:
        """Codes of each row of `input_ids`, where the model reads codes, (rows, codebooks); 0: a
        row is of one token id, (rows,).
        """
        return sum(self._widths[TABLES["input_ids"]])

    @cached_property
    def window_document(self) -> np.ndarray:
        """The document of each window, (windows,) int32: its number in this file, as `document`
        takes it.
        """
        found = np.empty(self.window_count, "<i4")
        for first in range(0, len(found), _TOGETHER):
            begins = self.window_tokens[:-1][first : first + _TOGETHER]
            found[first : first + _TOGETHER] = (
                np.searchsorted(self._document_tokens, begins, "right") - 1
            )
        return found

    def document_of_window(self, window: int) -> int:
        """The document of one window, without a table of all of them.

        Args:
            window: its number.

        Returns:
            The number of the document in this file.
        """
        begin = self.window_tokens[window]
        return int(np.searchsorted(self._document_tokens, begin, "right")) - 1

    @property
    def window_count(self) -> int:
        """How many windows there are."""
        return len(self.window_tokens) - 1

    @property
    def document_count(self) -> int:
        """How many documents there are."""
        return len(self._document_id)

    def __len__(self) -> int:
        return int(self.attributes["rows"]) if self._chosen is None else len(self._chosen)

    def taking(self, rows: np.ndarray) -> Self:
        """The same dataset, of which these rows alone are seen.

        Args:
            rows: their numbers, ascending.

        Returns:
            A view; nothing is read or copied.
        """
        seen = copy.copy(self)
        for name in [n for n in seen.__dict__ if isinstance(_attribute(self, n), cached_property)]:
            del seen.__dict__[name]
        seen._chosen = rows if self._chosen is None else self._chosen[rows]
        return seen

    @property
    def selected(self) -> bool:
        """Whether some rows of the file alone are seen."""
        return self._chosen is not None

    @property
    def pool(self) -> str:
        """How rows of a document or message were made one: `rows.pool` of the run."""
        return str(self.attributes.get("rows_pool", "none"))

    @property
    def pooled(self) -> bool:
        """Whether a row is of a whole document or message."""
        return self.pool != "none"

    @cached_property
    def row_tokens(self) -> np.ndarray | None:
        """The number of the token of each row; None: every token has its row."""
        if self._chosen is None:
            return self._row_tokens
        return self._chosen if self._row_tokens is None else self._row_tokens[self._chosen]

    @cached_property
    def window_offset(self) -> np.ndarray:
        """The first row of each window, then the number of rows: (windows + 1,) int64. Of their
        tokens: `window_tokens`.
        """
        return self._rows_before(self.window_tokens)

    def _rows_before(self, tokens: np.ndarray) -> np.ndarray:
        return tokens if self.row_tokens is None else np.searchsorted(self.row_tokens, tokens)

    def kept_positions(self, window: int) -> np.ndarray | None:
        """The positions of the tokens of a window that rows are made of.

        Args:
            window: its number.

        Returns:
            Ascending positions within the window, (kept tokens,); None: all.
        """
        if self._row_tokens is None:
            return None
        tokens = slice(*(int(t) for t in self.window_tokens[window : window + 2]))
        kept = self.tokens_of("kept")
        assert kept is not None
        return kept.numpy(tokens).nonzero()[0]

    def rows_of_kept(self, window: int) -> np.ndarray:
        """The row of the file that each of `kept_positions` is part of.

        Args:
            window: its number.

        Returns:
            Numbers of rows, (kept tokens,); pooled tokens share a row.
        """
        positions = self.kept_positions(window)
        first, end = (int(t) for t in self.window_tokens[window : window + 2])
        if positions is None or self._row_tokens is None:
            return np.arange(first, end)
        return np.searchsorted(self._row_tokens, positions + first)

    def __contains__(self, hook: object) -> bool:
        return hook in self.hooks

    def __getitem__(self, hook: str) -> HookRows:
        if hook not in self.hooks:
            raise HookError(
                f"no hook point {hook!r} in {self.path}; it has {', '.join(self.hooks)}"
            )
        name = hook_path(hook)
        width, of = self._widths[name], (self._parts, self._maps)
        if self.stored_as not in SCALED:
            return HookRows(*of, name, width, self.stored_as).taking(self._chosen)
        codes = Rows(*of, name, width, element_types.bits_dtype(self.stored_as))
        scales = Rows(*of, file_format.scale_path(hook), (), np.dtype("<f4"))
        return ScaledRows(codes, scales, self.stored_as).taking(self._chosen)

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the hidden states: the stored one, and FP32 where rows have a scale."""
        from theloom.precision import torch_dtype

        return torch_dtype(self.precision)

    @cached_property
    def input_ids(self) -> Rows:
        """The token of each row, (rows,); `input_ids.numpy(rows)`. Of a model of codes (rows,
        codebooks).
        """
        return self._table("tokens/input_ids")

    @cached_property
    def document_of(self) -> Rows:
        """The number of the document of each row: in a shard too, that in the whole run."""
        return self._table("tokens/document")

    @cached_property
    def position(self) -> Rows:
        """The position of each row in its window: what the model saw."""
        return self._table("tokens/position")

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The columns of the corpus that came with the documents, by name: `column.array()` has a
        value for each document.
        """
        described = self.attributes.parsed("columns", list) if "columns" in self.attributes else []
        count = self.document_count
        return self._table_of(lambda array: read_columns(array, self._listed, described, count))

    def token_table(self, name: str) -> Rows | None:
        """A table of tokens, with an entry for each row.

        Args:
            name: `special`, `role` (its place in `theloom.rows.roles.ROLES`), `message`,
                `char_start` or `char_end`.

        Returns:
            The entries; None where the file has no such table.
        """
        table = self.tokens_of(name)
        return None if table is None else table.taking(self.row_tokens)

    def tokens_of(self, name: str) -> Rows | None:
        """A table of all tokens, whether they have a row or not.

        Args:
            name: as `token_table`, or `kept`.

        Returns:
            An entry for each token; None where the file has no such table.
        """
        path = token_tables.path(name)
        if path not in self._tables.offsets:
            return None
        return Rows([self._tables], self._maps, path, (), parts.row_type(path))

    @property
    def files(self) -> list[Path]:
        """The files that hold the rows: the shards of a virtual dataset, else this file itself."""
        return [p.path for p in self._parts]

    @property
    def checksums(self) -> list[bytes]:
        """The checksums of each of `files`: three uint64, as `theloom.store.checksums` numbers
        them.
        """
        return [p.file.checksums for p in self._parts]

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """By hook point: count, mean and variance of each element of a row; the mean norm; the
        number of NaN and infinite values.

        Raises:
            ConfigError: some rows alone are seen.
        """
        if self._chosen is not None:
            raise ConfigError(
                "statistics are of all rows of a file; of selected rows take acts.mean(hook)"
            )
        widths = [math.prod(self._widths[hook_path(hook)]) for hook in self.hooks]
        found = self._table_of(lambda array: read_statistics(array, self.hooks, widths))
        return dict(zip(self.hooks, found, strict=True))

    def _table_of(self, read: Callable[[Callable[[str], np.ndarray]], _T]) -> _T:
        """What a function makes of tables of the file, which is opened and checked again."""
        with self._identity.open() as file:
            try:
                return read(partial(self._listed.array, byte_source.of(file)))
            except file_format.DAMAGE as error:
                raise file_format.damaged_error(self.path, error) from None

    @cached_property
    def token_texts(self) -> dict[int, str]:
        """The text of each token id that occurs, as the file has it; empty where it has none."""
        if f"{token_texts.GROUP}/id" not in self._listed.datasets:
            return {}
        return self._table_of(token_texts.read)

    def rows_of(self, name: str) -> Rows:
        """The rows of one column.

        Args:
            name: a hook point, or `input_ids`, `document`, `position` or `row` (the number of the
                row in the dataset).

        Returns:
            An entry for each row; it is read when it is indexed.

        Raises:
            HookError: the dataset has no hook point of this name.
        """
        if name == "row":
            return RowNumbers(int(self.attributes["rows"])).taking(self._chosen)
        return self._table(TABLES[name]) if name in TABLES else self[name]

    @property
    def token_ids(self) -> Rows:
        """The ids of all tokens, whether they have a row or not."""
        name = TABLES["input_ids"]
        return Rows(self._parts, self._maps, name, self._widths[name], np.dtype("<i4"))

    def _table(self, name: str) -> Rows:
        table = Rows(self._parts, self._maps, name, self._widths[name], np.dtype("<i4"))
        return table.taking(self.row_tokens)

    @property
    def documents(self) -> list[str]:
        """The ids of the documents, in the order of their rows: a list that is made anew. Of one
        document take `document_id_of`, of how many there are `document_count`.
        """
        return [self.document_id_of(number) for number in range(self.document_count)]

    def document_id_of(self, number: int) -> str:
        """The id of a document by its number.

        Args:
            number: of the document, from 0.

        Returns:
            Its id.

        Raises:
            StoreError: the id is not UTF-8.
        """
        try:
            return self._document_id[number].decode()
        except UnicodeDecodeError as error:
            raise file_format.damaged_error(self.path, error) from None

    @cached_property
    def document_offset(self) -> np.ndarray:
        """The first row of each document, then the number of rows: (documents + 1,) int64."""
        return self._rows_before(self._document_tokens)

    @property
    def document_tokens(self) -> np.ndarray:
        """The first token of each document, then the number of tokens: (documents + 1,) int64."""
        return self._document_tokens

    def document(self, which: int | str) -> DocumentRows:
        """One document.

        Args:
            which: its number (negative ones count from the end), or its id.

        Returns:
            Its id, rows, token ids and positions; hidden states are read when they are asked for.

        Raises:
            IndexError: no document has this number.
            KeyError: no document has this id.
        """
        if isinstance(which, str):
            number = next(iter(np.flatnonzero(self._document_id == which.encode())), None)
            if number is None:
                raise KeyError(f"no document {which!r} in {self.path}; acts.documents lists them")
            which = int(number)
        count = self.document_count
        if not -count <= which < count:
            raise IndexError(f"no document {which} in {self.path}; it has {count}, from 0")
        which %= count
        rows = slice(*(int(r) for r in self.document_offset[which : which + 2]))
        return DocumentRows(
            id=self.document_id_of(which),
            rows=rows,
            input_ids=self.input_ids.numpy(rows),
            position=self.position.numpy(rows),
            activations=self,
        )
