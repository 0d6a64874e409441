"""The images of a conversation: where each is, and its bytes, read again by what is kept of it.

A part of a message is an image's where it says so (`{"type": "image"}`). The image is a file that
the part names, bytes in it, or the next one of the column `corpus.images`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.config.schema import CorpusConfig
from theloom.corpus import rows
from theloom.corpus.media import values
from theloom.corpus.media.items import file_content, root_of
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

_NAMED = ("path", "image", "url", "bytes")  # keys of a part that may hold its image
_OTHER_MEDIA = ("video", "audio", "image_url")
_TABLE = ".parquet"


@dataclass(frozen=True)
class Picture:
    """One image of a conversation.

    Attributes:
        where: what finds it again: `file`, or `row` of a table and the number of the `image` in it.
        message: the number of its message.
        content: its bytes.
        place: for messages.
    """

    where: dict[str, Any]
    message: int
    content: bytes
    place: str

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def described(self) -> dict[str, Any]:
        """What is kept of it in a file."""
        return {**self.where, "sha256": self.digest}

    @property
    def opened(self) -> "Image":
        """The image in RGB, turned as its EXIF data says.

        Raises:
            CorpusError: it is damaged, or nothing that Pillow knows.
        """
        from PIL import Image

        return Image.fromarray(values.pixels(self.content, self.place))


def check_none(document: Document) -> None:
    """Check that a conversation of a run of texts has no images or other media, whose placeholders
    would be read as text.

    Args:
        document: with its messages.

    Raises:
        CorpusError: it has one.
    """
    for _, part in _parts(document):
        raise CorpusError(
            f"{document.place}: document {printable(document.id)!r} has a part of the type "
            f"{part['type']!r}, and model.modality is not chat; set model.modality=chat for images "
            "and a vision-language model, or take the part out"
        )


def pictures(document: Document, config: CorpusConfig) -> list[Picture]:
    """The images of a conversation in their order.

    Args:
        document: with its messages, and the images of its row.
        config: the `corpus` settings.

    Returns:
        One for each part of that type.

    Raises:
        CorpusError: one is missing, cannot be read, or is of another medium; or images are left.
    """
    found, column = list[Picture](), list(document.images or [])
    of_column = iter(column)
    for message, part in _parts(document):
        place = f"{document.place}: document {printable(document.id)!r}, image {len(found) + 1}"
        if part["type"] != "image":
            raise CorpusError(
                f"{place}: message {message + 1} has a part of the type {part['type']!r}; texts "
                "and images alone are read: take it out"
            )
        named = [part[key] for key in _NAMED if part.get(key) is not None]
        source = named[0] if named else next(of_column, None)
        if source is None:
            raise CorpusError(
                f"{place}: message {message + 1} names no file and has no bytes, and "
                + (
                    f"column {config.images!r} has {len(column)} images; add one there"
                    if config.images
                    else 'corpus.images is not set; give the part a "path", or set corpus.images '
                    "to the column that holds the images"
                )
            )
        found.append(_picture(source, message, len(found), place, document, config))
    if (left := len([*of_column])) > 0:
        raise CorpusError(
            f"{document.place}: document {printable(document.id)!r}: column {config.images!r} has "
            f"{len(column)} images, and the messages have parts for {len(column) - left} of them; "
            'write {"type": "image"} where each is shown'
        )
    return found


def without_sources(document: Document) -> Document:
    """The same conversation for a chat template, which asks whether a part is an image's.

    Args:
        document: with its messages.

    Returns:
        A copy whose images are parts of their type alone.
    """

    def plain(message: Any) -> Any:
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        parts = [
            {"type": "image"} if isinstance(p, dict) and p.get("type") == "image" else p
            for p in message["content"]
        ]
        return message | {"content": parts}

    return replace(document, messages=[plain(m) for m in document.messages or []])


class Pictures:
    """Reads images of conversations again.

    Args:
        config: the `corpus` settings of the run.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._row: tuple[str, list[Picture]] | None = None  # of the row read last
        self._group: tuple[str, int, Any] | None = None  # the row group read last

    def read(self, described: Mapping[str, Any]) -> Picture:
        """One image, checked to be the one that it was.

        Args:
            described: as of `Picture.described`.

        Returns:
            The image.

        Raises:
            CorpusError: it is gone, or has changed.
        """
        where = {name: value for name, value in described.items() if name != "sha256"}
        if "file" in where:
            name = str(where["file"])
            found = Picture(where, 0, _file(name, printable(name), self._config), printable(name))
        else:
            found = self._of_row(str(where["row"]), int(where["image"]))
        if found.digest != described["sha256"]:
            raise CorpusError(
                f"{found.place}: has changed since its tokens were counted; put it back, or run "
                "again with --forcerun tokenize_corpus"
            )
        return found

    def _of_row(self, name: str, image: int) -> Picture:
        if self._row is None or self._row[0] != name:
            self._row = (name, pictures(self._document(name), self._config))
        found = self._row[1]
        if image >= len(found):
            raise CorpusError(
                f"{printable(name)}: has {len(found)} images now; put the table back, or run again "
                "with --forcerun tokenize_corpus"
            )
        return found[image]

    def _document(self, name: str) -> Document:
        """The row of a Parquet file; `name` has the file and the number of the row."""
        import pyarrow as pa

        from theloom.corpus.formats.arrow_files import without_nulls

        table, _, row = name.rpartition(":")
        file, place = root_of(self._config) / table, f"{printable(table)}, row {row}"
        gone = CorpusError(
            f"{place}: is no longer there; put the table back, or run again with --forcerun "
            "tokenize_corpus"
        )
        if not file.is_file():
            raise gone
        try:
            found = self._found(file, int(row) - 1)
        except (pa.ArrowException, OSError) as error:
            words = printable(" ".join(str(error).split()))[:200]
            raise CorpusError(
                f"{place}: cannot be read ({words}); fetch or write the file again"
            ) from None
        if found is None:
            raise gone
        return rows.of_row(without_nulls(found), name, place, self._config)

    def _found(self, file: Path, row: int) -> Any:
        """A row as Python has it, counted from 0; None where the file has fewer."""
        import pyarrow.parquet

        from theloom.corpus.formats.arrow_files import chosen

        opened, before = pyarrow.parquet.ParquetFile(file), 0
        names = chosen(self._config, opened.schema_arrow.names)
        for group in range(opened.metadata.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if row < before + count:
                if self._group is None or self._group[:2] != (str(file), group):
                    self._group = (str(file), group, opened.read_row_group(group, columns=names))
                return self._group[2].slice(row - before, 1).to_pylist()[0]
            before += count
        return None


def _parts(document: Document) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parts of messages that are no texts, each with the number of its message."""
    for number, message in enumerate(document.messages or []):
        content = message.get("content", message.get("value")) if isinstance(message, dict) else ()
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in ("image", *_OTHER_MEDIA):
                yield number, part


def _picture(
    source: Any, message: int, number: int, place: str, document: Document, config: CorpusConfig
) -> Picture:
    if isinstance(source, dict):  # as `datasets` writes images
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str):
        return Picture({"file": source}, message, _file(source, place, config), place)
    if not isinstance(source, bytes):
        raise CorpusError(
            f"{place}: is {rows.kind(source)}, not the path of a file or bytes; write one of them"
        )
    if not document.origin.rpartition(":")[0].lower().endswith(_TABLE):
        raise CorpusError(
            f"{place}: has its bytes in {printable(document.origin)}, and they are read again from "
            ".parquet alone; write the table so, or the images as files"
        )
    return Picture({"row": document.origin, "image": number}, message, source, place)


def _file(name: str, place: str, config: CorpusConfig) -> bytes:
    if re.match("[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise CorpusError(
            f"{place}: {printable(name)[:80]!r} is no file here; fetch it, and give its path"
        )
    if len(json.dumps(name)) > rows.MAX_ID_BYTES or "\0" in name:
        raise CorpusError(f"{place}: the path of the image is very long or has a NUL; shorten it")
    file = root_of(config) / Path(name).expanduser()
    if not file.is_file():
        raise CorpusError(
            f"{place}: no file {printable(str(file))!r}; put it there, or correct the path, which "
            "begins at the folder of corpus.path"
        )
    return file_content(file, place)
