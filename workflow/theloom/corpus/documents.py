"""The documents of a corpus: the Python documentation, files of your own, or a data set of the
hub.
"""

from collections.abc import Iterator
from itertools import islice

from theloom.config.schema import CorpusConfig
from theloom.corpus import hub, rows, text_files
from theloom.corpus.rows import Document
from theloom.errors import CorpusError


def read_documents(config: CorpusConfig) -> Iterator[Document]:
    """The documents of a corpus in a fixed order, at most `max_documents`.

    Args:
        config: the `corpus` settings.

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
    seen: set[str] = set()  # of ids that a column gives; files and lines have names of their own
    for document in _source(config):
        rows.check(document)
        if config.id_column is not None:
            if document.id in seen:
                first = next(d for d in _source(config) if d.id == document.id)
                raise CorpusError(
                    f"corpus.id_column: {config.id_column!r} names two documents "
                    f"{document.id[:80]!r} ({first.place}, and {document.place}); "
                    "give each a name of its own, or leave the column out"
                )
            seen.add(document.id)
        yield document


def check_local(config: CorpusConfig) -> None:
    """Check that local files of a corpus exist, without reading them.

    Raises:
        CorpusError: there are none.
    """
    if config.kind.name == "text":
        text_files.find(config)


def _python_docs(config: CorpusConfig) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data.topics/{name}", text, f"pydoc_data.topics/{name}")


def fetch(config: CorpusConfig) -> None:
    """Download the data set of a corpus from the hub, if it is not cached.

    Raises:
        CorpusError: the data set is missing or broken, or has no such split.
    """
    hub.data_set(config)
