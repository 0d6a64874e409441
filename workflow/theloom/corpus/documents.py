"""The documents of a corpus: the Python documentation, files of your own, or a data set of the
hub.
"""

import dataclasses
import logging
from collections.abc import Iterator
from itertools import islice

from theloom.config.schema import CorpusConfig
from theloom.corpus import chat, hub, rows, text_files
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, printable

log = logging.getLogger(__name__)


def read_documents(config: CorpusConfig) -> Iterator[Document]:
    """The documents of a corpus in a fixed order, at most `max_documents`.

    Args:
        config: the `corpus` settings.

    Returns:
        The documents, each read when it is asked for.

    Raises:
        CorpusError: files or columns are missing or cannot be read, a text or an id cannot be
            stored, or two documents have one id.

    Examples:
        >>> from theloom.config.schema import CorpusConfig
        >>> next(read_documents(CorpusConfig())).id
        'pydoc_data.topics/assert'
    """
    return islice(_checked(config), config.max_documents)


def _source(config: CorpusConfig) -> Iterator[Document]:
    kinds = {"python_docs": _python_docs, "text": text_files.read, "hub": hub.read}
    return kinds[config.kind.name](config)


def _checked(config: CorpusConfig) -> Iterator[Document]:
    seen: set[str] = set()  # of ids that a table gives; files and lines have names of their own
    numbers: dict[str, int] = {}  # of ids that are there more than once
    for document in _source(config):
        rows.check(document)
        if config.id_column is not None or document.sequence:
            if document.id in seen:
                document = _numbered(document, seen, numbers, config)
            seen.add(document.id)
        yield document


def _numbered(
    document: Document, seen: set[str], numbers: dict[str, int], config: CorpusConfig
) -> Document:
    """The document with a number after its id. Raises CorpusError where ids must differ."""
    if config.duplicate_ids.name == "error":
        first = next(d for d in _source(config) if d.id == document.id)
        by = "corpus.path" if config.id_column is None else "corpus.id_column"
        raise CorpusError(
            f"{by}: {config.id_column or 'id'!r} names two documents {document.id[:80]!r} "
            f"({first.place}, and {document.place}); give each a name of its own, leave the column "
            "out, or set corpus.duplicate_ids=number"
        )
    number = numbers.get(document.id, 1)
    while (name := f"{document.id}#{number + 1}") in seen:
        number += 1
    numbers[document.id] = number + 1
    log.info("%s: the id %s is there before; this one is %s", *_shown(document, name))
    numbered = dataclasses.replace(document, id=name)
    rows.check(numbered)
    return numbered


def _shown(document: Document, name: str) -> tuple[str, str, str]:
    return document.place, printable(document.id), printable(name)


def check_local(config: CorpusConfig) -> None:
    """Check that local files of a corpus exist, without reading the corpus.

    Args:
        config: the `corpus` settings.

    Raises:
        CorpusError: there are none, or the chat template's file cannot be read.
    """
    if config.kind.name == "text":
        text_files.find(config)
    if config.chat_template is not None:
        chat.read_template(config.chat_template)


def _python_docs(config: CorpusConfig) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for key, column in rows.wanted(config):
        if key in ("input_ids", "messages", "target", "columns"):
            raise rows.no_column(key, column, (), "the Python documentation")
    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data.topics/{name}", text, f"pydoc_data.topics/{name}")


def fetch(config: CorpusConfig) -> None:
    """Download the data set of a corpus from the hub, if it is not cached and is not streamed.

    Args:
        config: the `corpus` settings.

    Raises:
        CorpusError: the data set is missing or broken, or has no such split.
    """
    hub.data_set(config)
