"""Images and audio as documents of `tokens.h5`: a row for each patch or frame. A row's id is its
number in the document.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from theloom.config.schema import Config
from theloom.corpus.media.items import Item
from theloom.corpus.media.read import Read, Reader
from theloom.model import files
from theloom.store.tables.columns import ColumnPieces


class Encoder:
    """Turns images or clips into rows.

    Args:
        config: the settings of the stage.

    Raises:
        ModelError: the model has no processor, or does not read the corpus' kind.
        CorpusError: a package is missing that reads the files.
    """

    names = None

    def __init__(self, config: Config) -> None:
        self._reader = Reader(config)
        self._source = config.model.source
        self._revision = files.describe(config.model).revision

    def encode(self, item: Item) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The rows of one document; what it is of is kept for `columns`.

        Args:
            item: the file.

        Returns:
            Their numbers, (rows,) int32, and the table `special`: of an image the class token and
            registers, of a clip the frames behind its end. Empty for a clip without samples.

        Raises:
            CorpusError: it is damaged, or not as the model takes it.
        """
        found = self._reader.read(item)
        if found is None:
            return np.empty(0, "<i4"), {}
        self._reader.add(found)
        return np.arange(found.rows, dtype="<i4"), self._special(found)

    def _special(self, found: Read) -> dict[str, np.ndarray]:
        reader, count = self._reader, found.rows
        special = np.zeros(count, "u1")
        real = reader.counts.real_rows(found.inputs)
        if real is not None:
            special[real:] = 1
        elif reader.processor.packed:
            pass  # patches alone
        elif reader.kind == "images":
            before = reader.counts.before_patches(found.inputs)
            if before is None:
                return {}
            special[:before] = 1
        elif reader.longest is not None and reader.counts.in_time:
            special[-(-found.size * count // reader.longest) :] = 1
        return {"special": special}

    def columns(self) -> dict[str, ColumnPieces]:
        """What the rows of each document are of.

        Returns:
            By name: the file, the hash of its bytes, and the shape of what the processor made.
        """
        return self._reader.columns()

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """What stands for each row in figures and tables.

        Args:
            ids: numbers of rows.

        Returns:
            The number of each, as a text.
        """
        return {i: str(i) for i in ids}

    def attributes(self) -> dict[str, Any]:
        """What `tokens.h5` says of the rows.

        Returns:
            Attributes by name, as of texts; `processor` and `processor_hash` besides.
        """
        kind = "patches" if self._reader.kind == "images" else "frames"
        return {
            "tokenizer": self._source,
            "tokenizer_revision": self._revision,
            "tokenizer_class": "",
            "tokenizer_difference": "",
            "vocab_size": 0,
            "characters": f"none: rows are {kind}",
            "assistant_tokens": "",
            **self._reader.attributes(),
        }

    def report(self, doubled: int) -> None:
        """Nothing is left to say when all documents are read.

        Args:
            doubled: 0.
        """

    def checked(self, item: Item) -> None:
        """Check that the files of a run can hold a document's id.

        Args:
            item: the file.

        Raises:
            CorpusError: its name is no text, or very long.
        """
        self._reader.checked(item)

    def hashed(self, item: Item) -> bytes:
        """What a change of the document, or of the processor, would change.

        Args:
            item: the file.

        Returns:
            Bytes to be hashed.
        """
        return self._reader.hashed(item)
