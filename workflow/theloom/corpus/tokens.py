"""Documents to token ids: `tokens.h5`, with windows for what is longer than the context, and the
plan of shards.

A *document* is one text of the corpus. A *window* is what one forward pass sees: the whole
document, or a part of it where it is longer than the context. A *shard* is a range of whole
documents.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from theloom.config.frozen import to_plain
from theloom.config.model_dims import numbers
from theloom.config.schema import Config, RowsConfig
from theloom.corpus import documents
from theloom.corpus.columns import Columns
from theloom.corpus.encoding import Encoded, Encoder
from theloom.corpus.kept import KeptRows
from theloom.corpus.media import documents as media
from theloom.corpus.media.chats import ChatEncoder
from theloom.corpus.media.encoding import Encoder as MediaEncoder
from theloom.corpus.prompts import Prompts
from theloom.corpus.rows import Document
from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.corpus.targets import sensed
from theloom.corpus.targets.encoding import Targets
from theloom.corpus.tokenizer import COMPARED
from theloom.corpus.tokens_file.growing import Growing, tables_hash
from theloom.corpus.vocabulary import Vocabulary
from theloom.corpus.windows import write_tables
from theloom.errors import ConfigError, CorpusError, printable
from theloom.model.files import hf_config
from theloom.model.length_switches import length_switches
from theloom.rows.document import Document as RowDocument
from theloom.rows.modality import CHAT, SENSED
from theloom.store import file_format, provenance, token_texts
from theloom.store.hdf5.output import written
from theloom.store.tables import columns

log = logging.getLogger(__name__)

# Documents that the tokenizer encodes in parallel, and their characters, unless one has more: with
# the characters of tokens, which come as Python's integers, each takes about 300 bytes
_TOGETHER, _CHARACTERS = 256, 1 << 18


@dataclass
class Tally:
    """What has been tokenised so far.

    Attributes:
        columns: values of `corpus.columns`.
        targets: where the rows are a decoder's; it has the sources.
        ids: of the documents.
        hashes: of their texts.
        lengths: tokens of each document.
        empty: documents without tokens.
        doubled: documents for which `Encoder.begins_twice`.
        cut_from: tokens of the last document before it was cut at `corpus.max_tokens`; 0: it was
            not.
    """

    columns: Columns
    targets: Targets | None = None
    ids: Strings = field(default_factory=Strings)
    hashes: Strings = field(default_factory=Strings)
    lengths: Numbers = field(default_factory=Numbers)
    empty: int = 0
    doubled: int = 0
    cut_from: int = 0

    @property
    def total(self) -> int:
        """Tokens."""
        return self.lengths.total

    def skip(self, document: Document) -> None:
        """Count a document without tokens.

        Args:
            document: the document.
        """
        self.empty += 1
        log.warning("document %s has no tokens: skipped", printable(document.id))

    def add(self, document: Document, text_hash: str, tokens: int, doubled: bool) -> None:
        """Count a document.

        Args:
            document: the document.
            text_hash: of what was encoded.
            tokens: how many are taken.
            doubled: whether it begins with the token that the tokenizer puts before it.
        """
        self.ids.append(document.id)
        self.hashes.append(text_hash)
        self.lengths.append(tokens)
        self.doubled += doubled


Tokens = Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]
"""Token ids of one document after the other, or of several, with the other tables by name."""


def tokenize(config: Config, output: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write `tokens.h5`: the stage tokenize_corpus, in one job.

    Args:
        config: the settings of the stage.
        output: the file.
        more: attributes of the file beside those of every one.

    Raises:
        CorpusError: the corpus cannot be read or has no tokens, the model has no tokenizer, or a
            token has no row in the model's embedding.
        ConfigError: corpus.context_length is more than the model allows.
    """

    def whole(encoder: Any, tally: Tally, kept: KeptRows, prompts: Prompts | None) -> Tokens:
        if config.corpus.kind.name in SENSED:
            read_media = media.encoded if config.corpus.target is None else sensed.encoded
            return read_media(config, encoder, tally, kept)
        corpus = documents.settings(config.corpus) if prompts is None else prompts.corpus
        read = documents.read_documents(corpus)
        return encoded(config, encoder, tally, kept, prompts, read)

    write_tokens(config, output, whole, more or {})


