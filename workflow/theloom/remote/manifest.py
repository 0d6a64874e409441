"""What a pushed folder holds, and the hashes by which each of its bytes is checked.

The folder has a manifest, `theloom-manifest.json`, and next to the files `hashes/<file>`: the
record of each, with the XXH3-128 of every block. The manifest has the SHA-256 of each record. So a
reader fetches a small manifest, the record of a file when it reads that file, and then blocks, and
checks each of them by the one before. Blocks have the hash that rows have in the store: it is as
fast as memory, where SHA-256 would slow down reading, and finds damage and mistakes.
"""

import hashlib
import json
import posixpath
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from theloom.errors import StoreError
from theloom.store import checksums, file_format, index
from theloom.store.hdf5.objects import SIGNATURE

MANIFEST = "theloom-manifest.json"
HASHES = "hashes"
CARD = "README.md"
BLOCK = 1 << 18  # bytes that have a hash: what a reader of a single row fetches

_FORMAT = {"format": "theloom.manifest", "format_version": 1}
_DIGEST = xxhash.xxh3_128().digest_size


@dataclass(frozen=True)
class Record:
    """The hashes of one file: SHA-256 of all of it (`sha256`, in hexadecimal) and XXH3-128 of each
    block (`digests`, one after the other); of a file of hidden states also its own `checksums` (in
    hexadecimal), and the byte at which they are.
    """

    size: int
    sha256: str
    digests: bytes
    block: int = BLOCK
    checksums: str = ""
    checksums_offset: int = 0

    @classmethod
    def of(cls, path: Path) -> "Record":
        """Hash a local file.

        Args:
            path: the file.

        Returns:
            Its record.

        Raises:
            StoreError: it is a damaged file of hidden states.
        """
        whole, digests, size = hashlib.sha256(), bytearray(), 0
        with path.open("rb") as file:
            head = file.read(len(SIGNATURE))
            file.seek(0)
            while data := file.read(BLOCK):
                whole.update(data)
                digests += xxhash.xxh3_128_digest(data)
                size += len(data)
        own, at = own_checksums(path) if head == SIGNATURE else (b"", 0)
        return cls(size, whole.hexdigest(), bytes(digests), BLOCK, own.hex(), at)

    def encoded(self) -> bytes:
        """The record as a file: a line of JSON, then the hashes of the blocks.

        Returns:
            The bytes of the file.
        """
        values = asdict(self)
        del values["digests"]
        return json.dumps(values, sort_keys=True).encode() + b"\n" + self.digests

    @classmethod
    def decoded(cls, data: bytes, sha256: str) -> "Record":
        """Read what `encoded` wrote.

        Args:
            data: the file.
            sha256: of it, as the manifest has it.

        Returns:
            The record.

        Raises:
            ValueError: it is damaged.
        """
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("it has another hash")
        head, _, digests = data.partition(b"\n")
        values = json.loads(head)
        record = cls(digests=digests, **values)
        numbers = (record.size, record.block, record.checksums_offset)
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or not record.block:
            raise ValueError("a record of hashes has other numbers")
        if len(digests) != _DIGEST * -(-record.size // record.block):
            raise ValueError("a record of hashes has another number of blocks")
        bytes.fromhex(record.checksums)
        return record

    def is_block(self, number: int, data: bytes | memoryview) -> bool:
        """Whether these are the bytes of a block.

        Args:
            number: of the block, from 0.
            data: its bytes.

        Returns:
            True where the hash is the recorded one.
        """
        digest = self.digests[number * _DIGEST : (number + 1) * _DIGEST]
        return xxhash.xxh3_128_digest(data) == digest


def own_checksums(path: Any) -> tuple[bytes, int]:
    """The checksums that tell a file of hidden states from another.

    Args:
        path: of the file, local or not.

    Returns:
        Them, and the byte of the first; empty where the file has none.

    Raises:
        StoreError: it is damaged.
    """
    with file_format.reading(path) as file:
        listed = index.of(file, path)
        if checksums.CHECKSUMS not in listed.datasets:
            return b"", 0
        written = listed.array(file.fd, checksums.CHECKSUMS)[: checksums.IDENTITY]
        return written.tobytes(), listed.datasets[checksums.CHECKSUMS].extents[0][0]


@dataclass(frozen=True)
class Entry:
    """What the manifest has of one file: its size in bytes, its SHA-256, the SHA-256 of its record,
    and its own checksums, so that ten thousand shards are known without a request for each.
    """

    size: int
    sha256: str
    record_sha256: str
    checksums: str = ""
    checksums_offset: int = 0

    @classmethod
    def of(cls, record: Record) -> "Entry":
        """The entry of a file.

        Args:
            record: of the file.

        Returns:
            Its entry.
        """
        hashed = hashlib.sha256(record.encoded()).hexdigest()
        return cls(record.size, record.sha256, hashed, record.checksums, record.checksums_offset)


@dataclass(frozen=True)
class Manifest:
    """The files of a pushed folder by their names in it; `main` is the one that is opened."""

    main: str
    files: dict[str, Entry]

    def encoded(self) -> bytes:
        """The manifest as a file of JSON.

        Returns:
            The bytes of the file.
        """
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        return json.dumps({**_FORMAT, "main": self.main, "files": files}, indent=1).encode()

    @classmethod
    def decoded(cls, data: bytes, url: str) -> "Manifest":
        """Read what `encoded` wrote.

        Args:
            data: the file.
            url: of it, for messages.

        Returns:
            The manifest.

        Raises:
            StoreError: it is damaged, or of a newer version.
        """
        try:
            return cls._parsed(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(f"{url}: is damaged ({error}); push the file again") from None

    @classmethod
    def _parsed(cls, values: dict[str, Any]) -> "Manifest":
        if any(values[name] != value for name, value in _FORMAT.items()):
            raise ValueError("its format is another one")
        files = {name: _entry(name, entry) for name, entry in values["files"].items()}
        if values["main"] not in files:
            raise ValueError("it names no file to open")
        return cls(values["main"], files)


def _entry(name: str, values: dict[str, Any]) -> Entry:
    entry = Entry(**values)
    texts = (entry.sha256, entry.record_sha256)
    if not is_inside(name) or not all(re.fullmatch("[0-9a-f]{64}", text) for text in texts):
        raise ValueError(f"its entry of {name!r} has another form")
    bytes.fromhex(entry.checksums)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (entry.size, entry.checksums_offset)):
        raise ValueError(f"its entry of {name!r} has other numbers")
    return entry


def is_inside(name: str) -> bool:
    """Whether a name leads to a file inside of its folder, as it is spelt.

    Args:
        name: relative to the folder.

    Returns:
        False where it is absolute, or leaves the folder.

    Examples:
        >>> is_inside("shards/00000-of-00002.h5"), is_inside("../a.h5"), is_inside("/a.h5")
        (True, False, False)
    """
    plain = posixpath.normpath(name)
    return plain == name and not name.startswith(("/", "..")) and name != "."
