"""Files of texts: which files of a folder are read, and the documents in them, in any encoding."""

import codecs
import csv
import io
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, printable

log = logging.getLogger(__name__)

TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".txt", ".md", ".jsonl", *TABLES)

# A folder with more has its texts elsewhere, or too many files: `corpus.path=/` ends soon.
MOST_OTHERS, MOST_TEXTS = 100_000, 1_000_000
_SECONDS_BETWEEN_COUNTS = 5.0

# codecs of Python that take any bytes, or names of hosts, for characters
_NO_TEXT = ("undefined", "idna", "punycode", "unicode-escape", "raw-unicode-escape")

_MOST_BYTES = 4  # of a character in any encoding

_MOST_OF_A_ROW = 2  # times the text's own characters: escapes, and other columns

_SHOWN = 1 << 16  # characters of a line that are looked at before its length

_MARK = "theloom.mark"
_MARKED = 0xDC00  # a byte that is not of the encoding becomes this surrogate plus the byte
_OWN_BOM = ("utf-8-sig", "utf-16", "utf-32")  # encodings that take the byte order mark themselves


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(_MARKED + error.object[error.start]), error.end


codecs.register_error(_MARK, _mark)


def find(config: CorpusConfig) -> tuple[list[Path], str]:
    """The files of a corpus in a fixed order: one, or all below a folder that are not hidden.

    Returns:
        The files, and in words what was left out.

    Raises:
        CorpusError: there are none, one has no name in UTF-8 or leads nowhere, or Python does not
            know the encoding.
    """
    _check_encoding(config.encoding)
    try:
        path = Path(config.path or "").expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that nobody has
        raise CorpusError(f"corpus.path: {config.path!r}: {error}") from None
    if is_file:
        if (suffix := path.suffix.lower()) not in SUFFIXES:
            instead = f", or set corpus=hub corpus.dataset={printable(str(path))}"
            raise CorpusError(
                f"corpus.path: {printable(path.name)} is not one of {', '.join(SUFFIXES)}; "
                "convert it" + instead * (suffix == ".parquet")
            )
        _name(path, path.parent)
        if not os.access(path, os.R_OK):
            raise CorpusError(f"corpus.path: {config.path!r} cannot be read; make it readable")
        return [path], ""
    if not is_folder:
        raise CorpusError(
            f"corpus.path: no file or folder {config.path!r}; relative paths start at {Path.cwd()}"
        )
    skipped: Counter[str] = Counter()
    files = sorted(_below(path, skipped))
    reasons = ", ".join(f"{count} {what}" for what, count in skipped.items() if count)
    if not files:
        raise CorpusError(
            f"corpus.path: {printable(str(path))} holds no {', '.join(SUFFIXES)} file"
            + f" (not read: {reasons})" * bool(reasons)
            + "; add one or give another path"
        )
    return files, reasons


def _below(root: Path, skipped: Counter[str]) -> Iterator[Path]:
    """The files of texts below a folder; counts of what is not read go to `skipped`."""

    def unreadable(error: OSError) -> NoReturn:
        raise CorpusError(f"corpus.path: {error.filename}: {error.strerror}") from None

    texts = others = 0
    last = time.monotonic()
    for folder, folders, names in os.walk(root, onerror=unreadable):
        here = sum(n.lower().endswith(SUFFIXES) for n in names)
        texts, others = texts + here, others + len(folders) + len(names) - here
        if others > MOST_OTHERS or texts > MOST_TEXTS:
            raise CorpusError(
                f"corpus.path: {printable(str(root))}: more than {MOST_OTHERS:,} folders and files "
                f"of other kinds, or {MOST_TEXTS:,} texts; give a folder of texts alone, or join "
                "them in .jsonl files"
            )
        if time.monotonic() - last > _SECONDS_BETWEEN_COUNTS:
            log.warning(
                "corpus.path: %d texts and %d others seen, now in %s",
                *(texts, others, printable(folder)),
            )
            last = time.monotonic()
        skipped["hidden (of a name with a dot first)"] += sum(
            n.startswith(".") for n in (*folders, *names)
        )
        folders[:] = [n for n in folders if not n.startswith(".")]
        skipped["links to folders"] += sum(os.path.islink(f"{folder}/{n}") for n in folders)  # noqa: PTH114
        for name in names:
            file = Path(folder, name)
            if name.startswith("."):
                continue
            if file.suffix.lower() not in SUFFIXES:
                skipped["of other kinds"] += 1
                continue
            shown = _name(file, root)
            try:
                is_file = file.is_file()
            except OSError as error:  # a folder that may be listed and not entered
                unreadable(error)
            if is_file:
                yield file
            elif file.is_symlink():
                raise CorpusError(
                    f"corpus.path: {printable(shown)} is a link to no file; mend or remove it"
                )
            else:
                skipped["pipes or devices"] += 1


