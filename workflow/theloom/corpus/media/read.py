"""Images and audio as a model reads them: what its processor makes of each file, and how many rows
that gives.

The columns `input_file`, `input_sha256` and `input_shape` say of which bytes a document's values
are, and of which size after the processor.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
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
from theloom.rows.modality import INPUT_FILE, INPUT_HASH, INPUT_SHAPE, SOURCE_ROWS
from theloom.store.tables.columns import ColumnPieces

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class Read:
    """A file as the model reads it.

    Attributes:
        size: pixels or samples along the first axis.
        inputs: of the model, by name.
        rows: that the tower makes of them.
        described: values of the columns that say what they are of.
    """

    size: int
    inputs: "Mapping[str, torch.Tensor]"
    rows: int
    described: Mapping[str, str]


class Reader:
    """Reads images or clips as the model does, and collects what each document's are of.

    Attributes:
        processor: of the model.
        counts: rows by the shape of an input.
        longest: samples of the longest clip, where the processor makes all equally long; else None.

    Args:
        config: the settings of the stage.

    Raises:
        ModelError: the model has no processor, or does not read the corpus' kind.
        CorpusError: a package is missing that reads the files, or the corpus has a column of the
            run's own.
    """

    def __init__(self, config: Config) -> None:
        self.kind = config.corpus.kind.name
        values.check_installed(self.kind)
        self._config, self._source = config, config.model.source
        source = self._source
        self.processor = processor_of(config.model)
        self.counts = RowCounts(fake_model(files.hf_config(config.model), "fp32"))
        if self.counts.input_name != self.processor.input_name:
            raise ModelError(
                f"model.source: {source} reads {self.counts.input_name}, and its processor "
                f"makes {self.processor.input_name}; take the processor of this model"
            )
        if self.kind == "images" and self.counts.channels != 3:
            raise ModelError(
                f"model.source: {source} reads images of {self.counts.channels} channels, "
                "and TheLoom gives RGB; take a model of 3 channels"
            )
        if config.model.stages and self.processor.shape is None:
            raise ModelError(
                f"model.source: {source}: {type(self.processor.own).__name__} makes images "
                "of several sizes, and rows of stages are planned for one; set a size in "
                "preprocessor_config.json to which it resizes or crops every image"
            )
        if own := sorted({*COLUMNS, SOURCE_ROWS} & {*config.corpus.columns}):
            raise CorpusError(
                f"corpus.columns: {own[0]!r} is what the run itself writes of each file; rename "
                "the corpus' column"
            )
        self.longest = self._window()
        self._described = {name: Strings() for name in COLUMNS}

    def _window(self) -> int | None:
        """Samples of the longest clip, where the processor pads or cuts all to one length."""
        if self.kind != "audio" or self.processor.shape is None:
            return None
        found = self.processor.longest
        if found is None:
            raise ModelError(
                f"model.source: {self._source}: {type(self.processor.own).__name__} makes every "
                "clip equally long and does not say which it cuts; its rows cannot be told from "
                "those of a part of the clip"
            )
        return found

    def read(self, item: Item) -> Read | None:
        """Read a file.

        Args:
            item: the file.

        Returns:
            What the model is given of it; None for a clip without samples.

        Raises:
            CorpusError: it is damaged, or not as the model takes it.
        """
        value = value_of(item, self._config.corpus, self.processor)
        if not value.size:
            return None
        if self.longest is not None and len(value) > self.longest:
            raise CorpusError(
                f"{item.place}: has {len(value):,} samples, and the model takes "
                f"{self.longest:,} at once ({self.longest / self.processor.sampling_rate:.0f} "
                "seconds); cut it into clips, each a file"
            )
        try:
            inputs = self.processor(value)
            self._check_one(inputs, item)
            count = self.counts.rows(inputs)
        except (ModelError, ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            words = " ".join(str(error).split())[:300]
            raise CorpusError(
                f"{item.place}: {'x'.join(map(str, value.shape))} values are nothing that the "
                f"model takes ({words}); take it out of the corpus"
            ) from None
        most = self._config.corpus.context_length or self.counts.longest
        if count > most:
            raise CorpusError(
                f"{item.place}: has {count:,} rows, and memory is planned for {most:,}; set "
                f"corpus.context_length={count} or more, or cut it"
            )
        digest = hashlib.sha256(item.content).hexdigest()
        shape = json.dumps(self.processor.shape_in(inputs))
        described = dict(zip(COLUMNS, (item.name, digest, shape), strict=True))
        return Read(len(value), inputs, count, described)

    def _check_one(self, inputs: "Mapping[str, torch.Tensor]", item: Item) -> None:
        """Check that a clip is one for the model. Raises CorpusError."""
        parts = len(inputs[self.processor.input_name])
        if self.kind == "audio" and parts > 1:
            raise CorpusError(
                f"{item.place}: its processor cuts it into {parts} clips; cut it, each a file"
            )

    def add(self, found: Read) -> None:
        """Keep what a document that is stored is of.

        Args:
            found: the document as it was read.
        """
        for name, text in found.described.items():
            self._described[name].append(text)

    def columns(self) -> dict[str, ColumnPieces]:
        """What the rows of each document are of.

        Returns:
            By name: the file, the hash of its bytes, and the shape of what the processor made.
        """
        kinds = dict.fromkeys(COLUMNS, "string") | {INPUT_SHAPE: "json"}
        return {name: of_strings(kinds[name], t) for name, t in self._described.items()}

    def attributes(self) -> dict[str, Any]:
        """What `tokens.h5` says of the processor.

        Returns:
            Attributes by name.
        """
        return {
            "processor": type(self.processor.own).__name__,
            "processor_hash": self.processor.digest,
        }

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
        return hashlib.sha256(item.content).digest() + self.processor.digest.encode()
