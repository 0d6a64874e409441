"""The documents of a corpus: the Python documentation, files of your own, or a data set of the
hub.
"""

import dataclasses
import logging
from collections.abc import Iterator
from itertools import islice

from theloom.config.schema import CorpusConfig
from theloom.corpus import chat, hub, rows, text_files
from theloom.corpus.formats.shares import Part
from theloom.corpus.rows import Document
from theloom.corpus.spooled.ids import SeenIds
from theloom.errors import CorpusError, printable
from theloom.rows.modality import SENSED

log = logging.getLogger(__name__)


def settings(config: CorpusConfig) -> CorpusConfig:
    """The `corpus` settings as a plain object, which is read for each row: OmegaConf takes longer
    for a key than JSON for a short line.

    Args:
        config: the settings, of a composed or frozen config.

    Returns:
        A copy.
    """
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(CorpusConfig)}
    return CorpusConfig(**known | {"columns": [*config.columns]})


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
    return islice(map(Ids(config).checked, read_part(config)), config.max_documents)


def read_part(config: CorpusConfig, part: Part | None = None) -> Iterator[Document]:
    """The documents of one of several jobs, with the ids that their rows give them.

    Args:
        config: the `corpus` settings.
        part: the job, of a corpus that is not `read_by_one`; None: one job reads all.

    Yields:
        The documents; those of all jobs one after the other are the corpus.

    Raises:
        CorpusError: as of `read_documents`, but for ids that are there twice.
    """
    for document in _source(config, part):
        rows.check(document)
        yield document


def read_by_one(config: CorpusConfig) -> str | None:
    """Why one job reads all of a corpus.

    Args:
        config: the `corpus` settings.

    Returns:
        The reason; None where several jobs can share it.

    Raises:
        CorpusError: there are no files.
    """
    if config.kind.name == "text":
        return text_files.read_by_one(config)
    if config.kind.name == "hub":
        return "a stream is read from front to back" if config.streaming else None
    return "the Python documentation is small"


def state(config: CorpusConfig) -> str:
    """What tells one state of a corpus from another, so that jobs read the same one.

    Args:
        config: the `corpus` settings.

    Returns:
        A text, which changes with the corpus.

    Raises:
        CorpusError: there are no files, or no data set.
    """
    if config.kind.name == "text":
        return text_files.state(config)
    return hub.state(config) if config.kind.name == "hub" and not config.streaming else ""


def _source(config: CorpusConfig, part: Part | None = None) -> Iterator[Document]:
    if config.kind.name == "python_docs":
        return _python_docs(config)
    if config.kind.name in SENSED:
        from theloom.corpus.media import places

        return (Document(i.id, "", i.place, i.columns) for i in places.read(config))
    return (text_files if config.kind.name == "text" else hub).read(config, part)


class Ids:
    """Sees to it that no two documents have one id.

    Args:
        config: the `corpus` settings.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._by_column = config.id_column is not None
        self._seen = SeenIds()  # files and lines have names of their own

    def checked(self, document: Document) -> Document:
        """Take the next document.

        Args:
            document: as it is read.

        Returns:
            The document, with a number after its id where `corpus.duplicate_ids` says so.

        Raises:
            CorpusError: the id is there before.
        """
        if (self._by_column or document.sequence) and not self._seen.add(document.id):
            document = self._numbered(document)
            self._seen.add(document.id)
        return document

    def _numbered(self, document: Document) -> Document:
        """The document with a number after its id. Raises CorpusError where ids must differ."""
        config, seen = self._config, self._seen
        if config.duplicate_ids.name == "error":
            first = next((d for d in _source(config) if d.id == document.id), document)
            by = "corpus.path" if config.id_column is None else "corpus.id_column"
            raise CorpusError(
                f"{by}: {config.id_column or 'id'!r} names two documents {document.id[:80]!r} "
                f"({first.place}, and {document.place}); give each a name of its own, leave the "
                "column out, or set corpus.duplicate_ids=number"
            )
        number = seen.number(document.id)
        while (name := f"{document.id}#{number + 1}") in seen:
            number += 1
        seen.set_number(document.id, number + 1)
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
    if config.kind.name in ("text", *SENSED) and config.dataset is None:
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