def _name(file: Path, root: Path) -> str:
    """A file's path below a folder: the id of its document, or the start of it."""
    name = file.relative_to(root).as_posix()
    if rows.surrogate(name) is not None:
        raise CorpusError(
            f"corpus.path: the file name {printable(name)} is not UTF-8, and names its documents; "
            "rename it"
        )
    return name


def _check_encoding(encoding: str) -> None:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
        "a".encode(encoding)
        is_text = codecs.lookup(encoding).name.replace("_", "-") not in _NO_TEXT
    except (LookupError, ValueError):  # encoding errors are ValueErrors
        is_text = False
    if not is_text:
        raise CorpusError(
            f"corpus.encoding: Python knows no encoding {encoding!r}; try utf-8 or latin-1"
        )


def read(config: CorpusConfig) -> Iterator[Document]:
    """The documents of a corpus of files: a whole file each, or a line or row of one.

    Raises:
        CorpusError: a file cannot be read or decoded, changes meanwhile, or has a row without text.
    """
    root = Path(config.path or "").expanduser()
    files, left_out = find(config)
    if left_out:
        log.warning("corpus.path: not read in %s: %s", config.path, left_out)
    for file in files:
        name = _name(file, root.parent if root.is_file() else root)
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            yield from _json_lines(file, name, config)
        elif suffix in TABLES:
            yield from _table(file, name, config)
        else:
            with _opened(file, name, config.encoding, newline="") as f:
                text = _read(f, printable(name))
            _check_decoded(text, printable(name), 1, config.encoding)
            yield Document(name, text, printable(name))


def _read(file: TextIO, place: str) -> str:
    """The rest of a file, which is refused by its size before it is read: it may be sparse."""
    small = os.fstat(file.fileno()).st_size <= _MOST_BYTES * rows.MAX_TEXT
    text = file.read(rows.MAX_TEXT + 1) if small else None
    if text is None or len(text) > rows.MAX_TEXT:
        raise rows.too_long(place)
    return text


