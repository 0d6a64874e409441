"""The documents of a corpus of images or audio, one after the other, as rows of `tokens.h5`."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from theloom.config.schema import Config
from theloom.corpus.documents import Ids, settings
from theloom.corpus.kept import KeptRows
from theloom.corpus.media import places
from theloom.corpus.media.encoding import Encoder
from theloom.corpus.media.items import Item
from theloom.corpus.rows import Document
from theloom.rows.document import Document as RowDocument


def encoded(
    config: Config, encoder: Encoder, tally: Any, kept: KeptRows
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The rows of the corpus' documents.

    Args:
        config: the settings of the stage.
        encoder: of the run.
        tally: takes the counts, a `Tally` of `corpus.tokens`.
        kept: takes what is stored.

    Yields:
        Numbers of the rows of each document that has any, with the other tables.

    Raises:
        CorpusError: a file cannot be read, or is nothing that the model takes.
    """
    corpus = settings(config.corpus)
    ids = Ids(corpus)
    for item in islice(places.read(corpus), corpus.max_documents):
        encoder.checked(item)
        document = ids.checked(_document(item))
        numbers, tables = encoder.encode(item)
        if not len(numbers):
            tally.skip(document)
            continue
        known = RowDocument(
            id=document.id,
            tokens=len(numbers),
            columns=dict(zip(corpus.columns, item.columns, strict=True)),
            special=tables.get("special"),
        )
        tally.columns.add(document)
        tables |= kept.add(known)
        tally.add(document, xxhash.xxh3_128_hexdigest(encoder.hashed(item)), len(numbers), False)
        yield numbers, tables


def _document(item: Item) -> Document:
    return Document(item.id, "", item.place, item.columns)
