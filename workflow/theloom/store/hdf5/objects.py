"""The groups and links of an HDF5 file, read from its bytes without HDF5's own library.

A file may come from a stranger or a broken disk. HDF5's library hangs at one changed metadata byte
in some hundred, and crashes at others. Here every address is checked against the size of the file,
and bytes, objects and depth are counted, so that whatever a file holds, reading it ends soon, in
its structure or in a ValueError. Only the structures that h5py writes for TheLoom are understood
(superblock 0, object headers 1, symbol tables); HDF5's file format specification has their layout.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from theloom.store.hdf5 import byte_source
from theloom.store.hdf5.byte_source import Readable

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = (1 << 64) - 1  # an address of nothing

DEEPEST = 3  # hooks/<name>/activations
MOST_OBJECTS = 50_000  # links of all groups
MOST_BYTES = 32 << 20  # of headers and groups
MOST_HEAPS = 512 << 20  # bytes of attributes, and of the sources of virtual datasets

# messages of an object header
DATASPACE, LINK_INFO, DATATYPE, LINK, EXTERNAL, LAYOUT = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08
FILTERS, ATTRIBUTE, CONTINUATION, SYMBOLS = 0x0B, 0x0C, 0x10, 0x11

_SHARED = 2  # a flag of a message: its content is elsewhere, which TheLoom never writes
_SOFT = 2  # the type of a symbol table's entry

Messages = list[tuple[int, bytes]]


class CutShortError(ValueError):
    """The file ends before the end that it states."""

    def __init__(self, size: int, stated: int) -> None:
        super().__init__(f"{size:,} of {stated:,} bytes are there")


class ForeignError(ValueError):
    """The file is none of HDF5, or of a kind that TheLoom does not write."""


@dataclass(frozen=True)
class Link:
    """Where a name in a group leads: to an object's address, or elsewhere (`kind`, `target`)."""

    name: str
    address: int = UNDEFINED
    kind: str = "hard"  # or "soft" or "external"
    target: str = ""