def _lines(file: TextIO, name: str, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, decoded, none longer than a document's row may be."""
    number, most = 0, _MOST_OF_A_ROW * rows.MAX_TEXT
    while line := file.readline(most + 1):
        number += 1
        _check_decoded(line[:_SHOWN], printable(name), number, encoding)
        if len(line) > min(_SHOWN, most):
            if len(line) > most:
                raise rows.too_long(f"{printable(name)}, line {number}")
            _check_decoded(line, printable(name), number, encoding)
        yield number, line


@contextmanager
def _opened(file: Path, name: str, encoding: str, newline: str | None) -> Iterator[TextIO]:
    """A file as text, without its byte order mark; bytes that are not of the encoding are marked.

    Raises CorpusError where the file changes while it is read.
    """
    try:
        with file.open(encoding=encoding, errors=_MARK, newline=newline) as f:
            before = os.fstat(f.fileno())
            if codecs.lookup(encoding).name in _OWN_BOM or f.read(1) != "\ufeff":
                f.seek(0)
            yield f
            after = os.fstat(f.fileno())
    except OSError as error:
        raise CorpusError(f"{printable(name)}: cannot be read: {error.strerror or error}") from None
    except UnicodeError as error:
        other = f"{encoding}-le or {encoding}-be" if "BOM" in str(error) else "another one"
        raise CorpusError(
            f"{printable(name)}: not {printable(encoding)} ({error}); "
            f"set corpus.encoding to {other}"
        ) from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CorpusError(
            f"{printable(name)}: changed while it was read; run again when it is complete"
        )


def _check_decoded(text: str, name: str, line: int, encoding: str) -> None:
    """Raise CorpusError, with its place, for a byte that is not of the encoding, and for a NUL,
    which no text has but one of another encoding. `line`: the number of the text's first one.
    """
    wrong = rows.surrogate(text)
    at = text.find("\0") if wrong is None else wrong
    if at < 0:
        return
    byte, row = ord(text[at]), line + text.count("\n", 0, at)
    column = at - text.rfind("\n", 0, at)
    if _MARKED <= byte < _MARKED + 256:
        byte -= _MARKED
    what = f"byte 0x{byte:02x}" if byte < 256 else f"U+{byte:04X}"
    advice = "convert the file or set corpus.encoding"
    if byte == 0 or (row == column == 1 and byte in (0xFE, 0xFF)):
        advice += " (utf-16 or utf-32, by its looks)"
    raise CorpusError(
        f"{name}, line {row}: not {printable(encoding)} ({what}, column {column}); {advice}"
    )


def _json_lines(file: Path, name: str, config: CorpusConfig) -> Iterator[Document]:
    wanted = [c for c in (config.column, config.id_column) if c is not None]

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            for key in wanted:
                if keys.count(key) > 1:
                    raise ValueError(f"the column {key!r} is there {keys.count(key)} times")
        return row

    with _opened(file, name, config.encoding, newline=None) as lines:
        for number, line in _lines(lines, name, config.encoding):
            place = f"{printable(name)}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=once)
            except json.JSONDecodeError as error:
                reason = f"{error.msg}, column {error.colno}"
            except RecursionError:
                reason = "nested too deeply"
            except ValueError as error:  # a number of too many digits, or a column that is doubled
                reason = str(error).partition(";")[0]
            else:
                yield rows.of_row(row, f"{name}:{number}", place, config)
                continue
            raise CorpusError(
                f"{place}: not JSON ({reason}); each line of a .jsonl file is one object"
            )


def _table(file: Path, name: str, config: CorpusConfig) -> Iterator[Document]:
    """The rows of a CSV or TSV file, whose first row names the columns; quoted fields may have
    several lines.
    """

    begun = [0]  # characters of the row that is read: one without an end would fill the memory

    def decoded(lines: TextIO) -> Iterator[str]:
        for number, line in _lines(lines, name, config.encoding):
            begun[0] += len(line)
            if begun[0] > _MOST_OF_A_ROW * rows.MAX_TEXT:
                raise rows.too_long(f"{printable(name)}, line {number}")
            yield line

    csv.field_size_limit(sys.maxsize)  # a text may be long
    with _opened(file, name, config.encoding, newline="") as lines:
        reader = csv.reader(decoded(lines), delimiter=TABLES[file.suffix.lower()], strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            begun[0] = 0
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise CorpusError(
                    f"{printable(name)}, line {start}: not a row of a {file.suffix} file "
                    f"({error}); correct it"
                ) from None
            place, number, start = f"{printable(name)}, line {start}", start, reader.line_num + 1
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                for key in ("column", "id_column"):
                    column = getattr(config, key)
                    if column is not None and header.count(column) != 1:
                        raise _not_one_column(key, column, header, place)
                continue
            if len(fields) != len(header):
                raise CorpusError(
                    f"{place}: {len(fields)} fields, and the header has {len(header)}; quote "
                    "fields that contain a delimiter, a quote or a line's end"
                )
            row = dict(zip(header, fields, strict=True))
            yield rows.of_row(row, f"{name}:{number}", place, config)


def _not_one_column(key: str, column: str, header: list[str], place: str) -> CorpusError:
    if column not in header:
        return rows.no_column(key, column, header, place)
    return CorpusError(
        f"{place}: {header.count(column)} columns are named {column!r}; rename all but one"
    )
