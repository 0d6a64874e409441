"""Files of texts: which files of a folder are read, and the documents in them."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.corpus.formats import arrow_files, decoding, fasta, sensed, shares, tables
from theloom.corpus.formats.shares import Part, Share
from theloom.corpus.rows import Document
from theloom.corpus.spooled.files import Files
from theloom.errors import CorpusError, printable

log = logging.getLogger(__name__)

_Reader = Callable[[Path, str, CorpusConfig], Iterator[Document]]
_Sharing = Callable[[Path, str, CorpusConfig, Share], Iterator[Document]]


def _text(file: Path, name: str, config: CorpusConfig) -> Iterator[Document]:
    for key, column in rows.wanted(config):
        if key in ("input_ids", "messages", "target", "columns"):
            raise rows.no_column(key, column, (), printable(name))
    yield Document(name, decoding.read_text(file, name, config.encoding), printable(name))


_READERS: dict[str, _Reader] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": tables.json_lines,
    ".json": tables.json_file,
    **dict.fromkeys(tables.DELIMITERS, tables.delimited),
    **dict.fromkeys(arrow_files.SUFFIXES, arrow_files.read),
    **dict.fromkeys(fasta.SUFFIXES, fasta.read),
}
SUFFIXES = tuple(_READERS)

# Those of which several jobs can each read a share; others are read from front to back
_SHARING: dict[str, _Sharing] = {
    ".jsonl": tables.json_lines,
    ".parquet": arrow_files.read,
    **dict.fromkeys(fasta.SUFFIXES, fasta.read),
}
_ALL = tuple(suffix + packed for suffix in SUFFIXES for packed in ("", *decoding.PACKED))

# A folder with more has its texts elsewhere, or too many files: `corpus.path=/` ends soon.
MOST_OTHERS, MOST_TEXTS = 100_000, 1_000_000
_SECONDS_BETWEEN_COUNTS = 5.0


def find(config: CorpusConfig) -> tuple[Files, str]:
    """The files of a corpus in a fixed order: one, or all below a folder that are not hidden.

    Args:
        config: the `corpus` settings.

    Returns:
        The files, and in words what was left out.

    Raises:
        CorpusError: there are none, one has no name in UTF-8 or leads nowhere, or Python does not
            know the encoding.
    """
    decoding.check_encoding(config.encoding)
    try:
        path = Path(config.path or "").expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that nobody has
        raise CorpusError(f"corpus.path: {config.path!r}: {error}") from None
    if is_file:
        if not path.name.lower().endswith(_endings(config)):
            raise CorpusError(
                f"corpus.path: {printable(path.name)} is not one of {_listed(config)}; convert it"
            )
        _name(path, path.parent)
        if not os.access(path, os.R_OK):
            raise CorpusError(f"corpus.path: {config.path!r} cannot be read; make it readable")
        arrow_files.check_installed([path])
        return Files(path.parent, [path.name]), ""
    if not is_folder:
        raise CorpusError(
            f"corpus.path: no file or folder {config.path!r}; relative paths start at {Path.cwd()}"
        )
    skipped: Counter[str] = Counter()
    files = Files(path, _below(path, skipped, _endings(config)))
    reasons = ", ".join(f"{count} {what}" for what, count in skipped.items() if count)
    if not files:
        raise CorpusError(
            f"corpus.path: {printable(str(path))} holds no file of {_listed(config)}"
            + f" (not read: {reasons})" * bool(reasons)
            + "; add one or give another path"
        )
    arrow_files.check_installed(files)
    return files, reasons


def _endings(config: CorpusConfig) -> tuple[str, ...]:
    """How the names of a corpus' files end."""
    return _ALL if config.kind.name == "text" else sensed.suffixes(config.kind.name)


def _listed(config: CorpusConfig) -> str:
    """The same, for messages."""
    if config.kind.name != "text":
        return ", ".join(sensed.suffixes(config.kind.name))
    return f"{', '.join(SUFFIXES)}, or one of them with {' or '.join(decoding.PACKED)}"


