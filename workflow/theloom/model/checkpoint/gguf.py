"""The header of a GGUF file, checked before a library follows its numbers: they may ask for more
than the file, or the memory, has.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from theloom.errors import ModelError
from theloom.model.checkpoint.folder import until_changed
from theloom.model.checkpoint.limits import check_config

_SCALARS = {  # by GGUF's number of the type
    **dict(zip(range(8), "BbHhIif?", strict=True)),
    **dict(zip(range(10, 13), "Qqd", strict=True)),
}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS, _DEEPEST_ARRAY = 8, 4
_ALIGNMENT = "general.alignment"


@until_changed
def check(file: Path, where: str) -> None:
    """Check what a GGUF file says of itself against its size.

    Args:
        file: the GGUF file.
        where: which model, for the message.

    Raises:
        ModelError: it is no GGUF file, or is cut short, or its numbers cannot be right.
    """
    try:
        with file.open("rb") as opened:
            metadata = _Header(opened, file.stat().st_size).check()
    except (OSError, ValueError, KeyError, struct.error) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{where}: {file.name} is damaged or no GGUF file ({words}); fetch it again"
        ) from None
    check_config(metadata, f"{where}: {file.name}")


class _Header:
    """Reads the header of a file of so many bytes, and raises ValueError for what cannot be."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def check(self) -> dict[str, Any]:
        """Returns the metadata's numbers."""
        if self._file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if not 2 <= (version := self._number("I")) <= 3:
            raise ValueError(f"version {version} is not 2 or 3")
        tensors, pairs = self._number("Q"), self._number("Q")
        for what, count, least in (("tensors", tensors, 24), ("values", pairs, 13)):
            if count * least > self._size:
                raise ValueError(f"{count:,} {what} in {self._size:,} bytes")
        metadata = {}
        for _ in range(pairs):
            name = self._text()
            if (value := self._value(self._number("I"))) is not None:
                metadata[name] = value
        places = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"an alignment of {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        self._check_places(places, start)
        return metadata

    def _check_places(self, places: list[tuple[str, int, int]], start: int) -> None:
        """No two tensors share bytes, and all bytes are there."""
        end, before = 0, ""
        for name, offset, size in sorted(places, key=lambda place: place[1:]):
            if offset < end and size:
                raise ValueError(f"{name} and {before} share bytes")
            end, before = max(end, offset + size), name
            if start + end > self._size:
                raise ValueError(f"{name} ends behind the file's {self._size:,} bytes")

    def _tensor(self) -> tuple[str, int, int]:
        """The name, the offset and the bytes of a tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self._text(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = [self._number("Q") for _ in range(dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = 1
        for length in shape:
            if not 0 < length <= self._size * block:
                raise ValueError(f"{name} has the shape {shape}")
            count *= length
        return name, offset, -(-count // block) * block_bytes

    def _number(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{kind}", self._bytes(size))[0]

    def _bytes(self, count: int) -> bytes:
        self._check_there(count)
        return self._file.read(count)

    def _check_there(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise ValueError(f"{count:,} bytes at {self._file.tell():,} are not there")

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode(errors="replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A number; None for all else, which is passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            self._text()
            return None
        if kind != _ARRAY or depth > _DEEPEST_ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if count > self._size:
            raise ValueError(f"an array of {count:,} in {self._size:,} bytes")
        if inner in _SCALARS:
            size = count * struct.calcsize(f"<{_SCALARS[inner]}")
            self._check_there(size)
            self._file.seek(size, 1)
            return None
        if inner == _TEXT:
            self._pass_over_texts(count)
            return None
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _pass_over_texts(self, count: int) -> None:
        """The texts of a vocabulary, of which there are a hundred thousand."""
        read, length_of = self._file.read, struct.Struct("<Q").unpack
        at = self._file.tell()
        for _ in range(count):
            at += 8
            if at > self._size:
                raise ValueError(f"8 bytes at {at - 8:,} are not there")
            (length,) = length_of(read(8))
            at += length
            if at > self._size:
                raise ValueError(f"{length:,} bytes at {at - length:,} are not there")
            read(length)
