"""`tokens.h5` from what several jobs have tokenised: the stage tokenize_corpus of such a run.

Whole documents are copied. From the document at which `corpus.max_tokens` ends the corpus, or at
which a part met an error, the gather goes on as one job does.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from theloom.config.frozen import to_plain
from theloom.config.schema import Config
from theloom.corpus import documents, tokens
from theloom.corpus.encoding import Encoder
from theloom.corpus.formats.shares import Part
from theloom.corpus.in_parts import part
from theloom.corpus.kept import KeptRows
from theloom.corpus.prompts import Prompts
from theloom.corpus.rows import Document
from theloom.errors import CorpusError
from theloom.store import file_format, provenance
from theloom.store.tables import tokens as token_tables

log = logging.getLogger(__name__)

_PIECE = token_tables.CHUNK  # tokens that are copied at once
_HASH = 32  # digits of a text's hash


def gather(config: Config, parts: Sequence[Path], output: Path) -> None:
    """Write `tokens.h5` from the files of all parts.

    Args:
        config: the settings of the stage tokenize_corpus.
        parts: the files of `tokenize_part`, in their order. They are removed where the corpus has
            an error or has changed: the next call reads it anew.
        output: path of `tokens.h5`.

    Raises:
        CorpusError: as of one job, or the corpus has changed since a part was tokenised.
        StoreError: a part is missing or damaged.
    """
    try:
        reason = _check(config, parts)
        more = {"tokenize_jobs": 1 if reason else len(parts), "read_by_one": reason}
        if reason:
            log.info("one job reads all of the corpus: %s", reason)
            tokens.tokenize(config, output, more)
            return

        def source(
            encoder: Encoder, tally: tokens.Tally, kept: KeptRows, prompts: Prompts | None
        ) -> tokens.Tokens:
            assert prompts is None
            return _Joined(config, encoder, tally, kept).joined(parts)

        tokens.write_tokens(config, output, source, more)
    except CorpusError:
        for path in parts:
            path.unlink(missing_ok=True)
        raise


def _check(config: Config, parts: Sequence[Path]) -> str:
    """Check that files are the parts of the corpus as it is. Returns why one job reads all of it,
    empty where they share it.
    """
    state = documents.state(documents.settings(config.corpus))
    made_by = json.dumps(provenance.attributes(part.KIND, config=to_plain(config))["config"])
    for number, path in enumerate(parts):
        with file_format.open_h5(path, part.KIND) as file:
            mine = tuple(file.attrs[name] for name in ("part", "parts", "state", "config"))
            if mine != (number, len(parts), state, made_by):
                raise _changed(config)
    return part.read_by_one(config) or ""


def _changed(config: Config) -> CorpusError:
    where = config.corpus.path or config.corpus.dataset
    return CorpusError(
        f"corpus: {where} has changed since jobs tokenised parts of it, which are removed; run "
        "again"
    )


class _Joined:
    """The tokens of all parts, as `tokens.encoded` gives them."""

    def __init__(
        self, config: Config, encoder: Encoder, tally: tokens.Tally, kept: KeptRows
    ) -> None:
        self._config, self._corpus = config, documents.settings(config.corpus)
        self._encoder, self._tally, self._kept = encoder, tally, kept
        self._ids = documents.Ids(self._corpus)
        self._read = 0  # documents

    def joined(self, parts: Sequence[Path]) -> tokens.Tokens:
        part.prime(self._encoder, self._corpus)
        for number, path in enumerate(parts):
            with file_format.open_h5(path, part.KIND) as file:
                lengths, broken = file["documents/tokens"][:], file.attrs["broken"]
                count, ends = self._whole(lengths)
                yield from self._copied(file, lengths[:count])
            self._read += count
            if ends:
                return
            if count < len(lengths) or broken:
                yield from self._rest(Part(number, len(parts)), count)
                return

    def _whole(self, lengths: np.ndarray) -> tuple[int, bool]:
        """How many documents of a part are taken whole, and whether the corpus ends with them."""
        most, limit = len(lengths), False
        if self._corpus.max_documents is not None:
            left = self._corpus.max_documents - self._read
            most, limit = min(most, left), left <= most
        if self._corpus.max_tokens is not None:
            left = self._corpus.max_tokens - self._tally.total
            ends = np.cumsum(lengths[:most])
            at = int(np.searchsorted(ends, left))
            if at < most:
                exact = int(ends[at]) == left
                return at + exact, exact
        return most, limit

    def _copied(self, file: h5py.File, lengths: np.ndarray) -> tokens.Tokens:
        """The first documents of a part."""
        tally, taken = self._tally, lengths > 0
        tally.empty += int((~taken).sum())
        tally.doubled += int(file["documents/doubled"][: len(lengths)].sum())
        ids = self._add_ids(file, taken)
        count = int(taken.sum())
        ends = np.arange(1, count + 1) * _HASH
        tally.hashes.extend(file["documents/hash"][: count * _HASH].tobytes(), ends)
        tally.lengths.extend(lengths[taken].tolist())
        if self._corpus.columns:
            tally.columns.add_kept(part.read_values(file), count)
        self._add_rows(file, ids, lengths[taken])
        names = [*file["tokens"]] if "tokens" in file else []
        for start in range(0, int(lengths.sum()), _PIECE):
            stop = min(start + _PIECE, int(lengths.sum()))
            piece = {name: file[token_tables.path(name)][start:stop] for name in names}
            yield piece.pop("input_ids"), piece

    def _add_ids(self, file: h5py.File, taken: np.ndarray) -> Iterable[str]:
        """Take the ids of documents. Returns those of the documents with tokens."""
        ids, places = (_Texts(file, f"documents/{n}", len(taken)) for n in ("id", "place"))
        if taken.all() and not len(places.data):  # each line and file has a name of its own
            self._tally.ids.extend(ids.data, ids.ends)
            return ids
        found = []
        for document, place, has_tokens in zip(ids, places, taken.tolist(), strict=True):
            if place:
                known = Document(document, "", place, sequence=True)
                document = self._ids.checked(known).id
            if has_tokens:
                self._tally.ids.append(document)
                found.append(document)
        return found

    def _add_rows(self, file: h5py.File, ids: Iterable[str], lengths: np.ndarray) -> None:
        """Take the rows that are kept of documents, some documents at a time."""
        if self._kept.everything:
            self._kept.extend((), lengths, np.empty(0, "<i8"))
            return
        at, first, names = 0, 0, iter(ids)
        groups = np.cumsum(lengths) // _PIECE
        for documents_of in np.split(lengths, np.flatnonzero(np.diff(groups)) + 1):
            tokens_of = int(documents_of.sum())
            last = file[token_tables.ROW_TOKEN][at : at + tokens_of] - first
            last = last[: np.searchsorted(last, tokens_of)]
            self._kept.extend([*islice(names, len(documents_of))], documents_of, last)
            at, first = at + len(last), first + tokens_of

    def _rest(self, share: Part, skipped: int) -> tokens.Tokens:
        """What one job takes of a part's documents behind the first ones. Raises CorpusError."""
        corpus, before = self._corpus, self._read - skipped
        most = None if corpus.max_documents is None else corpus.max_documents - before
        read = islice(documents.read_part(corpus, share), skipped, most)
        checked = (self._counted(document) for document in read)
        yield from tokens.encoded(
            self._config, self._encoder, self._tally, self._kept, None, checked
        )
        if self._tally.total != corpus.max_tokens and self._read != corpus.max_documents:
            raise _changed(self._config)  # the part's error is gone

    def _counted(self, document: Document) -> Document:
        self._read += 1
        return self._ids.checked(document)


class _Texts:
    """The first texts of a part's table. `data`: all their bytes. `ends`: the byte after each."""

    def __init__(self, file: h5py.File, name: str, count: int) -> None:
        self.ends = file[f"{name}_end"][:count]
        self.data = file[name][: int(self.ends[-1]) if count else 0].tobytes()

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in self.ends.tolist():
            yield self.data[begin:end].decode()
            begin = end
