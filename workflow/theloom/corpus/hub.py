"""Data sets of the hub, or of its format on disk: the documents in them, by `datasets`."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows, text_files
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, TheLoomError
from theloom.store import file_format

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # of a single file, by its suffix
_LONGEST = 600  # characters of another library's message


def read(config: CorpusConfig) -> Iterator[Document]:
    """The documents of a data set: a row each.

    Raises:
        CorpusError: the data set cannot be read, or has no such split or column.
    """
    name = str(config.dataset)
    with _in_one_line(name):
        prefix = config.split if Path(name).expanduser().exists() else f"{name}/{config.split}"
        table, columns = data_set(config), []
        for key in ("column", "id_column"):
            if (column := getattr(config, key)) is None:
                continue
            if column not in table.column_names:
                raise rows.no_column(key, column, table.column_names, f"corpus.dataset: {name}")
            columns.append(column)
        # of the other columns, images and sounds would be decoded
        numbered = enumerate(table.select_columns(list(dict.fromkeys(columns))))
    while True:
        with _in_one_line(name):
            number, row = next(numbered, (0, None))
        if row is None:
            return
        yield rows.of_row(row, f"{prefix}/{number}", f"{prefix}/{number}", config)


def data_set(config: CorpusConfig) -> Any:
    """The rows of `corpus.split`, downloaded if they are not cached.

    Raises:
        CorpusError: the data set is missing or broken, or has no such split.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            "corpus=hub needs the package datasets: pip install 'theloom[hub]'"
        ) from None
    name = str(config.dataset)
    with _in_one_line(name):
        local = Path(name).expanduser()
        if any((local / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(local))
        elif local.is_file():
            table = datasets.load_dataset(
                _builder(local, name), data_files=glob.escape(str(local)), split=config.split
            )
        else:
            table = datasets.load_dataset(
                str(local) if local.exists() else name, config.subset, split=config.split
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
    if suffix in text_files.SUFFIXES:
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
def _in_one_line(name: str) -> Iterator[None]:
    """Turn any error of `datasets` over a data set into a CorpusError: they share no class."""
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
