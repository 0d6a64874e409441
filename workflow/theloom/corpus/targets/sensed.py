"""Targets of a decoder behind an encoder of audio: a row for each token of the decoder, and the
clip that the encoder reads as the source of the document.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from theloom.config.schema import Config
from theloom.corpus.columns import of_integers
from theloom.corpus.documents import Ids, settings
from theloom.corpus.encoding import Encoded
from theloom.corpus.encoding import Encoder as TextEncoder
from theloom.corpus.kept import KeptRows
from theloom.corpus.media import places
from theloom.corpus.media.items import Item
from theloom.corpus.media.read import Read, Reader
from theloom.corpus.rows import Document
from theloom.corpus.spooled.spool import Numbers
from theloom.corpus.targets.encoding import behind
from theloom.corpus.vocabulary import Vocabulary
from theloom.errors import CorpusError, printable
from theloom.model.files import hf_config
from theloom.model.towers.decoder import longest_target
from theloom.rows.document import Document as RowDocument
from theloom.rows.modality import SOURCE_ROWS
from theloom.store.tables.columns import ColumnPieces

log = logging.getLogger(__name__)

# Clips whose targets are encoded together, and their bytes, unless one has more
_TOGETHER, _BYTES = 64, 1 << 26


class Encoder:
    """Turns clips with a text into the tokens of the text.

    Args:
        config: the settings of the stage.

    Raises:
        ModelError: the model has no processor, or does not read audio.
        CorpusError: a package is missing that reads the files, or the model has no tokenizer.
    """

    def __init__(self, config: Config) -> None:
        self._reader, self._texts = Reader(config), TextEncoder(config)
        model, self._corpus = hf_config(config.model), config.corpus
        self._vocabulary = Vocabulary(config.model)
        self._limit = longest_target(model)
        start = getattr(model, "decoder_start_token_id", None)
        if start is None and config.corpus.add_special_tokens:
            log.warning(
                "%s has no decoder_start_token_id: targets begin with their first token",
                model.model_type,
            )
        self._start: int | None = start if config.corpus.add_special_tokens else None
        self._rows = Numbers()

    def encode(self, group: Sequence[Document]) -> list[Encoded]:
        """The tokens of each target, behind the token that the decoder starts with. A tokenizer
        that writes that token itself, as Whisper's does, writes it alone.

        Args:
            group: documents with a target.

        Returns:
            One entry for each document; without tokens where it has no target.

        Raises:
            CorpusError: the tokenizer fails.
        """
        return [
            behind(self._start, found) if [self._start] != list(found.ids[:1]) else found
            for found in self._texts.encode_targets(group)
        ]

    def source(self, item: Item, tokens: int) -> Read | None:
        """The clip of a document.

        Args:
            item: the file.
            tokens: of its target.

        Returns:
            What the encoder is given; None for a clip without samples.

        Raises:
            CorpusError: it is damaged, or not as the model takes it; or the target is longer than
                the decoder takes.
        """
        self._reader.checked(item)
        limits = (self._limit, self._corpus.context_length)
        most = min((limit for limit in limits if limit), default=tokens)
        if tokens > most:
            own = (
                "is the most that the decoder takes; shorten it"
                if most == self._limit
                else ("corpus.context_length is the most; shorten it, or raise that")
            )
            raise CorpusError(
                f"{item.place}: the target of document {printable(item.id)!r} has {tokens} tokens, "
                f"and {most} {own}"
            )
        return self._reader.read(item)

    def add(
        self, document: Document, found: Encoded, source: Read
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Keep the source of a document that is stored.

        Args:
            document: the document.
            found: its target.
            source: its clip.

        Returns:
            Token ids, (tokens,) int32, and the other tables of the tokens.

        Raises:
            CorpusError: the model lacks a token.
        """
        checked = self._vocabulary.check(found.ids, printable(document.id), self._texts.names)
        self._reader.add(source)
        self._rows.append(source.rows)
        return checked, found.tables | self._texts.special(checked)

    def hashed(self, item: Item, target: Encoded) -> bytes:
        """What a change of the document, or of the processor, would change.

        Args:
            item: the file.
            target: the tokens of its text.

        Returns:
            Bytes to be hashed.
        """
        return self._reader.hashed(item) + target.hashed

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether a target begins with the token that the tokenizer puts before it.

        Args:
            ids: its tokens.

        Returns:
            As of texts.
        """
        return self._texts.begins_twice(ids)

    def columns(self) -> dict[str, ColumnPieces]:
        """The source of each document.

        Returns:
            By name: the file, the hash of its bytes, the shape of what the processor made, and the
            rows that the encoder makes of it.
        """
        return self._reader.columns() | {SOURCE_ROWS: of_integers(self._rows)}

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each token id.

        Args:
            ids: token ids.

        Returns:
            By id, each by itself.
        """
        return self._texts.texts(ids)

    def attributes(self) -> dict[str, Any]:
        """What `tokens.h5` says of the rows.

        Returns:
            Attributes by name, as of texts and of their decoder; `processor` and `processor_hash`
            besides.
        """
        return self._texts.attributes() | self._reader.attributes() | {"decoder_start": self._start}

    def report(self, doubled: int) -> None:
        """Warn of what shows when all documents are read.

        Args:
            doubled: documents for which `begins_twice`.
        """
        self._texts.report(doubled)


def encoded(
    config: Config, encoder: Encoder, tally: Any, kept: KeptRows
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The tokens of the targets of a corpus of audio.

    Args:
        config: the settings of the stage.
        encoder: of the run.
        tally: takes the counts, a `Tally` of `corpus.tokens`.
        kept: takes what is stored.

    Yields:
        Token ids of each document that has any, with the other tables.

    Raises:
        CorpusError: a file cannot be read, or is nothing that the model takes.
    """
    corpus = settings(config.corpus)
    ids = Ids(corpus)
    for group in _groups(islice(places.read(corpus), corpus.max_documents)):
        documents = [
            Document(item.id, "", item.place, item.columns, target=item.target) for item in group
        ]
        targets = encoder.encode(documents)
        for item, document, target in zip(group, map(ids.checked, documents), targets, strict=True):
            source = encoder.source(item, len(target.ids)) if target.ids else None
            if source is None:
                tally.skip(document)
                continue
            checked, tables = encoder.add(document, target, source)
            known = RowDocument(
                id=document.id,
                tokens=len(checked),
                text=target.text,
                columns=dict(zip(corpus.columns, item.columns, strict=True)),
                **tables,
            )
            tally.columns.add(document)
            tables |= kept.add(known)
            text_hash = xxhash.xxh3_128_hexdigest(encoder.hashed(item, target))
            tally.add(document, text_hash, len(checked), encoder.begins_twice(target.ids))
            yield checked, tables


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    group, size = list[Item](), 0
    for item in items:
        group.append(item)
        size += len(item.content)
        if len(group) == _TOGETHER or size >= _BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
