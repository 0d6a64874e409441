"""Files of tables in binary form: Parquet and Arrow, a few rows at a time, by pyarrow."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.corpus.columns import Category
from theloom.corpus.formats import decoding
from theloom.corpus.formats.shares import Share
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, TheLoomError, printable
from theloom.store import file_format

SUFFIXES = (".parquet", ".arrow")

_TOGETHER = 256  # rows that are Python's at once
_IMAGES_TOGETHER = 16  # the same of rows with images
_MOST_NAMES = 1 << 16  # of a column of categories; with more it is one of texts

# Packed once more, such a file shrinks little: what unpacks to more than both is made to fill disks
_MOST_TIMES, _MOST_BYTES = 100, 1 << 30


def check_installed(files: Sequence[Path]) -> None:
    """Check that what reads these files is installed.

    Args:
        files: the files of a corpus.

    Raises:
        CorpusError: one of them needs pyarrow, which is not installed.
    """
    for file in files:
        if decoding.kind_of(file.name) in SUFFIXES and find_spec("pyarrow") is None:
            raise CorpusError(
                f"corpus.path: {printable(file.name)} needs the package pyarrow: "
                "pip install 'theloom[hub]'"
            )


def read(
    file: Path, name: str, config: CorpusConfig, share: Share | None = None
) -> Iterator[Document]:
    """The documents of a Parquet or Arrow file, a row each.

    Args:
        file: its path.
        name: of it, in messages and ids.
        config: the `corpus` settings.
        share: of a Parquet file, the row groups that begin in it are read, if all were as long as
            they have rows; None: all.

    Yields:
        The documents in the order of the rows, which are numbered from 1.

    Raises:
        CorpusError: the file cannot be read, or lacks a column.
    """
    with decoding.whole(file, name) as raw:
        with _in_one_line(f"{printable(name)}, row 1 or after"):
            number, found = _rows(raw, name, config, share)
        while True:
            with _in_one_line(f"{printable(name)}, row {number + 1} or after"):
                row = next(found, None)
            if row is None:
                return
            number += 1
            place = f"{printable(name)}, row {number}"
            yield rows.of_row(row, f"{name}:{number}", place, config)


def chosen(config: CorpusConfig, there: Sequence[str]) -> list[str]:
    """The columns of a table that are read: those of the run, and the tools of conversations.

    Args:
        config: the `corpus` settings.
        there: names of the table's columns.

    Returns:
        Names, each once.
    """
    names = [column for _, column in rows.wanted(config)]
    if config.messages and rows.TOOLS in there:
        names.append(rows.TOOLS)
    return list(dict.fromkeys(names))


def labelled(value: int | None, names: Sequence[str], column: str, place: str) -> Category | None:
    """The name of a label that a data set keeps as a number.

    Args:
        value: the number; None or -1: no label.
        names: all names of the column, by number.
        column: name of the column, for messages.
        place: the row, for messages.

    Returns:
        The name; None for no label.

    Raises:
        CorpusError: no name has this number.

    Examples:
        >>> labelled(1, ["positive", "negative"], "mood", "train/0")
        'negative'
        >>> labelled(-1, ["positive", "negative"], "mood", "train/0") is None
        True
    """
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise CorpusError(
            f"{place}: column {column!r} is the label {value}, and the data set names "
            f"{len(names)}; correct it, or take the column out of corpus.columns"
        )
    return Category.of(names[value], names)


def without_nulls(value: Any) -> Any:
    """A conversation of a table without the keys that a table adds to every message: null where
    the message had none. The content stays: null is what a call of a tool has.

    Args:
        value: messages, tools, or a part of them.

    Returns:
        A copy, in which no object has such a key at any depth.

    Examples:
        >>> without_nulls([{"role": "assistant", "content": None, "name": None}])
        [{'role': 'assistant', 'content': None}]
    """
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or k == "content"}
        return {k: without_nulls(v) for k, v in kept.items()}
    return value


def _rows(
    raw: BinaryIO, name: str, config: CorpusConfig, share: Share | None
) -> tuple[int, Iterator[dict[str, Any]]]:
    """How many rows are left out before the first, and the rows."""
    import pyarrow as pa

    kind, source = decoding.kind_of(name), _unpacked(raw, name)
    if kind == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(source)
        schema = table.schema_arrow
    else:
        try:
            table = pa.ipc.open_file(source)
        except pa.ArrowInvalid:  # of the other of two forms: `datasets` writes streams
            source.seek(0)
            table = pa.ipc.open_stream(source)
        schema = table.schema
    rows.check_columns(config, schema.names, printable(name))
    names, labels = chosen(config, schema.names), _class_labels(schema)
    before, batches = 0, iter(())  # type: int, Iterator[Any]
    if kind == ".parquet":
        before, groups = _row_groups(table.metadata, raw, share)
        together = _TOGETHER if config.images is None else _IMAGES_TOGETHER
        batches = chain.from_iterable(
            table.iter_batches(batch_size=together, row_groups=[group], columns=names)
            for group in groups
        )
    elif hasattr(table, "num_record_batches"):
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = iter(table)
    return before, _of_batches(batches, before, names, labels, name, config)


def _row_groups(metadata: Any, raw: BinaryIO, share: Share | None) -> tuple[int, list[int]]:
    """Rows before the first row group of a share, and the numbers of its row groups."""
    if share is None:
        return 0, list(range(metadata.num_row_groups))
    rows_of = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    before = list(accumulate(rows_of, initial=0))
    size = raw.seek(0, 2)
    mine = [n for n in range(len(rows_of)) if size * before[n] // max(before[-1], 1) in share]
    return before[mine[0]] if mine else 0, mine


def _of_batches(
    batches: Iterable[Any],
    number: int,
    names: list[str],
    labels: dict[str, list[str]],
    name: str,
    config: CorpusConfig,
) -> Iterator[dict[str, Any]]:
    """The rows of record batches, which are numbered from one more than `number`."""
    for batch in batches:
        for start in range(0, batch.num_rows, _TOGETHER):
            part = batch.slice(start, _TOGETHER)
            place = f"{printable(name)}, row {number + 1} or after"
            values = [
                _column(part.column(column), column, labels.get(column), place, config)
                for column in names
            ]
            number += part.num_rows
            for row in zip(*values, strict=True):
                yield dict(zip(names, row, strict=True))


def _column(
    array: Any, column: str, labels: Sequence[str] | None, place: str, config: CorpusConfig
) -> list[Any]:
    """Some values of a column, as Python has them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array.validate(full=True)
    measured = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    if measured and (pc.max(pc.binary_length(array)).as_py() or 0) > 4 * rows.MAX_TEXT:
        raise rows.too_long(place)
    values = array.to_pylist()
    if column in (config.messages, config.images, rows.TOOLS):
        return [without_nulls(value) for value in values]
    if column not in config.columns:
        return values
    if labels is not None and pa.types.is_integer(array.type):
        return [labelled(value, labels, column, place) for value in values]
    if (
        pa.types.is_dictionary(array.type)
        and pa.types.is_string(array.type.value_type)
        and len(array.dictionary) <= _MOST_NAMES
    ):
        names = array.dictionary.to_pylist()
        return [None if value is None else Category.of(value, names) for value in values]
    return values


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """The names of the labels of each column that `datasets` has written as numbers."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {
            column: list(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        return {}  # not written by `datasets`


def _unpacked(raw: BinaryIO, name: str) -> BinaryIO:
    """The file itself, or an unnamed one with its content: tables are not read front to back."""
    packed = decoding.unpacked(raw, name)
    if packed is raw:
        return raw
    size = raw.seek(0, 2)
    raw.seek(0)
    left = max(_MOST_BYTES, _MOST_TIMES * size)
    out = tempfile.TemporaryFile()  # noqa: SIM115 - closed when no one reads it
    while piece := packed.read(1 << 20):
        left -= len(piece)
        if left < 0:
            raise CorpusError(
                f"{printable(name)}: unpacks to more than {_MOST_TIMES} times its size; unpack it "
                "yourself if you trust it"
            )
        out.write(piece)
    out.seek(0)
    return out


@contextmanager
def _in_one_line(place: str) -> Iterator[None]:
    """Turn an error of pyarrow over a file into a CorpusError with its place."""
    try:
        yield
    except (TheLoomError, MemoryError, EOFError):
        raise
    except Exception as error:  # of pyarrow's own classes, and of Python's
        if file_format.is_full(error):
            raise
        raise CorpusError(
            f"{place}: cannot be read ({printable(' '.join(str(error).split()))[:300]}); fetch or "
            "write the file again"
        ) from None
