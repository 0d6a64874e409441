"""FASTA: sequences of residues or bases, each after a header with its id and a description."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.corpus.formats import decoding
from theloom.corpus.formats.shares import Share
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, printable

SUFFIXES = (".fasta", ".fa", ".faa")


def read(
    file: Path, name: str, config: CorpusConfig, share: Share | None = None
) -> Iterator[Document]:
    """The sequences of a file, each with the columns `id` and `description`.

    Args:
        file: its path.
        name: of it, in messages.
        config: the `corpus` settings.
        share: the sequences whose headers begin in it are read; None: all.

    Yields:
        The documents in the order of the file.

    Raises:
        CorpusError: the file cannot be read, a header has no id or is missing, or a sequence is
            longer than a document may be.
    """
    header, start, pieces = "", 0, list[str]()

    def document() -> Document:
        key, _, description = header[1:].strip().partition(" ")
        place = f"{printable(name)}, line {start}"
        if not key:
            raise CorpusError(f"{place}: a header without an id; write one after the >")
        sequence = "".join(pieces)
        row = {"id": key, "description": description.strip(), "sequence": sequence}
        row.setdefault("text", sequence)
        return dataclasses.replace(rows.of_row(row, key, place, config), sequence=True)

    size = 0
    for number, line in decoding.lines_of(file, name, config.encoding, share, b">"):
        if line.startswith(">"):
            if start:
                yield document()
            header, start, pieces, size = line, number, [], 0
            continue
        piece = "".join(line.split())
        if piece and not start:
            raise CorpusError(
                f"{printable(name)}, line {number}: a sequence without a header; each begins "
                "with a line of > and an id"
            )
        size += len(piece)
        if size > rows.MAX_TEXT:
            raise rows.too_long(f"{printable(name)}, line {start}")
        pieces.append(piece)
    if start:
        yield document()
