"""The rows that a run stores: which tokens `rows.keep` keeps, and which of them make one row.

`tokens.h5` gets `tokens/kept`, whether a token is kept, and `rows/token`, the token of each stored
row: with `rows.pool` the last one of those that it is made of. Both are left out where every token
is a row of its own.
"""

import logging
from collections.abc import Sequence

import h5py
import numpy as np
import xxhash

from theloom.config.schema import RowsConfig
from theloom.errors import CorpusError, printable
from theloom.rows import expression
from theloom.rows.document import Document
from theloom.rows.pooling import pooled
from theloom.store.tables.tokens import ROW_TOKEN

log = logging.getLogger(__name__)

_AT_ONCE = 1 << 16  # tokens of one write
_NAMED = 5  # documents without rows that a message names


class KeptRows:
    """Evaluates `rows.keep` over one document after the other, and writes what it keeps.

    Args:
        rows: the `rows` settings.
        file: the open `tokens.h5`.
    """

    def __init__(self, rows: RowsConfig, file: h5py.File) -> None:
        self._keep = expression.parse(rows.keep)
        self._pool, self._by = rows.pool.name, rows.by.name
        self._file, self._hash = file, xxhash.xxh3_128()
        self._pending: list[np.ndarray] = []
        self._tokens = self._flushed = self.rows = 0
        self._empty = 0
        self._named: list[str] = []
        self.everything = self._keep.keeps_all and self._pool == "none"
        if not self.everything:
            file.create_dataset(ROW_TOKEN, (0,), "<i8", maxshape=(None,), chunks=(_AT_ONCE,))

    def add(self, document: Document) -> dict[str, np.ndarray]:
        """Take the next document.

        Args:
            document: its tokens and what is known of them.

        Returns:
            The table `kept` of its tokens, by name; nothing where every token has a row.

        Raises:
            ConfigError: the expression needs what is not known of it.
            CorpusError: rows are by message, and it is no conversation.
        """
        first = self._tokens
        self._tokens += document.tokens
        if self.everything:
            self.rows += document.tokens
            return {}
        mask = self._keep.mask(document)
        mask, last = self._pooled(document, mask)
        if not len(last):
            self._no_row(document.id)
        self._append(first + last)
        return {"kept": mask.astype("u1")}

    def extend(self, ids: Sequence[str], tokens: np.ndarray, last: np.ndarray) -> None:
        """Take documents whose rows another job has chosen.

        Args:
            ids: of the documents.
            tokens: of each of them, (documents,).
            last: the last token of each row, from 0 at the first document, (rows,).
        """
        if self.everything:
            self._tokens += int(tokens.sum())
            self.rows = self._tokens
            return
        ends = np.cumsum(tokens)
        rows_of = np.diff(np.searchsorted(last, ends), prepend=0)
        for number in np.flatnonzero(rows_of == 0).tolist():
            self._no_row(ids[number])
        first = self._tokens
        self._tokens += int(tokens.sum())
        self._append(first + last)

    def _append(self, last: np.ndarray) -> None:
        self.rows += len(last)
        self._pending.append(last)
        if self._tokens - self._flushed > _AT_ONCE:
            self.flush()

    def _no_row(self, document: str) -> None:
        self._empty += 1
        if len(self._named) < _NAMED:
            self._named.append(printable(document))

    def _pooled(self, document: Document, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that rows are made of, and the last one of each row."""
        if self._by == "document":
            return pooled(mask, np.zeros(document.tokens, "i4"), self._pool)
        if document.message is None:
            raise CorpusError(
                "rows.by=message: the corpus has plain texts; set corpus.messages to the "
                "column that holds conversations, or rows.by=document"
            )
        return pooled(mask & (document.message >= 0), document.message, self._pool)

    def flush(self) -> None:
        """Write what was taken since the last time."""
        self._flushed = self._tokens
        dataset = self._file[ROW_TOKEN]
        values = np.concatenate(self._pending or [np.zeros(0)]).astype("<i8")
        self._pending.clear()
        self._hash.update(values.tobytes())
        dataset.resize((len(dataset) + len(values),))
        dataset[len(dataset) - len(values) :] = values

    def finish(self, documents: int) -> dict[str, object]:
        """Write the rest; a warning names documents without rows.

        Args:
            documents: how many there are.

        Returns:
            What the attributes of `tokens.h5` state.

        Raises:
            CorpusError: nothing is kept.
        """
        if self.everything:
            return {}
        self.flush()
        if not self.rows:
            raise CorpusError(
                f"rows.keep={self._keep.text} keeps no token of the {documents:,} documents (such "
                f"as {', '.join(self._named)}); choose another expression"
            )
        if self._empty:
            more = ", …" if self._empty > len(self._named) else ""
            log.warning(
                "%d of %d documents keep no row by rows.keep=%s: %s%s",
                *(self._empty, documents, self._keep.text, ", ".join(self._named), more),
            )
        log.info("%d rows of %d tokens are kept", self.rows, self._tokens)
        return {
            "rows": self.rows,
            "rows_keep": self._keep.text,
            "rows_pool": self._pool,
            "rows_by": self._by,
            "rows_hash": self._hash.hexdigest(),
            "documents_without_rows": self._empty,
        }
