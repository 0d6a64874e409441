"""Documents that are answered: what `tokens.h5` keeps of them beside their tokens.

`prompts/text` are their texts, as the characters of tokens count; `prompts/given` is what
`answers.column` holds for each, as JSON.
"""

import dataclasses
import json
from typing import Any

import h5py

from theloom.config.schema import Config
from theloom.corpus.documents import settings
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, printable
from theloom.store.tables import texts

TEXT, GIVEN = "prompts/text", "prompts/given"


class Prompts:
    """Collects the documents of a run with answers.

    Args:
        config: the settings of the stage.
        context: tokens of the longest window; 0: no limit.

    Attributes:
        corpus: the `corpus` settings by which documents are read.
    """

    def __init__(self, config: Config, context: int) -> None:
        self._context = context
        self._column = config.answers.column
        self.corpus = settings(config.corpus)
        if self._column is not None:
            self.corpus.columns.append(self._column)
        self._texts: list[str] = []
        self._given: list[str] = []

    def split(self, document: Document) -> tuple[Document, Any]:
        """Take what `answers.column` holds out of a document.

        Args:
            document: as it is read by `corpus`.

        Returns:
            The document with the corpus' own columns, and the answers; None without
            `answers.column`.
        """
        if self._column is None:
            return document, None
        *own, given = document.columns
        return dataclasses.replace(document, columns=tuple(own)), given

    def add(self, document: Document, tokens: int, text: str, given: Any) -> None:
        """Take the next document that has tokens.

        Args:
            document: as `split` gives it.
            tokens: how many it has.
            text: the text whose characters its tokens have.
            given: what `answers.column` holds for it.

        Raises:
            CorpusError: the context leaves no room for an answer, or the column holds none.
        """
        if self._context and tokens >= self._context:
            raise CorpusError(
                f"{document.place}: document {printable(document.id)!r} has {tokens} tokens, and "
                f"the context of {self._context} leaves no room for an answer; shorten it, or "
                "raise corpus.context_length where the model allows more"
            )
        self._texts.append(text)
        if self._column is not None:
            if given is None:
                raise CorpusError(
                    f"{document.place}: document {printable(document.id)!r} has no answer in "
                    f"column {self._column!r}; give it one, or leave the document out"
                )
            self._given.append(json.dumps(given, ensure_ascii=False))

    def write(self, file: h5py.File) -> None:
        """Write the datasets into an open file.

        Args:
            file: `tokens.h5`.
        """
        texts.write(file, TEXT, self._texts)
        if self._column is not None:
            texts.write(file, GIVEN, self._given)
