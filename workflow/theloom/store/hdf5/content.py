"""What an HDF5 file's objects hold, read from its bytes without HDF5's own library: shapes, types
and places of datasets, and attributes.

What is stored differently from what TheLoom writes is an error (ValueError), or has no type: then
nothing reads it.
"""

import math
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from theloom.store.hdf5 import objects
from theloom.store.hdf5.objects import UNDEFINED, Messages, Objects

CONTIGUOUS, CHUNKED, VIRTUAL = 1, 2, 3  # HDF5's numbers for layouts

_LAYOUTS = {3: (0, CONTIGUOUS, CHUNKED), 4: (VIRTUAL,)}  # by version; 0: in the header itself
_MOST_AXES = 8
_INTEGER, _FLOAT, _STRING, _COMPOUND, _ENUM, _VARIABLE = 0, 1, 3, 6, 8, 9

# HDF5's floats as their messages have them, after class and version: IEEE, and bfloat16
_FLOATS = {
    bytes.fromhex("20 3f 00 08000000 0000 4000 34 0b 00 34 ff030000"): "<f8",
    bytes.fromhex("20 1f 00 04000000 0000 2000 17 08 00 17 7f000000"): "fp32",
    bytes.fromhex("20 0f 00 02000000 0000 1000 0a 05 00 0a 0f000000"): "fp16",
    bytes.fromhex("20 0f 00 02000000 0000 1000 07 08 00 07 7f000000"): "bf16",
}


@dataclass(frozen=True)
class Stored:
    """A dataset: its shape, the type of its elements, and where they are.

    `type` is NumPy's, or `fp32`, `fp16` or `bf16`, or empty for any that TheLoom does not write.
    `places` has an offset and a size in bytes; for each chunk, where there are chunks, and then
    `starts` has the first row of each.
    """

    shape: tuple[int, ...]
    type: str
    layout: int
    places: list[tuple[int, int]] = field(default_factory=list)
    chunk: tuple[int, ...] = ()
    starts: list[int] = field(default_factory=list)