def write_tokens(
    config: Config,
    output: Path,
    source: Callable[[Any, Tally, KeptRows, Prompts | None], Tokens],
    more: Mapping[str, Any],
) -> None:
    """Write `tokens.h5` from any source of tokens.

    Args:
        config: the settings of the stage.
        output: the file.
        source: gives the tokens of all documents, and counts what it gives.
        more: attributes of the file beside those of every one.

    Raises:
        CorpusError: the corpus cannot be read or has no tokens, the model has no tokenizer, or a
            token has no row in the model's embedding.
        ConfigError: corpus.context_length is more than the model allows.
    """
    texts = config.corpus.kind.name not in SENSED
    encoder: Any = _encoder_of(config)(config)
    context = context_length(config) if texts else 0
    prompts = None if config.answers.source is None else Prompts(config, context)
    rows = config.rows if prompts is None else RowsConfig()  # kept when the answers are there
    targeted = texts and config.corpus.target is not None
    targets = Targets(config, encoder, context) if targeted else None
    tally = Tally(Columns(config.corpus.columns), targets)
    with written(output) as file:
        growing = Growing(file)
        kept = KeptRows(rows, file)
        ids_hash, occurring = xxhash.xxh3_128(), set[int]()
        for input_ids, tables in source(encoder, tally, kept, prompts):
            growing.add({"input_ids": input_ids, **tables})
            file.check()
            ids_hash.update(input_ids.tobytes())
            occurring.update(np.unique(input_ids).tolist())
        growing.write()
        total = tally.total
        if not total:
            read = f"{tally.empty} documents read, all empty" if tally.empty else "no documents"
            raise CorpusError(f"the corpus has no tokens: {read}; check corpus.*")
        # composing the config has set the number of shards
        shards = config.extraction.shards or 1
        write_tables(file, tally.ids, tally.hashes, tally.lengths, context, shards)
        if prompts is not None:
            prompts.write(file)
        typed = tally.columns.typed() | encoder.columns()
        typed |= {} if targets is None else targets.columns()
        columns.write_pieces(file, typed)
        token_texts.write(file, encoder.texts(occurring))
        file_format.set_attributes(
            file,
            provenance.attributes(
                "tokens",
                config=to_plain(config),
                **encoder.attributes(),
                double_bos_documents=tally.doubled,
                columns=columns.described(typed),
                tables_hash=tables_hash(file),
                corpus=config.corpus.kind.name,
                tokens_hash=ids_hash.hexdigest(),
                corpus_hash=tally.hashes.digest(),
                empty_documents=tally.empty,
                truncated_from=tally.cut_from,
                context_length=context,
                **({} if targets is None else targets.attributes()),
                **kept.finish(len(tally.ids)),
                **more,
            ),
        )
    encoder.report(tally.doubled)
    log.info(
        "%d tokens in %d documents; %d empty documents skipped", total, len(tally.ids), tally.empty
    )


def context_length(config: Config) -> int:
    """Tokens of the longest window: `corpus.context_length`, else the model's own limit.

    Args:
        config: the run's config.

    Returns:
        Tokens; 0: there is no limit.

    Raises:
        ConfigError: more is requested than the model takes.
        ModelError: the model's own config cannot be read.
    """
    model_config, requested = hf_config(config.model), config.corpus.context_length
    limit = numbers(model_config).context_length
    scales = any(s.every_length and s.beyond == limit for s in length_switches(model_config))
    if requested and limit and requested > limit and not scales:
        raise ConfigError(
            f"corpus.context_length: {requested} is more than the model's {limit}; "
            "give at most that"
        )
    return requested or limit


