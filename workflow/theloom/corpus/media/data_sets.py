"""Images and audio in a data set of the hub, or of its format on disk: rows of its table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.corpus import hub, rows
from theloom.corpus.formats import arrow_files
from theloom.corpus.media.cells import column_of, content_of, id_of
from theloom.corpus.media.items import Item
from theloom.errors import CorpusError, printable


def read(config: CorpusConfig) -> Iterator[Item]:
    """The images or clips of a data set: a row each.

    Args:
        config: the `corpus` settings, with `corpus.dataset`.

    Yields:
        The rows in the order of the data set.

    Raises:
        CorpusError: the data set cannot be read, or has no such split or column.
    """
    table = _undecoded(config)
    labels = hub.labels(table, config)
    for number in range(len(table)):
        name = f"{hub.prefix(config)}/{number}"
        place = printable(name)
        with hub.in_one_line(str(config.dataset)):
            row = table[number]
        for column, names in labels.items():
            row[column] = arrow_files.labelled(row[column], names, column, place)
        values = tuple(row[column] for column in config.columns)
        target = None if config.target is None else rows.target_of(row, place, config)
        content = _content(row, place, config)
        yield Item(name, id_of(row, name, place, config), place, content, values, target)


class Store:
    """Reads the bytes of images or clips of a data set again, by their names.

    Args:
        config: the `corpus` settings, with `corpus.dataset`.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._table: Any = None  # until a row is asked for

    def content(self, name: str) -> bytes:
        """The bytes of one.

        Args:
            name: as of `Item`.

        Returns:
            What the row has.

        Raises:
            CorpusError: it is not there, or cannot be read.
        """
        if self._table is None:
            self._table = _undecoded(self._config)
        prefix, _, row = name.rpartition("/")
        if prefix != hub.prefix(self._config) or not row.isdigit() or int(row) >= len(self._table):
            raise CorpusError(
                f"corpus.dataset: {self._config.dataset} has no row {printable(name)} now; take "
                "the data set of tokens.h5, or run again with --forcerun tokenize_corpus"
            )
        with hub.in_one_line(str(self._config.dataset)):
            found = self._table[int(row)]
        return _content(found, printable(name), self._config)


def _undecoded(config: CorpusConfig) -> Any:
    """The table with the columns that are read; files as they are stored."""
    import datasets

    name, column = str(config.dataset), column_of(config)
    with hub.in_one_line(name):
        table = hub.data_set(config)
        wanted = [("column", column), *rows.wanted(config)[1:]]
        for key, one in wanted:
            if one not in table.column_names:
                raise rows.no_column(key, one, table.column_names, f"corpus.dataset: {name}")
        table = table.select_columns(list(dict.fromkeys(one for _, one in wanted)))
        for one, feature in dict(table.features).items():
            if isinstance(feature, datasets.Image | datasets.Audio):
                table = table.cast_column(one, type(feature)(decode=False))
    return table


def _content(row: dict[str, Any], place: str, config: CorpusConfig) -> bytes:
    """The bytes of a row: those in its cell, or in the file that `datasets` fetched for it."""
    cell = row[column_of(config)]
    path = cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else None
    if isinstance(path, str) and path:
        return _fetched(path, place, config)
    return content_of(cell, place, config)


def _fetched(path: str, place: str, config: CorpusConfig) -> bytes:
    """A file of the data set itself: a table may name any file of this machine."""
    import datasets
    from huggingface_hub import constants

    own = Path(str(config.dataset)).expanduser()
    folders = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, *[own] * own.is_dir()]
    file = Path(path).resolve()
    if not any(file.is_relative_to(Path(folder).resolve()) for folder in folders):
        raise CorpusError(
            f"{place}: column {column_of(config)!r} names {printable(path)}, which is no file of "
            "the data set; write the files' bytes into the table (datasets' push_to_hub does)"
        )
    if not file.is_file():
        raise CorpusError(f"{place}: {printable(path)} is not there; fetch the data set again")
    return file.read_bytes()