class Objects:
    """An open file, read as HDF5.

    Args:
        fd: of the file, open for reading, or what reads it; it stays the caller's.

    Raises:
        ForeignError: the file is no HDF5, or of another kind.
        CutShortError: the file is shorter than it states.
        ValueError: what is read is damaged; each method may raise it.
    """

    def __init__(self, fd: Readable) -> None:
        self.fd = fd
        self.size = byte_source.size_of(fd)
        self._left = MOST_BYTES
        self._heaps = MOST_HEAPS
        self._links = MOST_OBJECTS
        head = byte_source.pread(fd, 96, 0)
        if not head.startswith(SIGNATURE):
            raise ForeignError("it is none")
        if len(head) < 96:
            raise CutShortError(self.size, 96)
        if head[8] or head[13] != 8 or head[14] != 8 or head[24:32] != bytes(8):
            raise ForeignError("it has a superblock that TheLoom does not write")
        end, self._root = (struct.unpack_from("<Q", head, offset)[0] for offset in (40, 64))
        if self.size < end:
            raise CutShortError(self.size, end)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes of the file; all that is read this way together is limited.

        Args:
            offset: of the first byte.
            size: how many.

        Returns:
            That many bytes.
        """
        self._left -= size
        if self._left < 0:
            raise ValueError("its metadata is larger than any that TheLoom writes")
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError("it refers to bytes beyond its end")
        data = byte_source.pread(self.fd, size, offset)
        if len(data) != size:
            raise ValueError("it ends early")
        return data

    def read_heap(self, offset: int, size: int) -> bytes:
        """Read bytes of a heap, which have a limit of their own.

        Args:
            offset: of the first byte.
            size: how many.

        Returns:
            That many bytes.
        """
        self._heaps -= size
        if self._heaps < 0:
            raise ValueError("its heaps are larger than any that TheLoom writes")
        self.allow(size)
        return self.read(offset, size)

    def allow(self, more: int) -> None:
        """Raise the limit of `read`, for what grows with a file's rows.

        Args:
            more: bytes.
        """
        self._left += more

    def messages(self, address: int) -> Messages:
        """Read the messages of an object header.

        Args:
            address: of the header.

        Returns:
            Types and contents, in the order of the file.
        """
        version, _, count, _, size = struct.unpack("<BBHII", self.read(address, 12))
        if version != 1:
            raise ValueError("an object header is damaged")
        blocks, found = [(address + 16, size)], []
        for offset, length in blocks:
            data, at = self.read(offset, length), 0
            while at + 8 <= length:
                kind, size, flags = struct.unpack_from("<HHB", data, at)
                content = data[at + 8 : at + 8 + size]
                at += 8 + size
                if len(content) != size or (kind and flags & _SHARED):
                    raise ValueError("an object header is damaged")
                if kind == CONTINUATION:
                    blocks.append(struct.unpack("<QQ", content[:16]))
                found.append((kind, content))
            if len(found) > count:
                raise ValueError("an object header has more messages than it states")
        return found

    def root(self) -> Messages:
        """Read the header of the root group.

        Returns:
            Its messages.
        """
        return self.messages(self._root)

    def links(self, header: Messages) -> Iterator[Link]:
        """The links of a group.

        Args:
            header: its messages.

        Yields:
            The links, in the order of the file.
        """
        for kind, content in header:
            if kind == SYMBOLS:
                yield from self._symbols(*struct.unpack("<QQ", content[:16]))
            elif kind == LINK:
                yield _link(content)
            elif kind == LINK_INFO:
                at = 10 if content[1] & 1 else 2
                if struct.unpack_from("<Q", content, at)[0] != UNDEFINED:
                    raise ValueError("a group has an index that TheLoom does not write")

    def find(self, name: str) -> Messages | None:
        """Find an object by its name.

        Args:
            name: such as `tokens/input_ids`.

        Returns:
            The messages of its header; None: there is none.
        """
        header = self.root()
        for part in name.split("/"):
            link = next((one for one in self.links(header) if one.name == part), None)
            if link is None or link.kind != "hard":
                return None
            header = self.messages(link.address)
        return header

    def datasets(self) -> Iterator[tuple[str, Messages]]:
        """Walk through all datasets.

        Yields:
            The name of each, and the messages of its header.

        Raises:
            ValueError: there are links that lead elsewhere, or groups deeper or more than TheLoom
                writes.
        """
        for name, found in self.walk():
            if isinstance(found, Link):
                raise ValueError(f"its {name} is a link, which no file of TheLoom has")  # noqa: TRY004
            yield name, found

    def walk(self) -> Iterator[tuple[str, Link | Messages]]:
        """Walk through all datasets, and all links that lead elsewhere.

        Yields:
            The name of each, and the messages of its header, or the link.

        Raises:
            ValueError: there are groups deeper or more than TheLoom writes.
        """
        seen, pending = {self._root}, [("", self.root())]
        while pending:
            group, header = pending.pop()
            for link in self.links(header):
                name = group + link.name
                if link.kind != "hard":
                    yield name, link
                    continue
                if link.address in seen:
                    raise ValueError(f"its {name} has another name, which no file of TheLoom has")
                seen.add(link.address)
                found = self.messages(link.address)
                kinds = {kind for kind, _ in found}
                if {DATASPACE, DATATYPE, LAYOUT} <= kinds:
                    yield name, found
                elif not kinds & {SYMBOLS, LINK, LINK_INFO}:
                    raise ValueError(f"its {name} is neither a group nor a dataset")
                elif name.count("/") + 1 >= DEEPEST:
                    raise ValueError(f"its {name} is deeper than any group of TheLoom")
                else:
                    pending.append((f"{name}/", found))

    def _symbols(self, tree: int, heap: int) -> Iterator[Link]:
        """The links of a symbol table: a B-tree of tables, whose names are in a heap."""
        signature, size, _, names_at = struct.unpack("<4s4xQQQ", self.read(heap, 32))
        if signature != b"HEAP":
            raise ValueError("the names of a group are damaged")
        names, below = self.read(names_at, size), [tree]
        for address, signature, kind, _, used in self.nodes(below, "a group"):
            if signature == b"TREE" and not kind:
                keys = struct.unpack(f"<{2 * used + 1}Q", self.read(address + 24, 16 * used + 8))
                below += keys[1::2][::-1]
                continue
            if signature != b"SNOD":
                raise ValueError("the index of a group is damaged")
            for entry in struct.iter_unpack("<QQI4x16s", self.read(address + 8, 40 * used)):
                yield self._entry(names, *entry)

    def nodes(self, below: list[int], what: str) -> Iterator[tuple[int, bytes, int, int, int]]:
        """Walk through the nodes of a B-tree, each once.

        Args:
            below: the addresses of nodes to come, the last first; the caller adds a node's own.
            what: what the tree is the index of, for the message.

        Yields:
            Address, signature, type, level and number of entries.

        Raises:
            ValueError: a node is reached twice.
        """
        seen: set[int] = set()
        while below:
            address = below.pop()
            if address in seen:
                raise ValueError(f"the index of {what} is damaged")
            seen.add(address)
            yield address, *struct.unpack("<4sBBH", self.read(address, 8))

    def _entry(self, names: bytes, at: int, address: int, kind: int, scratch: bytes) -> Link:
        self._links -= 1
        if self._links < 0:
            raise ValueError("it has more objects than any file of TheLoom")
        name = _text(names, at)
        if not name or "/" in name:
            raise ValueError("the names of a group are damaged")
        if kind == _SOFT:
            return Link(
                name, kind="soft", target=_text(names, int.from_bytes(scratch[:4], "little"))
            )
        return Link(name, address)


def _text(data: bytes, at: int) -> str:
    """The text that ends with a zero."""
    end = data.find(b"\0", at)
    if at > len(data) or end < 0:
        raise ValueError("the names of a group are damaged")
    return data[at:end].decode()


def _link(content: bytes) -> Link:
    """A link message, as groups have it that hold an external link."""
    flags, at = content[1], 2
    kind, at = (content[at], at + 1) if flags & 8 else (0, at)
    at += (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(content[at : at + width], "little")
    at += width
    name, rest = content[at : at + length].decode(), content[at + length :]
    if not name or "/" in name:
        raise ValueError("the names of a group are damaged")
    if kind == 0:
        return Link(name, struct.unpack("<Q", rest[:8])[0])
    if kind == 1:
        return Link(name, kind="soft", target=rest[2:].decode())
    return Link(name, kind="external", target=rest[3:].split(b"\0")[0].decode())
