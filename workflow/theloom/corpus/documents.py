"""Where texts come from: the Python documentation, files of your own, or a data set of the hub."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.errors import CorpusError

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text, and the name that it keeps in every file of the run."""

    id: str
    text: str


def read_documents(config: CorpusConfig) -> Iterator[Document]:
    """The documents of a corpus in a fixed order, at most `max_documents`.

    Args:
        config: the `corpus` settings.

    Raises:
        CorpusError: files or columns are missing, or cannot be read.

    Examples:
        >>> from theloom.config.schema import CorpusConfig
        >>> next(read_documents(CorpusConfig())).id
        'pydoc_data.topics/assert'
    """
    source = {"python_docs": _python_docs, "text": _texts, "hub": _hub}[config.kind.name]
    return islice(source(config), config.max_documents)


def check_local(config: CorpusConfig) -> None:
    """Check that local files of a corpus exist, without reading them.

    Raises:
        CorpusError: there are none.
    """
    if config.kind.name == "text":
        _files(config)


def _python_docs(config: CorpusConfig) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data.topics/{name}", text)


def _files(config: CorpusConfig) -> list[Path]:
    path = Path(config.path or "").expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise CorpusError(
                f"corpus.path: {config.path} is not one of {', '.join(SUFFIXES)}; "
                "convert it: a table becomes .jsonl with pandas.read_csv('x.csv')"
                ".to_json('x.jsonl', orient='records', lines=True), and corpus.column names its "
                "column of texts"
            )
        return [path]
    if not path.is_dir():
        raise CorpusError(
            f"corpus.path: no file or folder {config.path!r}; relative paths start at {Path.cwd()}"
        )
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise CorpusError(
            f"corpus.path: {config.path} holds no {', '.join(SUFFIXES)} file; "
            "add one or give another path"
        )
    return files


def _texts(config: CorpusConfig) -> Iterator[Document]:
    root = Path(config.path or "").expanduser()
    for file in _files(config):
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        if file.suffix.lower() == ".jsonl":
            yield from _json_lines(file, name, config)
        else:
            yield Document(name, _decoded(file.read_bytes(), name, config.encoding))


def _decoded(raw: bytes, name: str, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name}: not {encoding} (byte 0x{raw[error.start]:02x} at offset {error.start}); "
            "convert the file or set corpus.encoding"
        ) from None
    except LookupError:
        raise CorpusError(
            f"corpus.encoding: Python knows no encoding {encoding!r}; try utf-8 or latin-1"
        ) from None


def _json_lines(file: Path, name: str, config: CorpusConfig) -> Iterator[Document]:
    with file.open("rb") as f:
        for number, raw in enumerate(f, start=1):
            line = _decoded(raw, f"{name}, line {number}", config.encoding)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(
                    f"{name}, line {number}: not JSON ({error.msg}, column {error.colno})"
                ) from None
            yield _row(row, f"{name}:{number}", config)


def _row(row: Any, default_id: str, config: CorpusConfig) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get(config.column), str):
        there = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(
            f"{default_id}: no text in column {config.column!r}; columns there: {there}; "
            "set corpus.column"
        )
    if config.id_column is None:
        return Document(default_id, row[config.column])
    if config.id_column not in row:
        raise CorpusError(
            f"{default_id}: no column {config.id_column!r}; "
            f"columns there: {', '.join(map(str, row))}"
        )
    return Document(str(row[config.id_column]), row[config.column])


def fetch(config: CorpusConfig) -> None:
    """Download the data set of a corpus from the hub, if it is not cached.

    Raises:
        CorpusError: the data set is missing, or has no such split.
    """
    _data_set(config)


def _hub(config: CorpusConfig) -> Iterator[Document]:
    name = str(config.dataset)
    prefix = config.split if Path(name).expanduser().exists() else f"{name}/{config.split}"
    for number, row in enumerate(_data_set(config)):
        yield _row(row, f"{prefix}/{number}", config)


def _data_set(config: CorpusConfig) -> Any:
    """The rows of `corpus.split`."""
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            "corpus=hub needs the package datasets: pip install 'theloom[hub]'"
        ) from None
    name = str(config.dataset)
    local = Path(name).expanduser()
    try:
        if any((local / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(str(local))
        else:
            rows = datasets.load_dataset(
                str(local) if local.exists() else name, config.subset, split=config.split
            )
    # the errors of datasets and of the client of the hub derive from these
    except (ValueError, OSError) as error:
        raise CorpusError(f"corpus.dataset: {name}: {' '.join(str(error).split())}") from None
    if isinstance(rows, datasets.DatasetDict):
        if config.split not in rows:
            raise CorpusError(
                f"corpus.split: {name} has no split {config.split!r}; it has {', '.join(rows)}"
            )
        rows = rows[config.split]
    return rows
