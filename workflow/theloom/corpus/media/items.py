"""Files of images and audio: which of them a corpus has, and the bytes of each, by its name."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows, text_files
from theloom.corpus.formats import decoding
from theloom.corpus.formats.sensed import TABLE
from theloom.corpus.media.cells import column_of, content_of, id_of
from theloom.errors import CorpusError, printable

_MOST_BYTES = 1 << 30  # of one file
_TOGETHER = 16  # rows of a table that are in memory at once


@dataclass(frozen=True)
class Item:
    """One image or clip as it is stored.

    Attributes:
        name: its path below the corpus, with `#` and the number of the row in a table; by it the
            bytes are found again.
        id: of the document.
        place: where it was read, for messages.
        content: its bytes.
        columns: values of `corpus.columns`.
        target: the text of a decoder whose encoder reads the clip; None where there is none.
    """

    name: str
    id: str
    place: str
    content: bytes
    columns: tuple[Any, ...] = ()
    target: str | list[int] | None = None


def read(config: CorpusConfig) -> Iterator[Item]:
    """The images or clips of a corpus.

    Args:
        config: the `corpus` settings.

    Yields:
        Each file in the order of their names, or each row of a table.

    Raises:
        CorpusError: a file cannot be read, or a table has no such column.
    """
    files, _ = text_files.find(config)
    root = root_of(config)
    for file in files:
        name = file.relative_to(root).as_posix()
        if name.lower().endswith(TABLE):
            yield from _of_table(file, name, config)
            continue
        for key, column in rows.wanted(config)[1:]:
            raise rows.no_column(key, column, (), printable(name))
        yield Item(name, name, printable(name), file_content(file, name))


def root_of(config: CorpusConfig) -> Path:
    """The folder that the names of a corpus' files begin in.

    Args:
        config: the `corpus` settings.

    Returns:
        The folder of `corpus.path`.
    """
    path = Path(config.path or "").expanduser()
    return path if path.is_dir() else path.parent


class Store:
    """Reads the bytes of images or clips again, by their names.

    Args:
        config: the `corpus` settings.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self._config, self._root = config, root_of(config)
        self._table: tuple[str, int, list[Any]] | None = None  # the row group read last

    def content(self, name: str) -> bytes:
        """The bytes of one.

        Args:
            name: as of `Item`.

        Returns:
            What is stored under it.

        Raises:
            CorpusError: it is not there, or cannot be read.
        """
        table, _, row = name.rpartition("#")
        if table.lower().endswith(TABLE) and row.isdigit():
            return self._of_row(table, int(row), name)
        return file_content(self._root / name, name)

    def _of_row(self, table: str, row: int, name: str) -> bytes:
        import pyarrow.parquet

        file = self._root / table
        _check_there(file, table)
        found = pyarrow.parquet.ParquetFile(file)
        before = 0
        for group in range(found.metadata.num_row_groups):
            count = found.metadata.row_group(group).num_rows
            if row - 1 < before + count:
                if self._table is None or self._table[:2] != (table, group):
                    values = found.read_row_group(group, columns=[column_of(self._config)])
                    self._table = (table, group, values.column(0).to_pylist())
                return content_of(self._table[2][row - 1 - before], name, self._config)
            before += count
        raise CorpusError(f"{printable(name)}: {printable(table)} has {before} rows now")


def _of_table(file: Path, name: str, config: CorpusConfig) -> Iterator[Item]:
    """The rows of a Parquet file, as `datasets` writes images and audio."""
    import pyarrow as pa
    import pyarrow.parquet

    column, asked = column_of(config), rows.wanted(config)[1:]
    place = printable(name)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        there = table.schema_arrow.names
        for key, wanted in (("column", column), *asked):
            if wanted not in there:
                raise rows.no_column(key, wanted, there, place)
        number = 0
        columns = list(dict.fromkeys([column, *(wanted for _, wanted in asked)]))
        for batch in table.iter_batches(batch_size=_TOGETHER, columns=columns):
            for row in batch.to_pylist():
                number += 1
                where, own = f"{place}, row {number}", f"{name}#{number}"
                values = tuple(row[c] for c in config.columns)
                content = content_of(row[column], where, config)
                target = None if config.target is None else rows.target_of(row, where, config)
                yield Item(own, id_of(row, own, where, config), where, content, values, target)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{place}: cannot be read ({printable(' '.join(str(error).split()))[:200]}); fetch or "
            "write the file again"
        ) from None


def file_content(file: Path, name: str) -> bytes:
    """The bytes of a file.

    Args:
        file: its path.
        name: of it, in messages.

    Returns:
        What is in it.

    Raises:
        CorpusError: it is not there, or cannot be read.
    """
    _check_there(file, name)
    with decoding.whole(file, name) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _MOST_BYTES:
            raise CorpusError(f"{printable(name)}: has {size:,} bytes; cut it into smaller files")
        return opened.read()


def _check_there(file: Path, name: str) -> None:
    if not file.is_file():
        raise CorpusError(
            f"{printable(name)}: is no longer at {printable(str(file))}; put it back, or run again "
            "with --forcerun tokenize_corpus"
        )