def _encoder_of(config: Config) -> Any:
    """The class that turns documents into rows."""
    if config.corpus.kind.name in SENSED:
        return MediaEncoder if config.corpus.target is None else sensed.Encoder
    modality = config.model.modality
    return ChatEncoder if modality is not None and modality.name == CHAT else Encoder


def encoded(
    config: Config,
    encoder: Encoder,
    tally: Tally,
    kept: KeptRows,
    prompts: Prompts | None,
    read: Iterable[Document],
    cut: bool = True,
) -> Tokens:
    """The tokens of documents, until `corpus.max_tokens` are there.

    Args:
        config: the settings of the stage.
        encoder: of the run.
        tally: takes the counts; what it has is before the first document.
        kept: takes what is stored.
        prompts: takes the documents of a run with answers.
        read: the documents.
        cut: whether the last document is cut at `corpus.max_tokens`, or whole.

    Yields:
        Token ids of each document that has any, with the other tables of its tokens.

    Raises:
        CorpusError: a document cannot be read or encoded.
    """
    left, vocabulary = config.corpus.max_tokens, Vocabulary(config.model)
    names, targets, context = [*config.corpus.columns], tally.targets, context_length(config)
    encode = encoder.encode if targets is None else targets.encode
    left = None if left is None else left - tally.total
    for document, found in _one_by_one(encode, _groups(read)):
        ids = found.ids
        if not ids:
            tally.skip(document)
            continue
        if left is not None and len(ids) > left and cut:
            if prompts is not None or found.images:
                log.info("documents end before %s, at corpus.max_tokens", document.id)
                return
            log.warning(
                "document %s is cut from %d to %d tokens at corpus.max_tokens",
                printable(document.id),
                len(ids),
                left,
            )
            tally.cut_from = len(ids)
            ids = ids[:left]
        if prompts is not None:
            document, given = prompts.split(document)
            prompts.add(document, len(ids), found.text, given)
        checked = vocabulary.check(ids, printable(document.id), encoder.names)
        tables = {name: table[: len(ids)] for name, table in found.tables.items()}
        tables |= encoder.special(checked)
        known = RowDocument(
            id=document.id,
            tokens=len(ids),
            text=found.text,
            columns=dict(zip(names, document.columns or (), strict=False)),
            **tables,
        )
        tally.columns.add(document)
        encoder.add(document, found, context)
        if targets is not None:
            targets.add(document, len(ids), vocabulary, encoder.names)
        tables |= kept.add(known)
        text_hash = xxhash.xxh3_128_hexdigest(found.hashed)
        tally.add(document, text_hash, len(ids), encoder.begins_twice(found.ids))
        yield checked, tables
        if left is not None:
            left -= len(ids)
            if left <= 0:
                return


def _one_by_one(
    encode: Callable[[Sequence[Document]], list[Encoded]], groups: Iterable[list[Document]]
) -> Iterator[tuple[Document, Encoded]]:
    """Documents and their tokens. An error comes after those before it, which may be all that is
    taken of the corpus.
    """
    for group in groups:
        try:
            found = encode(group)
        except CorpusError:
            for document in group:
                yield document, encode([document])[0]
            raise
        yield from zip(group, found, strict=True)


def first_group(read: Iterable[Document]) -> list[Document]:
    """The documents that are encoded first, of which class and file of the tokenizer are compared.

    Args:
        read: the documents of the corpus.

    Returns:
        The first of them.
    """
    return next(_groups(read), [])


def _groups(read: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are encoded together; of the first group class and file are compared."""
    group, characters, least = list[Document](), 0, COMPARED
    try:
        for document in read:
            group.append(document)
            characters += len(document.text) + (_CHARACTERS if document.images else 0)
            if len(group) == _TOGETHER or (len(group) >= least and characters >= _CHARACTERS):
                yield group
                group, characters, least = [], 0, 1
    except CorpusError:
        if group:
            yield group
        raise
    if group:
        yield group
