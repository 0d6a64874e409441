"""Images and audio as documents of `tokens.h5`: a row for each patch or frame.

A row's id is its number in the document. The columns `input_file`, `input_sha256` and `input_shape`
say of which bytes, and of which size after the processor, its values are.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.schema import Config, CorpusConfig
from theloom.corpus import rows
from theloom.corpus.columns import of_strings
from theloom.corpus.media import values
from theloom.corpus.media.items import Item
from theloom.corpus.spooled.spool import Strings
from theloom.errors import CorpusError, ModelError, printable
from theloom.model import files
from theloom.model.fake import fake_model
from theloom.model.towers.classes import class_of
from theloom.model.towers.processor import Processor, load_processor
from theloom.model.towers.row_counts import RowCounts
from theloom.rows.modality import INPUT_FILE, INPUT_HASH, INPUT_SHAPE
from theloom.store.tables.columns import ColumnPieces

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

COLUMNS = (INPUT_FILE, INPUT_HASH, INPUT_SHAPE)


def processor_of(config: Any) -> Processor:
    """The processor of a run's model.

    Args:
        config: the `model` settings, of images or audio.

    Returns:
        That of the model's folder.

    Raises:
        ModelError: there is none, or it is broken.
    """
    folder = files.describe(config).folder
    whole = class_of(files.hf_config(config))
    return load_processor(folder, config.modality.name, config.source, whole)


def value_of(item: Item, corpus: CorpusConfig, processor: Processor) -> np.ndarray:
    """What the processor is given of a file.

    Args:
        item: the file.
        corpus: the `corpus` settings.
        processor: of the model.

    Returns:
        Pixels or samples.

    Raises:
        CorpusError: it is damaged, or not as the model takes it.
    """
    if corpus.kind.name == "images":
        return values.pixels(item.content, item.place)
    return values.samples(item.content, item.place, processor.sampling_rate)


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
        values.check_installed(config.corpus.kind.name)
        self._config, self._kind = config, config.corpus.kind.name
        self._source = config.model.source
        self._revision = files.describe(config.model).revision
        self._processor = processor_of(config.model)
        self._counts = RowCounts(fake_model(files.hf_config(config.model), "fp32"))
        if self._counts.input_name != self._processor.input_name:
            raise ModelError(
                f"model.source: {self._source} reads {self._counts.input_name}, and its processor "
                f"makes {self._processor.input_name}; take the processor of this model"
            )
        if self._kind == "images" and self._counts.channels != 3:
            raise ModelError(
                f"model.source: {self._source} reads images of {self._counts.channels} channels, "
                "and TheLoom gives RGB; take a model of 3 channels"
            )
        if config.model.stages and self._processor.shape is None:
            raise ModelError(
                f"model.source: {self._source}: {type(self._processor.own).__name__} makes images "
                "of several sizes, and rows of stages are planned for one; set a size in "
                "preprocessor_config.json to which it resizes or crops every image"
            )
        if taken := sorted({*COLUMNS} & {*config.corpus.columns}):
            raise CorpusError(
                f"corpus.columns: {taken[0]!r} is what the run itself writes of each file; rename "
                "the corpus' column"
            )
        self._longest = self._window()
        self._described = {name: Strings() for name in COLUMNS}

    def _window(self) -> int | None:
        """Samples of the longest clip, where the processor pads or cuts all to one length."""
        if self._kind != "audio" or self._processor.shape is None:
            return None
        found = self._processor.longest
        if found is None:
            raise ModelError(
                f"model.source: {self._source}: {type(self._processor.own).__name__} makes every "
                "clip equally long and does not say which it cuts; its rows cannot be told from "
                "those of a part of the clip"
            )
        return found

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
        value = value_of(item, self._config.corpus, self._processor)
        if not value.size:
            return np.empty(0, "<i4"), {}
        if self._longest is not None and len(value) > self._longest:
            raise CorpusError(
                f"{item.place}: has {len(value):,} samples, and the model takes "
                f"{self._longest:,} at once ({self._longest / self._processor.sampling_rate:.0f} "
                "seconds); cut it into clips, each a file"
            )
        try:
            inputs = self._processor(value)
            count = self._counts.rows(inputs)
        except (ModelError, ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            words = " ".join(str(error).split())[:300]
            raise CorpusError(
                f"{item.place}: {'x'.join(map(str, value.shape))} values are nothing that the "
                f"model takes ({words}); take it out of the corpus"
            ) from None
        most = self._config.corpus.context_length or self._counts.longest
        if count > most:
            raise CorpusError(
                f"{item.place}: has {count:,} rows, and memory is planned for {most:,}; set "
                f"corpus.context_length={count} or more, or cut it"
            )
        digest = hashlib.sha256(item.content).hexdigest()
        shape = self._processor.shape_in(inputs)
        for name, text in zip(COLUMNS, (item.name, digest, json.dumps(shape)), strict=True):
            self._described[name].append(text)
        return np.arange(count, dtype="<i4"), self._special(value, inputs, count)

    def _special(
        self, value: np.ndarray, inputs: "dict[str, torch.Tensor]", count: int
    ) -> dict[str, np.ndarray]:
        special = np.zeros(count, "u1")
        real = self._counts.real_rows(inputs)
        if real is not None:
            special[real:] = 1
        elif self._processor.packed:
            pass  # patches alone
        elif self._kind == "images":
            before = self._counts.before_patches(inputs)
            if before is None:
                return {}
            special[:before] = 1
        elif self._longest is not None and self._counts.in_time:
            special[-(-len(value) * count // self._longest) :] = 1
        return {"special": special}

    def columns(self) -> dict[str, ColumnPieces]:
        """What the rows of each document are of.

        Returns:
            By name: the file, the hash of its bytes, and the shape of what the processor made.
        """
        kinds = dict.fromkeys(COLUMNS, "string") | {INPUT_SHAPE: "json"}
        return {name: of_strings(kinds[name], t) for name, t in self._described.items()}

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
        return {
            "tokenizer": self._source,
            "tokenizer_revision": self._revision,
            "tokenizer_class": "",
            "tokenizer_difference": "",
            "vocab_size": 0,
            "characters": f"none: rows are {'patches' if self._kind == 'images' else 'frames'}",
            "assistant_tokens": "",
            "processor": type(self._processor.own).__name__,
            "processor_hash": self._processor.digest,
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
        rows.check_name(item.id, "id", item.place)
        rows.check_name(printable(item.name), "file name", item.place)

    def hashed(self, item: Item) -> bytes:
        """What a change of the document, or of the processor, would change.

        Args:
            item: the file.

        Returns:
            Bytes to be hashed.
        """
        return hashlib.sha256(item.content).digest() + self._processor.digest.encode()
