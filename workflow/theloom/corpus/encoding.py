"""Documents to tokens, and what each token is: its characters, whether it is a special one, and
in a conversation whose it is.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from theloom.config.schema import Config
from theloom.corpus.chat import ChatTemplate
from theloom.corpus.media import chat_images
from theloom.corpus.rows import Document
from theloom.corpus.tokenizer import CorpusTokenizer, Encoding
from theloom.corpus.vocabulary import positions_of
from theloom.errors import CorpusError, TheLoomError, printable
from theloom.model import files
from theloom.model.checkpoint.codes import check_corpus, codebooks
from theloom.store.tables.columns import ColumnPieces

log = logging.getLogger(__name__)


@dataclass
class Encoded:
    """A document's tokens, their tables by name (`store.table.tokens`), and what a change of it
    would change. `text`: the text that they are of, as the characters count. `images`: what finds
    those of a conversation again.
    """

    ids: Sequence[int]
    hashed: bytes
    text: str = ""
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    images: tuple[dict[str, Any], ...] = ()


class Encoder:
    """Turns documents into tokens.

    Attributes:
        names: what names a token, in messages; None where the corpus itself has the ids.
    """

    def __init__(self, config: Config) -> None:
        """Load the tokenizer. Raises CorpusError, ConfigError."""
        self._given = config.corpus.input_ids is not None
        self._tokenizer: CorpusTokenizer | None = None
        self._revision: str | None = None
        self._codebooks = codebooks(files.hf_config(config.model))
        self._name = "" if self._codebooks else config.model.tokenizer or config.model.source
        self._adds = config.corpus.add_special_tokens
        self._sequences = _Sequences()
        self._load_tokenizer(config)
        self._template = self._chat_template(config)
        self._answered = config.answers.source is not None
        self.names = None if self._given or self._tokenizer is None else self._tokenizer.of_class

    def _load_tokenizer(self, config: Config) -> None:
        """The tokenizer, where ids have texts: codes have none. Raises CorpusError, ConfigError."""
        if self._codebooks:
            check_corpus(self._codebooks, config.model.source, self._given)
            if config.model.tokenizer:
                log.info("model.tokenizer is not used: the model reads codes")
            return
        try:
            description = files.describe_tokenizer(config.model)
            self._revision = description.revision
            self._tokenizer = CorpusTokenizer(config, description)
        except TheLoomError as error:
            if not self._given or config.model.tokenizer:
                raise
            log.info(
                "token ids come from the corpus, and no tokenizer tells their texts: %s", error
            )

    def _chat_template(self, config: Config) -> ChatTemplate | None:
        if config.corpus.messages is None:
            return None
        assert self._tokenizer is not None
        if not self._tokenizer.gives_characters:
            raise CorpusError(
                f"corpus.messages: {type(self._tokenizer.of_class).__name__} does not tell the "
                "characters of its tokens, so whose a token is cannot be told; set model.tokenizer "
                "to a fast tokenizer of this model"
            )
        return ChatTemplate(self._tokenizer.of_class, self._name, config.corpus.chat_template)

    def encode(self, group: Sequence[Document]) -> list[Encoded]:
        """The tokens of each document.

        Args:
            group: documents of one corpus, at least one.

        Returns:
            One entry for each document, in their order.

        Raises:
            CorpusError: a conversation or a sequence cannot be encoded, or the tokenizer fails.
        """
        if self._given:
            return [self._of_ids(document) for document in group]
        assert self._tokenizer is not None
        if self._template is not None:
            return self._of_conversations(group, self._template, self._tokenizer)
        texts = [d.text for d in group]
        if group[0].sequence or any(d.sequence for d in group):
            texts = [
                self._sequences.prepared(d, self._tokenizer) if d.sequence else d.text
                for d in group
            ]
        encoded = self._tokenizer.encode(texts)
        for document, (ids, _) in zip(group, encoded, strict=True):
            if document.sequence:
                self._sequences.check(document, ids, self._tokenizer)
        return [
            of_text(document.text, text, tokens)
            for document, text, tokens in zip(group, texts, encoded, strict=True)
        ]

    def _of_ids(self, document: Document) -> Encoded:
        given: list[Any] = document.input_ids or []
        ids: Sequence[Any] = given
        if self._codebooks:
            ids = positions_of(given, self._codebooks, document.place)
        return Encoded(ids, repr(given).encode())

    def encode_targets(self, group: Sequence[Document]) -> list[Encoded]:
        """The tokens of each document's target.

        Args:
            group: documents of a corpus with targets.

        Returns:
            One entry for each document; without tokens where it has no target.

        Raises:
            CorpusError: the tokenizer fails.
        """
        if self._given:
            found = [document.target or [] for document in group]
            return [Encoded([*map(int, ids)], repr(ids).encode()) for ids in found]
        assert self._tokenizer is not None
        texts = [str(document.target or "") for document in group]
        with self._tokenizer.as_target():
            encoded = self._tokenizer.encode(texts)
        return [of_text(text, text, tokens) for text, tokens in zip(texts, encoded, strict=True)]

    def _of_conversations(
        self, group: Sequence[Document], template: ChatTemplate, tokenizer: CorpusTokenizer
    ) -> list[Encoded]:
        """Conversations as texts, with whose each token is. The template writes the BOS."""
        for document in group:
            chat_images.check_none(document)
        rendered = [template.render(document, self._answered) for document in group]
        tokens = tokenizer.encode([r.text for r in rendered], special=False)
        found = []
        for document, one, (ids, characters) in zip(group, rendered, tokens, strict=True):
            check_begin(document, ids, tokenizer)
            encoded = of_text(one.text, one.text, (ids, characters))
            places = (encoded.tables[name] for name in ("char_start", "char_end"))
            encoded.tables |= one.tables(*places)
            found.append(encoded)
        return found

    def add(self, document: Document, found: Encoded, context: int) -> None:
        """Keep what goes with a document that is stored, beside the tables of its tokens: nothing.

        Args:
            document: the document.
            found: what `encode` gave.
            context: tokens of a window at most; 0: no limit.
        """

    def columns(self) -> dict[str, ColumnPieces]:
        """What goes with each document, beside the corpus' columns.

        Returns:
            By name; empty.
        """
        return {}

    def special(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The table of special tokens.

        Args:
            ids: token ids, (tokens,).

        Returns:
            `special`: 1 for a special token, else 0, (tokens,) of uint8. Empty without a tokenizer.
        """
        if self._tokenizer is None:
            return {}
        return {"special": np.isin(ids, [*self._tokenizer.special_ids]).astype("u1")}

    def decoded(
        self, before: Sequence[int], ids: Sequence[int]
    ) -> tuple[str, np.ndarray | None] | None:
        """The text of ids that follow others.

        Args:
            before: the token ids before them.
            ids: token ids.

        Returns:
            The text, and the first character of each token with the one after its last, (tokens, 2)
            of int32, or None where the tokenizer does not tell them. None without a tokenizer.
        """
        return None if self._tokenizer is None else self._tokenizer.decoded(before, ids)

    def continued(self, before: Sequence[int], text: str, more: str) -> list[int] | None:
        """The tokens of a text that follows the tokens of another one.

        Args:
            before: the token ids of `text`.
            text: the text before.
            more: the text that follows it.

        Returns:
            Token ids of `more`; None where they cannot be told, or there is no tokenizer.
        """
        return None if self._tokenizer is None else self._tokenizer.continued(before, text, more)

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each token id.

        Args:
            ids: token ids.

        Returns:
            By id, each by itself; empty where there is no tokenizer.
        """
        if self._tokenizer is None:
            return {}
        known = [i for i in ids if i < len(self._tokenizer)] if self._given else ids
        return self._tokenizer.texts(known)

    def attributes(self) -> dict[str, Any]:
        """What `tokens.h5` says of the tokenizer.

        Returns:
            Attributes by name; empty texts and zeros stand for what is not known.
        """
        tokenizer = self._tokenizer
        return {
            "tokenizer": self._name,
            "tokenizer_revision": self._revision,
            "tokenizer_class": "" if tokenizer is None else type(tokenizer.of_class).__name__,
            "tokenizer_difference": "" if tokenizer is None else tokenizer.difference,
            "vocab_size": 0 if tokenizer is None else len(tokenizer),
            "characters": self._characters(),
            "assistant_tokens": "" if self._template is None else self._template.assistant,
        }

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether a text begins with the token that the tokenizer puts before it.

        Args:
            ids: the tokens of the text.

        Returns:
            False too where the tokenizer puts none before it, and for what it has not encoded.
        """
        if self._tokenizer is None or self._given or self._template is not None:
            return False
        return self._adds and self._tokenizer.begins_twice(ids)

    def report(self, doubled: int) -> None:
        """Warn of what shows when all documents are read.

        Args:
            doubled: documents for which `begins_twice`.
        """
        if self._tokenizer is not None:
            self._tokenizer.report_doubled(doubled)

    def _characters(self) -> str:
        if self._given:
            return "none: the corpus has token ids"
        assert self._tokenizer is not None
        if not self._tokenizer.gives_characters:
            return f"none: {type(self._tokenizer.of_class).__name__} does not tell them"
        return "of the text" if self._template is None else "of the rendered conversation"