def _below(root: Path, skipped: Counter[str], endings: tuple[str, ...]) -> Iterator[str]:
    """The names of a corpus' files below a folder; counts of what is not read go to `skipped`."""

    def unreadable(error: OSError) -> NoReturn:
        raise CorpusError(f"corpus.path: {error.filename}: {error.strerror}") from None

    texts = others = 0
    last = time.monotonic()
    for folder, folders, names in os.walk(root, onerror=unreadable):
        here = sum(n.lower().endswith(endings) for n in names)
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
            if not name.lower().endswith(endings):
                skipped["of other kinds"] += 1
                continue
            shown = _name(file, root)
            try:
                is_file = file.is_file()
            except OSError as error:  # a folder that may be listed and not entered
                unreadable(error)
            if is_file:
                yield shown
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


def read(config: CorpusConfig, part: Part | None = None) -> Iterator[Document]:
    """The documents of a corpus of files: a whole file each, or a line or row of one.

    Args:
        config: the `corpus` settings.
        part: which share of the files' bytes is read; None: all.

    Yields:
        The documents, file by file in the order of `find`.

    Raises:
        CorpusError: a file cannot be read or decoded, changes meanwhile, or has a row without text.
    """
    files, left_out = find(config)
    if left_out:
        log.warning("corpus.path: not read in %s: %s", config.path, left_out)
    if part is None:
        for file, name in zip(files, files.names(), strict=True):
            yield from _READERS[decoding.kind_of(name)](file, name, config)
        return
    # an empty text is a document
    sizes = np.fromiter((max(1, size) for size, _ in _stated(files)), "<i8", len(files))
    mine, at = part.share(int(sizes.sum())), 0
    for file, name, size in zip(files, files.names(), map(int, sizes), strict=True):
        share = Share(mine.first - at, mine.end - at)
        at += size
        if is_shared(name, config.encoding):
            if share.first < size and share.end > 0:
                yield from _SHARING[decoding.kind_of(name)](file, name, config, share)
        elif 0 in share:
            yield from _READERS[decoding.kind_of(name)](file, name, config)


def is_shared(name: str, encoding: str) -> bool:
    """Whether several jobs can each read a share of a file.

    Args:
        name: of the file.
        encoding: of its text.

    Returns:
        False where it is read from front to back: packed files, JSON, CSV and Arrow, and lines in
        an encoding whose line ends are no bytes of ASCII.

    Examples:
        >>> [is_shared(name, "utf-8") for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet")]
        [True, False, False, True]
    """
    kind = decoding.kind_of(name)
    if kind not in _SHARING or name.lower().endswith(decoding.PACKED):
        return False
    return kind in arrow_files.SUFFIXES or shares.has_lines(encoding)


def read_by_one(config: CorpusConfig) -> str | None:
    """Why one job reads all of a corpus.

    Args:
        config: the `corpus` settings.

    Returns:
        The reason; None where several jobs can share it.

    Raises:
        CorpusError: as of `find`.
    """
    files, _ = find(config)
    name = files[0].name
    if len(files) > 1 or is_shared(name, config.encoding):
        return None
    return f"{printable(name)} is read from front to back"


def state(config: CorpusConfig) -> str:
    """Which files a corpus has, how long they are and when they were written.

    Args:
        config: the `corpus` settings.

    Returns:
        A hash, which changes with the files.

    Raises:
        CorpusError: as of `find`.
    """
    files, _ = find(config)
    found = xxhash.xxh3_128()
    for name, stated in zip(files.names(), _stated(files), strict=True):
        found.update(repr((name, *stated)).encode())
    return found.hexdigest()


def _stated(files: Files) -> Iterator[tuple[int, int]]:
    """Size and time of each file."""
    for file, name in zip(files, files.names(), strict=True):
        try:
            stated = file.stat()
        except OSError as error:
            raise CorpusError(f"{printable(name)}: cannot be read: {error.strerror}") from None
        yield stated.st_size, stated.st_mtime_ns
