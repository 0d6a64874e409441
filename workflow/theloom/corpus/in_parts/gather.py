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
from theloom.corpus.spooled.values import Values, texts_of
from theloom.errors import CorpusError
from theloom.store import file_format, provenance
from theloom.store.tables import tokens as token_tables

log = logging.getLogger(__name__)

_PIECE = token_tables.CHUNK  # tokens that are copied at once
_DOCUMENTS = 1 << 13  # documents that are copied at once


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
                share, broken = _Share(file), file.attrs["broken"]
                for lengths in share:
                    count, ends = self._whole(lengths)
                    yield from self._copied(share, lengths[:count])
                    self._read += count
                    if ends:
                        return
                    if count < len(lengths):
                        broken = True
                        break
                taken = share.first
            if broken:
                yield from self._rest(Part(number, len(parts)), taken)
                return

    def _whole(self, lengths: np.ndarray) -> tuple[int, bool]:
        """How many documents are taken whole, and whether the corpus ends with them."""
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

    def _copied(self, share: "_Share", lengths: np.ndarray) -> tokens.Tokens:
        """The next documents of a part."""
        tally, taken = self._tally, lengths > 0
        tally.empty += int((~taken).sum())
        tally.doubled += share.doubled(len(lengths))
        ids = self._add_ids(share, taken)
        tally.hashes.extend(*share.hashes(int(taken.sum())))
        tally.lengths.extend(lengths[taken])
        if self._corpus.columns:
            tally.columns.add_kept(share.values(int(taken.sum())))
        if self._kept.everything:
            self._kept.extend((), lengths[taken], np.empty(0, "<i8"))
        else:
            names = iter(ids)
            for documents_of, last in share.kept(lengths[taken]):
                self._kept.extend([*islice(names, len(documents_of))], documents_of, last)
        yield from share.passed(lengths)

    def _add_ids(self, share: "_Share", taken: np.ndarray) -> Iterable[str]:
        """Take the ids of documents. Returns those of the documents with tokens."""
        ids, places = share.texts("id", len(taken)), share.texts("place", len(taken))
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


class _Share:
    """The file of a part, of which some documents are read after the other.

    Attributes:
        first: number of the next document.
    """

    def __init__(self, file: h5py.File) -> None:
        self._file, self.first = file, 0
        self._stored = 0  # documents with tokens before the next one
        self._token = self._row = 0  # the first of the next document
        self._values = part.stored_values(file)
        self._names = [*file["tokens"]] if "tokens" in file else []

    def __iter__(self) -> Iterator[np.ndarray]:
        """Tokens of the next documents, (documents,); `passed` goes past those that are taken."""
        count = len(self._file["documents/tokens"])
        while self.first < count:
            yield self._file["documents/tokens"][self.first : self.first + _DOCUMENTS]

    def doubled(self, count: int) -> int:
        """How many of the next documents begin twice."""
        return int(self._file["documents/doubled"][self.first : self.first + count].sum())

    def texts(self, name: str, count: int) -> "_Texts":
        """Ids or places of the next documents."""
        stop = self.first + count
        begin, data, ends = texts_of(self._file, f"documents/{name}", self.first, stop)
        return _Texts(data, ends - begin)

    def hashes(self, count: int) -> tuple[bytes, np.ndarray]:
        """Hashes of the next documents with tokens, as `Strings.extend` takes them."""
        begin, data, ends = texts_of(
            self._file, "documents/hash", self._stored, self._stored + count
        )
        return data, ends - begin

    def values(self, count: int) -> list[Values]:
        """Values of the next documents with tokens, of each column."""
        return [values.read(self._stored, self._stored + count) for values in self._values]

    def kept(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Lengths and rows of the next documents with tokens, some at a time, for `KeptRows`."""
        first = self._token
        groups = np.cumsum(lengths) // _PIECE
        for documents_of in np.split(lengths, np.flatnonzero(np.diff(groups)) + 1):
            tokens_of = int(documents_of.sum())
            last = self._file[token_tables.ROW_TOKEN][self._row : self._row + tokens_of] - first
            last = last[: np.searchsorted(last, tokens_of)]
            yield documents_of, last
            self._row, first = self._row + len(last), first + tokens_of

    def passed(self, lengths: np.ndarray) -> tokens.Tokens:
        """The tokens of the next documents, which are then passed."""
        end = self._token + int(lengths.sum())
        for start in range(self._token, end, _PIECE):
            stop = min(start + _PIECE, end)
            piece = {n: self._file[token_tables.path(n)][start:stop] for n in self._names}
            yield piece.pop("input_ids"), piece
        self.first, self._token = self.first + len(lengths), end
        self._stored += int((lengths > 0).sum())


class _Texts:
    """Some texts. `data`: all their bytes. `ends`: the byte after each."""

    def __init__(self, data: bytes, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in self.ends.tolist():
            yield self.data[begin:end].decode()
            begin = end