def check_begin(document: Document, ids: Sequence[int], tokenizer: CorpusTokenizer) -> None:
    """Check that a conversation does not begin with the token that begins a text twice.

    Args:
        document: the conversation.
        ids: its tokens.
        tokenizer: of the run.

    Raises:
        CorpusError: it does.
    """
    if tokenizer.begins_twice(ids):
        raise CorpusError(
            f"{document.place}: document {printable(document.id)!r} begins with the token "
            "that begins a text twice; take it out of the chat template or of the message"
        )


def of_text(text: str, taken: str, tokens: Encoding) -> Encoded:
    """The tokens of a text.

    Args:
        text: the document's.
        taken: as the tokenizer took it, with spaces between its letters.
        tokens: as it gave them.

    Returns:
        Ids and characters.
    """
    ids, characters = tokens
    if not text:
        ids, characters = [], characters and []
    tables = {}
    if characters is not None:
        places = np.array(characters, "<i4").reshape(-1, 2)
        if len(taken) > len(text):
            places = (places + np.array([0, 1], "<i4")) // 2
        none = places[:, 0] >= places[:, 1]
        places[none] = -1
        tables = {"char_start": places[:, 0], "char_end": places[:, 1]}
    return Encoded(ids, text.encode(), text, tables)


class _Sequences:
    """Sequences of FASTA as a tokenizer wants them: with a space between letters where its tokens
    are words of one letter, as those of ProtBert and ProtT5, and then rare residues as X; and in
    upper case where it knows no other, as files have regions in lower case that a search left out.
    """

    def __init__(self) -> None:
        self._spaced: bool | None = None
        self._upper: dict[str, str] = {}  # by letter of lower case, what is taken for it

    def prepared(self, document: Document, tokenizer: CorpusTokenizer) -> str:
        """The text that the tokenizer takes."""
        text = self._in_known_case(document.text, tokenizer)
        if self._spaced is None and text:
            self._spaced = _wants_spaces(text, tokenizer)
            if self._spaced:
                log.info(
                    "FASTA: the tokenizer takes letters as words, so each gets a space after it, "
                    "and U, Z and O become X"
                )
        if not self._spaced:
            return text
        return " ".join(re.sub("[UZO]", "X", text))

    def _in_known_case(self, text: str, tokenizer: CorpusTokenizer) -> str:
        """A sequence with lower-case letters in upper case where the tokenizer lacks them alone."""
        new = sorted({c for c in text if "a" <= c <= "z"} - self._upper.keys())
        if new:
            known = [
                bool(ids) and not tokenizer.unknown(ids)
                for ids, _ in tokenizer.encode([*new, *(c.upper() for c in new)], special=False)
            ]
            had = any(c != taken for c, taken in self._upper.items())
            for c, lower, upper in zip(new, known, known[len(new) :], strict=False):
                self._upper[c] = c.upper() if not lower and (upper or c in "uzo") else c
            if not had and any(self._upper[c] != c for c in new):
                log.info(
                    "FASTA: the tokenizer lacks lower-case letters, so those of masked regions are "
                    "taken in upper case"
                )
        return text.translate({ord(c): letter for c, letter in self._upper.items()})

    def check(self, document: Document, ids: Sequence[int], tokenizer: CorpusTokenizer) -> None:
        """Check that the tokenizer knows all letters. Raises CorpusError."""
        text = self._in_known_case(document.text, tokenizer)
        plain = len([i for i in ids if i not in tokenizer.special_ids])
        if not tokenizer.unknown(ids) and not (self._spaced and plain != len(text)):
            return
        letters = list(dict.fromkeys(text))
        found = zip(letters, tokenizer.encode(letters, special=False), strict=True)
        wrong = [c for c, (one, _) in found if not one or tokenizer.unknown(one)]
        if not wrong and not (self._spaced and plain != len(text)):
            return  # the token of what is unknown is also one that begins or ends a text
        raise CorpusError(
            f"{document.place}: the tokenizer has no {printable(', '.join(wrong)[:80]) or 'tokens'}"
            f" of the sequence {printable(document.id[:80])!r}; write it in the letters of the "
            "model, or leave it out"
        )


def _wants_spaces(text: str, tokenizer: CorpusTokenizer) -> bool:
    """Whether a tokenizer knows a sequence with spaces alone, and then letter by letter."""
    some = re.sub("[UZO]", "X", (text * 2)[:64])  # two letters at least
    (joined, _), (spaced, _) = tokenizer.encode([some, " ".join(some)], special=False)
    by_letter = len(spaced) == len(some) and not tokenizer.unknown(spaced)
    return by_letter and (tokenizer.unknown(joined) or len(joined) != len(some))
