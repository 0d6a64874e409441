"""What a vision-language model is given for windows of conversations beside their token ids: read
again from the corpus' images, and checked to be of the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.schema import CorpusConfig, CorpusKind, ModelConfig
from theloom.corpus.media.chat_images import Pictures
from theloom.corpus.media.chats import processor_of
from theloom.model.towers.chat_processor import ChatProcessor
from theloom.model.towers.processor import check_same
from theloom.rows.modality import INPUT_IMAGES
from theloom.rows.roles import code
from theloom.store import file_format
from theloom.store.tables.columns import Column
from theloom.store.tables.columns import read as read_columns

if TYPE_CHECKING:
    import torch

IdsOf = Callable[[int], np.ndarray]
"""The token ids of a window by its number, (tokens,)."""


class ChatInputs:
    """The pixels of each window's images, and what goes with them.

    Args:
        columns: of the corpus, by name.
        window_document: number of each window's document within these columns, (windows,).
        ids_of: gives a window's token ids.
        model: the `model` settings.
        corpus: the `corpus` settings of the run, as its files keep them.
        processor_hash: of the processor by which the tokens were made.
    """

    lengths = None  # rows are those of the windows

    def __init__(
        self,
        columns: Mapping[str, Column],
        window_document: np.ndarray,
        ids_of: IdsOf,
        model: ModelConfig,
        corpus: Mapping[str, Any],
        processor_hash: str,
    ) -> None:
        self._column, self._document = columns[INPUT_IMAGES], window_document
        self._ids_of, self._model, self._hash = ids_of, model, processor_hash
        self._corpus = CorpusConfig(
            kind=CorpusKind[corpus["kind"]],
            path=corpus["path"],
            messages=corpus["messages"],
            images=corpus.get("images"),
        )
        self._pictures = Pictures(self._corpus)

    @cached_property
    def _processor(self) -> ChatProcessor:
        found = processor_of(self._model)
        check_same(found.digest, self._hash, self._model.source)
        return found

    @property
    def alike(self) -> np.ndarray:
        """A number for each window: those without images may share a pass, all others go alone."""
        shown = (self._column.values != b"[]")[self._document]
        return np.where(shown, np.arange(1, len(shown) + 1), 0)

    def of(self, windows: Sequence[int]) -> "dict[str, torch.Tensor]":
        """The model's inputs for some windows, beside their ids.

        Args:
            windows: their numbers: one with images, or any without.

        Returns:
            By name in the model's forward; empty where there are no images.

        Raises:
            CorpusError: an image is no longer what it was.
        """
        documents = np.array([int(self._document[w]) for w in windows])
        shown = [found for found in self._column.part(documents).tolist() if found]
        if not shown:
            return {}
        (window,), (described,) = windows, shown
        read = [self._pictures.read(one) for one in described]
        place = f"document {int(documents[0])} of the shard"
        ids = self._ids_of(window).tolist()
        return self._processor.inputs(ids, [one.opened for one in read], place)


def with_images(
    path: Path, model: ModelConfig, shortest: bool = False
) -> "Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]":
    """The documents with images that may take the most memory: the one with most tokens, and the
    one with most tokens of images.

    Args:
        path: of `tokens.h5`.
        model: the `model` settings.
        shortest: the one with the fewest tokens instead.

    Yields:
        Token ids, (tokens,), and the model's inputs beside them; nothing where no document has an
        image.

    Raises:
        CorpusError: an image is no longer what it was.
    """
    with file_format.open_h5(path, "tokens") as file:
        if not file.attrs.get("images"):
            return
        ids, offsets = file["tokens/input_ids"], file["windows/offset"][:]
        shown = np.add.reduceat(file["tokens/role"][:] == code("image"), offsets[:-1], dtype="<i8")
        lengths = np.where(shown > 0, np.diff(offsets), 0)
        most = {int(lengths.argmax()), int(shown.argmax())}
        chosen = {int(np.where(shown > 0, lengths, lengths.max()).argmin())} if shortest else most
        listed = json.loads(file.attrs["columns"])
        documents = len(file["documents/offset"]) - 1
        columns = read_columns(lambda n: file[n][:] if n in file else None, listed, documents)
        inputs = ChatInputs(
            columns,
            file["windows/document"][:],
            lambda window: ids[offsets[window] : offsets[window + 1]],
            model,
            json.loads(file.attrs["config"])["corpus"],
            str(file.attrs["processor_hash"]),
        )
        for window in sorted(chosen):
            yield ids[offsets[window] : offsets[window + 1]], inputs.of([window])
