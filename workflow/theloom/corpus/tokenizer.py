"""The tokenizer of a run: the class of transformers, or `tokenizer.json` as it stands.

transformers rebuilds parts of some tokenizers from their class, and then gives other token ids than
the file that came with the model. Both are tried on the first texts, and a difference is said.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.schema import Config
from theloom.errors import ConfigError, CorpusError
from theloom.model.files import Description

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

COMPARED = 64  # texts of the corpus

Encoding = tuple[list[int], list[tuple[int, int]] | None]
"""Token ids, and the characters of each, from and to; None where the tokenizer cannot tell."""

PROBE = (
    "In 2023, 12345 cats didn't   cost $1,299.99 — they'd paid.\n\n\tnaïve Zoë's café: "
    "ünïcödé 東京は日本。한국어 Привет мир مرحبا 🧵👩‍💻 x_1=(a+b)**2;\r\n I'M HERE\u00a0now"
)
_CONTEXT = 8  # tokens before others by which their text is told
_SHOWN = 8  # token ids of an example


class CorpusTokenizer:
    """Turns texts into token ids.

    Attributes:
        of_class: the tokenizer as transformers makes it.
        difference: the first example of other ids by `tokenizer.json`; empty: none was found.
    """

    def __init__(self, config: Config, description: Description) -> None:
        """Load a tokenizer. Raises CorpusError, ConfigError."""
        self._name = config.model.tokenizer or config.model.source
        self._special = config.corpus.add_special_tokens
        self._by_file = config.corpus.tokenizer_from.name == "file"
        self.of_class = self._of_class(config, description)
        self._of_file = None if description.gguf_file else self._load_file(description.folder)
        if self._by_file and self._of_file is None:
            raise ConfigError(
                f"corpus.tokenizer_from=file: {self._name} has no tokenizer.json; leave it at class"
            )
        self.difference, self._compared = "", False

    def encode(self, texts: Sequence[str], special: bool = True) -> list[Encoding]:
        """The tokens of each text; the first call compares class and file.

        Args:
            texts: the texts.
            special: whether the tokenizer adds its special tokens, if `corpus.add_special_tokens`
                says so, too.

        Returns:
            The token ids of each text, and their characters, in the order of the texts.
        """
        found: list[Encoding] = self._safely(texts, self._by_file, special, self._with_characters)
        if self._of_file is not None and not self._compared:
            taken = texts[:COMPARED]
            ids = [ids for ids, _ in found[:COMPARED]] if special else self._ids(taken)
            self._compare([*taken, PROBE], [*ids, *self._ids([PROBE])])
        self._compared = True
        return found

    @contextmanager
    def as_target(self) -> Iterator[None]:
        """Within the context texts are encoded as those of a decoder, where a tokenizer makes a
        difference: Marian's has two vocabularies of pieces, others begin with the language.

        Raises:
            ConfigError: `tokenizer.json` as it stands makes none.
        """
        of_class: Any = self.of_class
        into = getattr(of_class, "_switch_to_target_mode", None)
        if into is not None and getattr(of_class, "tgt_lang", "") is None:
            log.warning("%s has no tgt_lang: targets are encoded as sources are", self._name)
            into = None
        if into is None:
            yield
            return
        if self._by_file:
            raise ConfigError(
                f"corpus.tokenizer_from=file: {type(of_class).__name__} encodes targets otherwise "
                "than sources, and its file does not; leave it at class"
            )
        into()
        try:
            yield
        finally:
            of_class._switch_to_input_mode()

    @property
    def gives_characters(self) -> bool:
        """Whether it tells of which characters a token is."""
        return self._by_file or bool(self.of_class.is_fast)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all tokens that stand for no text."""
        added: Any = self.of_class.added_tokens_decoder
        if self._by_file and self._of_file is not None:
            added = self._of_file.get_added_tokens_decoder()
        ids = (number for number, token in added.items() if token.special)
        return frozenset([*self.of_class.all_special_ids, *ids])

    def unknown(self, ids: Sequence[int]) -> bool:
        """Whether the token of what the tokenizer does not know is among ids.

        Args:
            ids: token ids of a text.

        Returns:
            True where it is; False too where the tokenizer has no such token.
        """
        return self.of_class.unk_token_id in ids

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether ids begin with two tokens that begin a text.

        Args:
            ids: token ids of a text.

        Returns:
            True where both are there.
        """
        first = (self.of_class.bos_token_id, self.of_class.cls_token_id)
        return len(ids) > 1 and ids[0] == ids[1] and ids[0] in first

    def report_doubled(self, doubled: int) -> None:
        """Warn where texts begin with the token that the tokenizer puts before them.

        Args:
            doubled: how many do.
        """
        if doubled:
            log.warning(
                "%d documents begin with %s, and the tokenizer puts another one before it; "
                "set corpus.add_special_tokens=false, or leave it out of the texts",
                doubled,
                self.of_class.bos_token or self.of_class.cls_token,
            )

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each token id by itself, leading space kept.

        Args:
            ids: token ids.

        Returns:
            By id; empty, after a warning, where the tokenizer cannot tell.
        """
        try:
            if self._by_file and self._of_file is not None:
                decode = self._of_file.decode
                return {i: decode([i], skip_special_tokens=False) for i in ids}
            plain = {"clean_up_tokenization_spaces": False}
            return {i: str(self.of_class.decode([i], **plain)) for i in ids}
        except Exception as error:  # tokenizers of a model's own code raise what they like
            log.warning("%s gives no texts of single tokens: %s", self._name, error)
            return {}

    def decoded(self, before: Sequence[int], ids: Sequence[int]) -> tuple[str, np.ndarray | None]:
        """The text of ids that follow others.

        Args:
            before: the token ids before them.
            ids: token ids.

        Returns:
            The text, and the first character of each token with the one after its last, (tokens, 2)
            of int32; None where the tokenizer does not tell them. A character of several tokens is
            the last one's.
        """
        from tokenizers.decoders import DecodeStream

        fast: Any = self._of_file if self._by_file else getattr(self.of_class, "_tokenizer", None)
        if fast is None or not self.gives_characters:
            return str(self.of_class.decode(list(ids), clean_up_tokenization_spaces=False)), None
        stream = DecodeStream(skip_special_tokens=False)
        for token in before[-_CONTEXT:]:
            stream.step(fast, token)
        pieces = [stream.step(fast, token) or "" for token in ids]
        ends = np.cumsum([len(piece) for piece in pieces]).astype("<i4")
        places = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1) if pieces else ends
        return "".join(pieces), places.reshape(-1, 2).astype("<i4")

    def continued(self, before: Sequence[int], text: str, more: str) -> list[int] | None:
        """The tokens of a text that follows the tokens of another one.

        Args:
            before: the token ids of `text`.
            text: the text before; empty: there is none.
            more: the text that follows it.

        Returns:
            Token ids of `more`; None where the text of both has other tokens, and those of `more`
            alone another text.
        """
        if text:
            ((whole, _),) = self.encode([text + more], special=False)
            start = len(before) - len(self.encode([text], special=False)[0][0])
            rest = [*before[:start], *whole]
            if rest[: len(before)] == [*before]:
                return rest[len(before) :]
        ((alone, _),) = self.encode([more], special=False)
        return alone if self.decoded(before, alone)[0] == more else None

    def __len__(self) -> int:
        return self._of_file.get_vocab_size() if self._by_file else len(self.of_class)  # type: ignore[union-attr]

    def _of_class(self, config: Config, description: Description) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                description.folder,
                gguf_file=description.gguf_file,
                trust_remote_code=config.model.trust_remote_code,
            )
        except Exception as error:  # whatever libraries raise at files is a fault of theirs
            raise CorpusError(
                f"model.tokenizer: {self._name} has no usable tokenizer: "
                f"{' '.join(str(error).split())}"
            ) from None
        if description.gguf_file is None:
            self._check_vocabulary(found, description.folder)
        return found

    def _check_vocabulary(self, found: "PreTrainedTokenizerBase", folder: Path) -> None:
        """A class whose files are missing would begin with an empty vocabulary."""
        if (folder / "tokenizer.json").is_file() or (folder / "tekken.json").is_file():
            return
        names = found.vocab_files_names
        needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise CorpusError(
                f"model.tokenizer: {self._name} has no usable tokenizer: neither tokenizer.json "
                f"nor {' and '.join(missing)} is there; fetch it, or set model.tokenizer"
            )

    def _load_file(self, folder: Path) -> "Tokenizer | None":
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            return None
        try:
            found = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise CorpusError(
                f"model.tokenizer: tokenizer.json of {self._name} cannot be read: {error}"
            ) from None
        found.no_truncation()
        found.no_padding()
        return found

    def _ids(
        self, texts: Sequence[str], by_file: bool | None = None, special: bool = True
    ) -> list[list[int]]:
        """Token ids by the file or by the class; by what the run takes where it is not said."""
        by_file = self._by_file if by_file is None else by_file
        return self._safely(texts, by_file, special, self._encoded)

    def _safely(
        self, texts: Sequence[str], by_file: bool, special: bool, encode: Callable[..., list[Any]]
    ) -> list[Any]:
        try:
            return encode(texts, by_file, special and self._special)
        except BaseException as error:  # native code that gives up raises a PanicException
            if isinstance(error, MemoryError) or not (
                isinstance(error, Exception) or type(error).__name__ == "PanicException"
            ):
                raise
            raise CorpusError(
                f"model.tokenizer: {self._name} fails on a text of the corpus: "
                f"{' '.join(str(error).split())[:300]}; take the tokenizer from its maker, or set "
                "model.tokenizer to another one of this model"
            ) from None

    def _encoded(self, texts: Sequence[str], by_file: bool, special: bool) -> list[list[int]]:
        if by_file and self._of_file is not None:
            encoded = self._of_file.encode_batch(list(texts), add_special_tokens=special)
            return [e.ids for e in encoded]
        of_class: Any = self.of_class
        return list(of_class(list(texts), add_special_tokens=special, verbose=False)["input_ids"])

    def _with_characters(
        self, texts: Sequence[str], by_file: bool, special: bool
    ) -> list[Encoding]:
        if by_file and self._of_file is not None:
            encoded = self._of_file.encode_batch(list(texts), add_special_tokens=special)
            return [(e.ids, e.offsets) for e in encoded]
        if not self.gives_characters:
            return [(ids, None) for ids in self._encoded(texts, by_file, special)]
        of_class: Any = self.of_class
        found = of_class(
            list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _compare(self, texts: list[str], taken: list[list[int]]) -> None:
        """Warn of the first text to which class and file give other ids; `taken`: those that the
        run takes.
        """
        others = self._ids(texts, not self._by_file)
        for text, ours, other in zip(texts, taken, others, strict=True):
            if ours == other:
                continue
            pair = (other, ours) if self._by_file else (ours, other)
            shown, by_class, by_file = self._example(text) or (text[:40], *pair)
            self.difference = (
                f"{shown!r}: {by_class[:_SHOWN]} by the class, {by_file[:_SHOWN]} by the file"
            )
            log.warning(
                "%s gives other token ids than tokenizer.json (%s); the run takes those of the %s "
                "(corpus.tokenizer_from)",
                type(self.of_class).__name__,
                self.difference,
                "file" if self._by_file else "class",
            )
            return

    def _example(self, text: str) -> tuple[str, list[int], list[int]] | None:
        """A word by itself, where its ids differ, with the ids by class and by file."""
        words = [*dict.fromkeys(f" {word}" for word in text.split())]
        pairs = (self._ids(words, by_file, special=False) for by_file in (False, True))
        found = zip(words, *pairs, strict=True)
        return next(((w, a, b) for w, a, b in found if a != b), None)
