"""One of several jobs that tokenise a corpus: the stage tokenize_part.

Its file has the tokens of its share of the documents, and what the gather needs to go on as if one
job had read all: the id of each document, also of those without tokens, and each value of a column.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import h5py

from theloom.config.frozen import to_plain
from theloom.config.schema import Config, CorpusConfig
from theloom.corpus import documents, tokens
from theloom.corpus.columns import Columns
from theloom.corpus.encoding import Encoder
from theloom.corpus.formats.shares import Part
from theloom.corpus.kept import KeptRows
from theloom.corpus.rows import Document
from theloom.corpus.spooled.spool import Strings
from theloom.corpus.spooled.values import StoredValues
from theloom.corpus.tokens_file.growing import Growing
from theloom.errors import CorpusError
from theloom.store import file_format, provenance
from theloom.store.hdf5.output import Output, written
from theloom.store.hdf5.spool import Spool

log = logging.getLogger(__name__)

KIND = "tokenized_part"


def tokenize_part(config: Config, part: int, parts: int, output: Path) -> None:
    """Tokenise a share of the corpus: the stage tokenize_part.

    Args:
        config: the settings of the stage tokenize_corpus.
        part: number of the share, from 0.
        parts: how many there are.
        output: the file, for the gather.

    Raises:
        CorpusError: a document of the share cannot be read or encoded. Where `corpus.max_tokens`
            or `corpus.max_documents` may end the corpus before it, the gather decides.
    """
    corpus = documents.settings(config.corpus)
    reason = read_by_one(config)
    with written(output) as file:
        stated = {"part": part, "parts": parts, "state": documents.state(corpus)}
        stated |= {"read_by_one": reason or "", "broken": ""}
        if reason is None:
            stated["broken"] = _write(file, config, corpus, Part(part, parts))
        else:
            log.info("one job reads all of the corpus, the gather: %s", reason)
        stated["config"] = to_plain(config)
        file_format.set_attributes(file, provenance.attributes(KIND, **stated))


def read_by_one(config: Config) -> str | None:
    """Why one job tokenises all of a run's corpus.

    Args:
        config: the settings of the stage tokenize_corpus.

    Returns:
        The reason; None where several jobs can share it.

    Raises:
        CorpusError: there are no files.
    """
    if config.answers.source is not None:
        return "prompts of a run with answers are few"
    if config.corpus.target is not None:
        return "sources and targets are encoded together"
    return documents.read_by_one(config.corpus)


def prime(encoder: Encoder, corpus: CorpusConfig) -> None:
    """Show an encoder the first documents of the corpus, by which one job decides how the others
    are encoded.

    Args:
        encoder: of a part, or of the gather.
        corpus: the `corpus` settings.
    """
    first = tokens.first_group(documents.read_documents(corpus))
    with suppress(CorpusError):  # of the job whose document it is
        if first:
            encoder.encode(first)


@dataclass
class _PartTally(tokens.Tally):
    """Counts all documents that are read: those without tokens have the length 0."""

    doubles: Spool = field(default_factory=Spool)
    places: Strings = field(default_factory=Strings)  # of documents whose ids may be there twice
    has_names: bool = False

    def skip(self, document: Document) -> None:
        super().skip(document)
        self._note(document, 0, False)

    def add(self, document: Document, text_hash: str, tokens: int, doubled: bool) -> None:
        self.hashes.append(text_hash)
        self._note(document, tokens, doubled)

    def _note(self, document: Document, tokens: int, doubled: bool) -> None:
        self.ids.append(document.id)
        self.places.append(document.place if self.has_names or document.sequence else "")
        self.lengths.append(tokens)
        self.doubles.add(bytes([doubled]))


def _write(file: Output, config: Config, corpus: CorpusConfig, part: Part) -> str:
    """Write the share of a part. Returns the error that ended it, of which the gather decides."""
    encoder = Encoder(config)
    prime(encoder, corpus)
    tally = _PartTally(Columns(corpus.columns, alone=False), has_names=corpus.id_column is not None)
    growing, kept, broken = Growing(file), KeptRows(config.rows, file), ""
    read = islice(documents.read_part(corpus, part), corpus.max_documents)
    try:
        for input_ids, tables in tokens.encoded(
            config, encoder, tally, kept, None, read, cut=False
        ):
            growing.add({"input_ids": input_ids, **tables})
            file.check()
    except CorpusError as error:
        if part.number == 0 or corpus.max_tokens is corpus.max_documents is None:
            raise
        broken = str(error)
        log.warning("an error, unless the corpus ends before it: %s", error)
    growing.write()
    if not kept.everything:
        kept.flush()
    log.info("%d tokens in %d documents read", tally.total, len(tally.ids))
    for name, strings in (("id", tally.ids), ("place", tally.places), ("hash", tally.hashes)):
        strings.write(file, f"documents/{name}")
    tally.lengths.write(file, "documents/tokens")
    tally.doubles.write(file, "documents/doubled", "u1")
    tally.columns.write(file, len(tally.hashes))
    return broken


def stored_values(file: h5py.File) -> list[StoredValues]:
    """The values of `corpus.columns` of a part.

    Args:
        file: of the part, open.

    Returns:
        Those of each column, in their order.
    """
    count = len(file["columns"]) if "columns" in file else 0
    return [StoredValues(file[f"columns/{number}"]) for number in range(count)]