def dataset(file: Objects, header: Messages) -> Stored:
    """Describe a dataset.

    Args:
        file: the open file.
        header: the messages of the dataset.

    Returns:
        Shape, type, layout, and places in bytes.

    Raises:
        ValueError: it is damaged, or stored otherwise than TheLoom does it.
    """
    messages = _once(header)
    shape = _shape(messages[objects.DATASPACE])
    type_, size = _type(messages[objects.DATATYPE])
    layout, version = messages[objects.LAYOUT], messages[objects.LAYOUT][0]
    if layout[1] not in _LAYOUTS.get(version, ()):
        raise ValueError("a dataset has a layout that TheLoom does not write")
    if layout[1] == CONTIGUOUS:
        address, length = struct.unpack_from("<QQ", layout, 2)
        places = [] if address == UNDEFINED else [(address, length)]
        if places and (address + length > file.size or length != math.prod(shape) * size):
            raise ValueError("a dataset lies beyond the end of the file, or has another size")
        return Stored(shape, type_, CONTIGUOUS, places)
    if layout[1] == CHUNKED:
        axes, tree = struct.unpack_from("<BQ", layout, 2)
        sizes = struct.unpack_from(f"<{axes}I", layout, 11)
        if axes != len(shape) + 1 or sizes[-1] != size or not all(sizes):
            raise ValueError("a dataset has chunks of another size than its rows")
        chunks = sorted(_chunks(file, tree, axes))
        if len(chunks) > -(-shape[0] // sizes[0]):
            raise ValueError("a dataset has more chunks than rows")
        return Stored(
            shape,
            type_,
            CHUNKED,
            [(offset, length) for _, offset, length in chunks],
            sizes[:-1],
            [start for start, _, _ in chunks],
        )
    return Stored(shape, type_, layout[1])


def external_files(file: Objects, header: Messages) -> list[str]:
    """Name the other files in which the bytes of a dataset are.

    Args:
        file: the open file.
        header: the messages of the dataset.

    Returns:
        Paths as the file spells them; none for a file of TheLoom.
    """
    message = _once(header).get(objects.EXTERNAL)
    if message is None:
        return []
    used, heap = struct.unpack_from("<HQ", message, 6)
    size, _, at = struct.unpack("<8xQQQ", file.read(heap, 32))
    texts = file.read(at, size)
    starts = [struct.unpack_from("<Q", message, 16 + 24 * number)[0] for number in range(used)]
    return [texts[at : texts.index(b"\0", at)].decode(errors="replace") for at in starts]


def virtual_files(file: Objects, header: Messages) -> set[str]:
    """Name the files to which a virtual dataset refers.

    Args:
        file: the open file.
        header: the messages of the dataset.

    Returns:
        Paths as the file spells them; `.` is the file itself.

    Raises:
        ValueError: a heap is damaged.
    """
    layout = _once(header)[objects.LAYOUT]
    if layout[:2] != bytes((4, VIRTUAL)):
        return set()
    address, number = struct.unpack_from("<QI", layout, 2)
    if address == UNDEFINED:
        return set()
    block = _heap(file, address).get(number)
    if block is None:
        raise ValueError("a heap is damaged")
    return _virtual_files(block)


def attributes(
    file: Objects, header: Messages, wanted: Collection[str] | None = None
) -> dict[str, Any]:
    """The attributes of an object: texts, numbers and truth values.

    Args:
        file: the open file.
        header: the messages of the object.
        wanted: names of attributes; None: all.

    Returns:
        Values by name.

    Raises:
        ValueError: one is damaged, or of a type that TheLoom does not write.
    """
    heaps: dict[int, dict[int, bytes]] = {}
    found: dict[str, Any] = {}
    for message in (data for kind, data in header if kind == objects.ATTRIBUTE):
        name, type_, shape, value = _attribute_parts(message)
        if name in found:
            raise ValueError(f"its attribute {name} is there twice")
        if wanted is None or name in wanted:
            found[name] = _value(file, name, type_, shape, value, heaps)
    return found


def _once(header: Messages) -> dict[int, bytes]:
    """The messages of a dataset; of attributes the last."""
    found = dict(header)
    single = (objects.DATASPACE, objects.DATATYPE, objects.LAYOUT, objects.EXTERNAL)
    if any(sum(kind == one for kind, _ in header) > 1 for one in single):
        raise ValueError("an object header is damaged")
    return found


def _shape(message: bytes) -> tuple[int, ...]:
    version, axes = message[:2]
    if version not in (1, 2) or axes > _MOST_AXES:
        raise ValueError("a shape is damaged")
    shape = struct.unpack_from(f"<{axes}Q", message, 8 if version == 1 else 4)
    if math.prod(shape) >= 1 << 62:
        raise ValueError("a shape has more elements than any disk")
    return shape


def _type(message: bytes) -> tuple[str, int]:
    """The type of elements as `Stored` has it, and the bytes of each."""
    kind, flags = message[0] & 15, message[1]
    (size,) = struct.unpack_from("<I", message, 4)
    if not size:
        raise ValueError("a type is damaged")
    name = ""
    if kind == _INTEGER and not flags & ~8 and size in (1, 2, 4, 8):
        order = "|" if size == 1 else "<"
        whole = message[8:12] == struct.pack("<HH", 0, 8 * size)
        name = f"{order}{'i' if flags & 8 else 'u'}{size}" if whole else ""
    elif kind == _FLOAT:
        name = _FLOATS.get(message[1:20], "")
    elif kind == _STRING:
        name = f"|S{size}"
    elif kind == _COMPOUND:
        name = _compound(message, size)
    return name, size


def _compound(message: bytes, size: int) -> str:
    """The names of the members if all are unsigned integers of 8 bytes, one after the other."""
    count, at, names = message[1] | message[2] << 8, 8, []
    for number in range(count):
        end = message.index(b"\0", at)
        names.append(message[at:end].decode())
        at += (end - at) // 8 * 8 + 8
        (offset,) = struct.unpack_from("<I", message, at)
        at += 32 if message[0] >> 4 == 1 else 4
        if offset != 8 * number or _type(message[at : at + 12]) != ("<u8", 8):
            return ""
        at += 12
    return ",".join(names) if size == 8 * count else ""


def _chunks(file: Objects, tree: int, axes: int) -> list[tuple[int, int, int]]:
    """The first row, the offset and the size of each chunk, all of whole rows."""
    if tree == UNDEFINED:
        return []
    file.allow(file.size)  # their number grows with the rows
    entry = np.dtype([("size", "<u4"), ("mask", "<u4"), ("at", "<u8", (axes,)), ("child", "<u8")])
    found: list[tuple[int, int, int]] = []
    below = [tree]
    for address, signature, kind, level, used in file.nodes(below, "chunks"):
        if signature != b"TREE" or kind != 1:
            raise ValueError("the index of chunks is damaged")
        node = np.frombuffer(file.read(address + 24, used * entry.itemsize), entry)
        if level:
            below += node["child"].tolist()
            continue
        if node["mask"].any() or node["at"][:, 1:].any():
            raise ValueError("a chunk is stored otherwise than TheLoom does it")
        found += zip(
            node["at"][:, 0].tolist(), node["child"].tolist(), node["size"].tolist(), strict=True
        )
    if any(offset + size > file.size for _, offset, size in found):
        raise ValueError("a chunk lies beyond the end of the file")
    return found


def _heap(file: Objects, address: int) -> dict[int, bytes]:
    """The objects of a global heap by their numbers."""
    signature, size = struct.unpack("<4s4xQ", file.read(address, 16))
    if signature != b"GCOL" or size < 16:
        raise ValueError("a heap is damaged")
    data, at, found = file.read_heap(address, size), 16, {}
    while at + 16 <= size:
        number, length = struct.unpack_from("<H6xQ", data, at)
        if not number:
            break
        found[number] = data[at + 16 : at + 16 + length]
        at += 16 + -(-length // 8) * 8
    return found


def _virtual_files(block: bytes) -> set[str]:
    """The files of a virtual dataset's mappings: each has file, dataset and two selections."""
    version, count = struct.unpack_from("<BQ", block)
    if version or count > len(block):
        raise ValueError("a virtual dataset is damaged")
    at, names = 9, set()
    for _ in range(count):
        end = block.index(b"\0", at)
        names.add(block[at:end].decode())
        at = block.index(b"\0", end + 1) + 1
        for _ in range(2):
            at += _selection_size(block, at)
    return names


def _selection_size(block: bytes, at: int) -> int:
    """The bytes of a selection of elements: all, none, or a hyperslab."""
    kind, version = struct.unpack_from("<II", block, at)
    if kind in (0, 3):
        return 16
    if kind != 2:
        raise ValueError("a virtual dataset is damaged")
    if version == 1:
        return 16 + struct.unpack_from("<I", block, at + 12)[0]
    if version == 2:
        return 13 + struct.unpack_from("<I", block, at + 9)[0]
    flags, width, axes = struct.unpack_from("<BBI", block, at + 8)
    if version != 3 or width not in (2, 4, 8) or axes > _MOST_AXES:
        raise ValueError("a virtual dataset is damaged")
    if flags & 1:
        return 14 + 4 * axes * width
    blocks = int.from_bytes(block[at + 14 : at + 14 + width], "little")
    return 14 + width + 2 * axes * blocks * width


def _attribute_parts(message: bytes) -> tuple[str, bytes, bytes, bytes]:
    """The name of an attribute, its type, its shape, and what its value begins with."""
    version, _, *sizes = struct.unpack_from("<BBHHH", message)
    if version not in (1, 2, 3) or (version > 1 and message[1]):
        raise ValueError("an attribute is damaged")
    at, parts = (9 if version == 3 else 8), []
    for size in sizes:
        parts.append(message[at : at + size])
        at += -(-size // 8) * 8 if version == 1 else size
    return parts[0].rstrip(b"\0").decode(), parts[1], parts[2], message[at:]


def _value(
    file: Objects,
    name: str,
    kind: bytes,
    shape: bytes,
    data: bytes,
    heaps: dict[int, dict[int, bytes]],
) -> Any:
    """The value of an attribute; `heaps` keeps the heaps that have been read."""
    if math.prod(_shape(shape)) != 1:
        raise ValueError(f"its attribute {name} is an array, which TheLoom does not write")
    class_, (type_, size) = kind[0] & 15, _type(kind)
    if class_ == _VARIABLE and kind[1] & 15 == 1:
        length, address, number = struct.unpack_from("<IQI", data)
        if length and address not in heaps:
            heaps[address] = _heap(file, address)
        text = heaps[address].get(number, b"")[:length] if length else b""
        if len(text) != length:
            raise ValueError(f"its attribute {name} is damaged")
        return text.decode()
    data = data[:size]
    if len(data) == size:
        if class_ == _ENUM:  # h5py's truth values
            return bool(data[0])
        if class_ == _STRING:
            return data.rstrip(b"\0").decode()
        numpy_type = {"fp32": "<f4", "fp16": "<f2"}.get(type_, type_)
        if numpy_type[1:2] in ("i", "u", "f"):
            return np.frombuffer(data, numpy_type)[0].item()
    raise ValueError(f"its attribute {name} has a type that TheLoom does not write")
