"""Sources and targets of an encoder-decoder to tokens, where the rows are the decoder's.

The document's tokens are then the target's, behind the token with which the decoder starts. The
source's token ids go with each document as the column `source_ids`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from theloom.config.checks import SOURCE_IDS
from theloom.config.schema import Config
from theloom.corpus.columns import of_strings
from theloom.corpus.encoding import Encoded, Encoder
from theloom.corpus.rows import Document
from theloom.corpus.spooled.spool import Strings
from theloom.corpus.vocabulary import Vocabulary
from theloom.errors import CorpusError, printable
from theloom.model.files import hf_config
from theloom.store.tables.columns import ColumnPieces

log = logging.getLogger(__name__)


def behind(start: int | None, target: Encoded) -> Encoded:
    """A target behind the token that the decoder starts with.

    Args:
        start: id of that token; None: there is none.
        target: the tokens of a text.

    Returns:
        The same tokens behind it; an empty target as it is.
    """
    if start is None or not target.ids:
        return target
    tables = {
        name: np.concatenate([np.full(1, -1, values.dtype), values])
        for name, values in target.tables.items()
    }
    return replace(target, ids=[start, *target.ids], tables=tables)


class Targets:
    """Encodes documents with a target, and collects the tokens of their sources.

    Args:
        config: the settings of the stage.
        encoder: encodes texts.
        context: tokens that the encoder, and the decoder, take at most; 0: no limit.

    Raises:
        ModelError: the model's own config cannot be read.
    """

    def __init__(self, config: Config, encoder: Encoder, context: int) -> None:
        self._encoder, self._context = encoder, context
        self._model = hf_config(config.model)
        given = config.corpus.input_ids is not None
        self._starts = config.corpus.add_special_tokens and not given
        self._start = getattr(self._model, "decoder_start_token_id", None)
        self._from_the_end = self._model.model_type == "mbart" and self._start is None
        if self._starts and self._start is None and not self._from_the_end:
            log.warning(
                "%s has no decoder_start_token_id: targets begin with their first token",
                self._model.model_type,
            )
        self._waiting: dict[str, Sequence[int]] = {}  # sources by document
        self._sources = Strings()

    def encode(self, group: Sequence[Document]) -> list[Encoded]:
        """The tokens of each target.

        Args:
            group: documents with a target.

        Returns:
            One entry for each document; without tokens where source or target has none.

        Raises:
            CorpusError: the tokenizer fails.
        """
        found = []
        self._waiting = {}
        pairs = zip(self._encoder.encode(group), self._encoder.encode_targets(group), strict=True)
        for document, (source, target) in zip(group, pairs, strict=True):
            self._waiting[document.id] = source.ids
            hashed = b"%d:%b%b" % (len(source.hashed), source.hashed, target.hashed)
            if not source.ids or not target.ids:
                found.append(Encoded([], hashed, target.text))
                continue
            found.append(self._started(target, hashed))
        return found

    def _started(self, target: Encoded, hashed: bytes) -> Encoded:
        """A target as the decoder reads it: behind the token that it starts with."""
        ids, tables = list(target.ids), dict(target.tables)
        if self._starts and self._from_the_end:  # the language, which mBART's tokenizer puts last
            ids = [*ids[-1:], *ids[:-1]]
            tables = {name: np.roll(values, 1) for name, values in tables.items()}
        elif self._starts:
            found = behind(self._start, target)
            ids, tables = [*found.ids], found.tables
        return Encoded(ids, hashed, target.text, tables)

    def add(self, document: Document, tokens: int, vocabulary: Vocabulary, names: Any) -> None:
        """Keep the source of a document that is stored.

        Args:
            document: one of the group that was encoded last.
            tokens: of its target.
            vocabulary: the ids that the model takes.
            names: what names a token, for messages.

        Raises:
            CorpusError: source or target is longer than the model takes, or has an id that the
                model lacks.
        """
        ids = self._waiting[document.id]
        for what, length in ("source", len(ids)), ("target", tokens):
            if self._context and length > self._context:
                raise CorpusError(
                    f"{document.place}: the {what} of document {printable(document.id)!r} has "
                    f"{length} tokens, and an encoder-decoder goes in one pass of at most "
                    f"{self._context}; shorten it, or raise corpus.context_length where the model "
                    "allows more"
                )
        checked = vocabulary.check(ids, printable(document.id), names)
        self._sources.append(json.dumps(checked.tolist(), separators=(",", ":")))

    def columns(self) -> dict[str, ColumnPieces]:
        """The column of the sources.

        Returns:
            By its name: token ids of each document's source, as JSON.
        """
        return {SOURCE_IDS: of_strings("json", self._sources)}

    def attributes(self) -> dict[str, Any]:
        """What `tokens.h5` says of the decoder's input.

        Returns:
            `decoder_start`: the token id with which every target starts; `null`: none, or the last
            token of each, its language.
        """
        return {"decoder_start": self._start if self._starts else None}
