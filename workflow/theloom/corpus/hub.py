"""Data sets of the hub, or of its format on disk: the documents in them, by `datasets`."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows, text_files
from theloom.corpus.formats import arrow_files, decoding
from theloom.corpus.formats.shares import Part
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, TheLoomError
from theloom.store import file_format

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # of a single file, by its suffix
_LONGEST = 600  # characters of another library's message


def read(config: CorpusConfig, part: Part | None = None) -> Iterator[Document]:
    """The documents of a data set: a row each.

    Args:
        config: the `corpus` settings.
        part: which share of the rows is read, of a data set that is not streamed; None: all.

    Yields:
        The documents in the order of the data set.

    Raises:
        CorpusError: the data set cannot be read, or has no such split or column.
    """
    name = str(config.dataset)
    with in_one_line(name):
        table, begin = data_set(config), prefix(config)
        there, place = _columns(table), f"corpus.dataset: {name}"
        rows.check_columns(config, there, place)
        # of the other columns, images and sounds would be decoded
        chosen = table.select_columns(arrow_files.chosen(config, there))
        share = None if part is None else part.share(len(table))
        if share is None:
            numbered = enumerate(chosen)
        else:
            numbered = enumerate(chosen.select(range(share.first, share.end)), share.first)
        named = labels(table, config)
    while True:
        with in_one_line(name):
            number, row = next(numbered, (0, None))
        if row is None:
            return
        place = f"{begin}/{number}"
        for column, names in named.items():
            row[column] = arrow_files.labelled(row[column], names, column, place)
        for column in (config.messages, rows.TOOLS) if config.messages else ():
            if column in row:
                row[column] = arrow_files.without_nulls(row[column])
        yield rows.of_row(row, place, place, config)


def prefix(config: CorpusConfig) -> str:
    """How the ids of a data set's rows begin.

    Args:
        config: the `corpus` settings.

    Returns:
        The split, behind the name of a data set of the hub.
    """
    name = str(config.dataset)
    return config.split if Path(name).expanduser().exists() else f"{name}/{config.split}"


def labels(table: Any, config: CorpusConfig) -> dict[str, list[str]]:
    """The names of labels that a data set keeps as numbers.

    Args:
        table: of `datasets`.
        config: the `corpus` settings.

    Returns:
        By column of `corpus.columns`, in the order of their numbers.
    """
    return {
        column: table.features[column].names
        for column in config.columns
        if table.features and hasattr(table.features[column], "names")
    }


def state(config: CorpusConfig) -> str:
    """Which data set it is.

    Args:
        config: the `corpus` settings, not streamed.

    Returns:
        What `datasets` names it by, and its rows.

    Raises:
        CorpusError: as of `data_set`.
    """
    table = data_set(config)
    return f"{len(table)} {getattr(table, '_fingerprint', '')}"


def _columns(table: Any) -> list[str]:
    """The names of a data set's columns; of a stream without a list of them those of its first
    row.
    """
    return list(table.column_names or next(iter(table), {}))


def data_set(config: CorpusConfig) -> Any:
    """The rows of `corpus.split`, downloaded if they are not cached; with `corpus.streaming` as
    they are read.

    Args:
        config: the `corpus` settings.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` where it is streamed.

    Raises:
        CorpusError: the data set is missing or broken, has no such split, or the package datasets
            is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            "corpus.dataset needs the package datasets: pip install 'theloom[hub]'"
        ) from None
    name = str(config.dataset)
    with in_one_line(name):
        local = Path(name).expanduser()
        if any((local / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(local))
        elif local.is_file():
            table = datasets.load_dataset(
                _builder(local, name),
                data_files=glob.escape(str(local)),
                split=config.split,
                streaming=config.streaming,
            )
        else:
            table = datasets.load_dataset(
                str(local) if local.exists() else name,
                config.subset,
                split=config.split,
                streaming=config.streaming,
            )
        if isinstance(table, datasets.DatasetDict):
            if config.split not in table:
                raise CorpusError(
                    f"corpus.split: {name} has no split {config.split!r}; it has {', '.join(table)}"
                )
            table = table[config.split]
    return table


def _builder(file: Path, name: str) -> str:
    suffix = file.suffix.lower()
    if suffix not in _BUILDERS and decoding.kind_of(file.name) in text_files.SUFFIXES:
        raise CorpusError(
            f"corpus.dataset: {name} is a file of texts; set corpus=text corpus.path={name}"
        )
    if suffix not in _BUILDERS:
        raise CorpusError(
            f"corpus.dataset: {name} is not one of {', '.join(_BUILDERS)}; convert it, or give a "
            "folder or the id of a data set"
        )
    return _BUILDERS[suffix]


@contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """Turn any error of `datasets` over a data set into a CorpusError: they share no class.

    Args:
        name: of the data set.

    Yields:
        Nothing.

    Raises:
        CorpusError: in place of the error.
    """
    try:
        yield
    except (TheLoomError, MemoryError):
        raise
    except Exception as error:
        if file_format.is_full(error):  # of the cache: nothing is wrong with the data set
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        messages = dict.fromkeys(
            " ".join(str(e).split()) or type(e).__name__ for e in (error, cause)
        )
        raise CorpusError(
            f"corpus.dataset: {name}: {': '.join(messages)[:_LONGEST].rstrip('.')}; "
            "check corpus.dataset, corpus.subset and corpus.split"
        ) from None
