"""Conversations with images as documents of `tokens.h5`: the processor's tokens, whose each is, and
of which images those are that stand for one.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from theloom.config.schema import Config
from theloom.corpus.chat import ChatTemplate, Rendered
from theloom.corpus.columns import of_strings
from theloom.corpus.encoding import Encoded, Encoder, check_begin, of_text
from theloom.corpus.media import values
from theloom.corpus.media.chat_images import Picture, pictures, without_sources
from theloom.corpus.rows import Document
from theloom.corpus.spooled.spool import Strings
from theloom.corpus.tokenizer import CorpusTokenizer
from theloom.errors import CorpusError, printable
from theloom.model import files
from theloom.model.towers.chat_processor import ChatProcessor, Placed, load_chat_processor
from theloom.rows import roles
from theloom.rows.modality import INPUT_IMAGES
from theloom.store.tables.columns import ColumnPieces


def processor_of(config: Any) -> ChatProcessor:
    """The processor of a run's vision-language model.

    Args:
        config: the `model` settings.

    Returns:
        That of the model's folder.

    Raises:
        ModelError: there is none, or it is broken.
    """
    folder = files.describe(config).folder
    return load_chat_processor(folder, files.hf_config(config).model_type, config.source)


class ChatEncoder(Encoder):
    """Turns conversations with images into tokens, and keeps which images those are.

    Args:
        config: the settings of the stage.

    Raises:
        CorpusError: Pillow is missing.
        ModelError: the model has no vision part, or no processor.
    """

    def __init__(self, config: Config) -> None:
        values.check_installed("images")
        self._processor, self._corpus = processor_of(config.model), config.corpus
        self._kept = Strings()
        self._images = 0
        super().__init__(config)

    def _of_conversations(
        self, group: Sequence[Document], template: ChatTemplate, tokenizer: CorpusTokenizer
    ) -> list[Encoded]:
        return [
            self._of_conversation(d, template.render(without_sources(d)), tokenizer) for d in group
        ]

    def _of_conversation(
        self, document: Document, rendered: Rendered, tokenizer: CorpusTokenizer
    ) -> Encoded:
        """The tokens of a conversation, and the tables of their characters, roles and messages.

        Characters are those of the rendered conversation, in which an image is one placeholder.
        """
        shown = pictures(document, self._corpus) if rendered.text else []
        place = f"{document.place}: document {printable(document.id)!r}"
        special = self._corpus.add_special_tokens and self._processor.adds_special(rendered.text)
        if not shown:
            (tokens,) = tokenizer.encode([rendered.text], special=special)
            found = of_text(rendered.text, rendered.text, tokens)
            check_begin(document, found.ids, tokenizer)
            count = int((self._processor.types(found.ids) != 0).sum()) if found.ids else 0
            if count:
                raise CorpusError(
                    f"{place}: its text has {count} placeholders of images and the messages have 0 "
                    "images; take the placeholders out of the text"
                )
            return _with_roles(found, rendered)
        placed = self._processor.place(rendered.text, [p.opened for p in shown], special, place)
        (tokens,) = tokenizer.encode([placed.text], special=special)
        found = of_text(placed.text, placed.text, tokens)
        if [*found.ids] != placed.ids:
            raise CorpusError(
                f"{place}: the tokenizer gives {len(found.ids)} other tokens than the model's own "
                f"processor ({len(placed.ids)}); set corpus.tokenizer_from=class, or report it"
            )
        check_begin(document, found.ids, tokenizer)
        self._check_again(placed, shown, place)
        starts = _moved_back(found, placed)
        found = _with_roles(found, rendered)
        stands = self._processor.types(found.ids) == 1
        of_image = np.searchsorted(placed.spans[:, 1, 1], starts[stands], "right")
        found.tables["role"][stands] = roles.code("image")
        found.tables["message"][stands] = np.array([p.message for p in shown], "<i4")[of_image]
        found.text = rendered.text
        found.images = tuple(p.described for p in shown)
        parts = [rendered.text, self._processor.digest, *(p.digest for p in shown)]
        found.hashed = "\0".join(parts).encode()
        return found

    def _check_again(self, placed: Placed, shown: Sequence[Picture], place: str) -> None:
        """Check that what extraction will make of ids and images is what the processor makes of
        text and images. Raises CorpusError.
        """
        again = self._processor.inputs(placed.ids, [p.opened for p in shown], place)
        same = again.keys() == placed.inputs.keys() and all(
            again[n].shape == v.shape and bool((again[n] == v).all())
            for n, v in placed.inputs.items()
        )
        if not same:
            raise CorpusError(
                f"{place}: the processor makes something else of its images with the text than "
                "without it, so that its rows cannot be computed from tokens and images"
            )

    def add(self, document: Document, found: Encoded, context: int) -> None:
        """Keep which images a document has, that is stored.

        Args:
            document: the document.
            found: what `encode` gave.
            context: tokens of a window at most; 0: no limit.

        Raises:
            CorpusError: it is longer than a window, and has images.
        """
        if found.images and context and len(found.ids) > context:
            raise CorpusError(
                f"{document.place}: document {printable(document.id)!r} has {len(found.ids):,} "
                f"tokens with its images, and one with images goes in one window of at most "
                f"{context:,}; shorten it, or raise corpus.context_length where the model allows it"
            )
        self._images += len(found.images)
        self._kept.append(json.dumps(found.images, separators=(",", ":")))

    def columns(self) -> dict[str, ColumnPieces]:
        """Which images each document has.

        Returns:
            By the name of the column: a list for each document.
        """
        return {INPUT_IMAGES: of_strings("json", self._kept)}

    def attributes(self) -> dict[str, Any]:
        """What `tokens.h5` says of the images.

        Returns:
            As of texts; the processor and its hash, and how many images there are.
        """
        return super().attributes() | {
            "processor": type(self._processor.own).__name__,
            "processor_hash": self._processor.digest,
            "images": self._images,
        }


def _with_roles(found: Encoded, rendered: Rendered) -> Encoded:
    places = (found.tables[name] for name in ("char_start", "char_end"))
    found.tables |= rendered.tables(*places)
    return found


def _moved_back(found: Encoded, placed: Placed) -> np.ndarray:
    """Turn characters of the text with the images' tokens into those of the rendered one.

    Returns the first characters as they were, (tokens,).
    """
    old, new = placed.spans[:, 0], placed.spans[:, 1]
    starts = found.tables["char_start"]
    for name, side in (("char_start", 0), ("char_end", 1)):
        at = found.tables[name].astype("<i8")
        begun = np.searchsorted(new[:, 0], at, "left" if side else "right")
        image = np.maximum(begun - 1, 0)
        within = (begun > 0) & (at < new[image, 1] + side)
        behind = np.where(begun > 0, old[image, 1] - new[image, 1], 0)
        moved = np.where(within, old[image, side], at + behind)
        found.tables[name] = np.where(at < 0, at, moved).astype("<i4")
    return starts
