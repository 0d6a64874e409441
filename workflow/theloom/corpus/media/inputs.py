"""What a tower is given for windows of a shard or a dataset: read again from the corpus' files, and
checked to be what the rows were planned by.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.schema import CorpusConfig, CorpusKind, ModelConfig
from theloom.corpus.media import places
from theloom.corpus.media.chat_inputs import ChatInputs, IdsOf
from theloom.corpus.media.items import Item
from theloom.corpus.media.read import COLUMNS, processor_of, value_of
from theloom.corpus.targets.sources import heard, lengths_of
from theloom.errors import CorpusError, printable
from theloom.model.towers.decoder import given_inputs
from theloom.model.towers.processor import check_same
from theloom.rows.modality import INPUT_FILE, INPUT_IMAGES, INPUT_SHAPE
from theloom.store.tables.columns import Column

if TYPE_CHECKING:
    import torch


class Inputs:
    """The input of each window.

    Args:
        columns: of the corpus, by name.
        window_document: number of each window's document within these columns, (windows,).
        model: the `model` settings.
        corpus: the `corpus` settings of the run, as its files keep them.
        processor_hash: of the processor by which the rows were counted.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        window_document: np.ndarray,
        model: ModelConfig,
        corpus: Mapping[str, Any],
        processor_hash: str,
    ) -> None:
        self._columns, self._document = columns, window_document
        self._model, self._hash = model, processor_hash
        self._corpus = CorpusConfig(
            kind=CorpusKind[corpus["kind"]],
            **{key: corpus[key] for key in ("path", "dataset", "subset", "split", "column")},
        )
        self._store = places.store(self._corpus)

    @property
    def lengths(self) -> np.ndarray | None:
        """Rows that an encoder makes of each window's source, (windows,) int64; None where the rows
        are those of the windows.
        """
        return lengths_of(self._columns, self._document)

    @cached_property
    def _processor(self) -> Any:
        found = processor_of(self._model)
        check_same(found.digest, self._hash, self._model.source)
        return found

    @property
    def alike(self) -> np.ndarray:
        """A number for the shape of each window's input: those of one may share a pass. Images of
        packed patches go alone.
        """
        if self._processor.packed:
            return np.arange(len(self._document))
        shapes = self._columns[INPUT_SHAPE].values
        return np.unique(shapes, return_inverse=True)[1].reshape(-1)[self._document]

    def of(self, windows: Sequence[int]) -> "dict[str, torch.Tensor]":
        """The model's input for some windows.

        Args:
            windows: their numbers, all of one shape.

        Returns:
            By name in the model's forward, (windows, …), floats in FP32.

        Raises:
            CorpusError: a file is no longer what it was.
        """
        import torch

        documents = np.array([int(self._document[w]) for w in windows])
        names, digests, shapes = (self._columns[n].part(documents).tolist() for n in COLUMNS)
        found = [self._one(*one) for one in zip(names, digests, shapes, strict=True)]
        made = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        return given_inputs(made) if heard(self._columns) else made

    def _one(self, name: str, digest: str, shape: list[int]) -> "dict[str, torch.Tensor]":
        content = self._store.content(name)
        place = printable(name)
        if hashlib.sha256(content).hexdigest() != digest:
            raise CorpusError(
                f"{place}: has changed since its rows were counted; put the file back, or run "
                "again with --forcerun tokenize_corpus"
            )
        item = Item(name, name, place, content)
        found: dict[str, torch.Tensor] = self._processor(
            value_of(item, self._corpus, self._processor)
        )
        here = self._processor.shape_in(found)
        if list(here) != shape:
            raise CorpusError(
                f"{place}: the processor makes {here} of it here, and made "
                f"{tuple(shape)} when its rows were counted; install the same Pillow and "
                "transformers"
            )
        return found


def inputs_of(
    columns: Mapping[str, Column],
    window_document: np.ndarray,
    ids_of: IdsOf,
    model: ModelConfig,
    tokens: Mapping[str, Any],
    processor_hash: Any,
) -> Inputs | ChatInputs | None:
    """The inputs of a run of images, audio, or conversations with images.

    Args:
        columns: of the corpus, by name.
        window_document: number of each window's document within these columns.
        ids_of: gives a window's token ids.
        model: the `model` settings.
        tokens: the config of the stage that made `tokens.h5`, as plain data.
        processor_hash: the attribute of that file.

    Returns:
        None where the run is of texts.
    """
    if INPUT_IMAGES in columns and processor_hash is not None:
        corpus = tokens["corpus"]
        return ChatInputs(columns, window_document, ids_of, model, corpus, str(processor_hash))
    if INPUT_FILE not in columns or processor_hash is None:
        return None
    return Inputs(columns, window_document, model, tokens["corpus"], str(processor_hash))
