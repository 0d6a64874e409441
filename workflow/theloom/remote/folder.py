"""A pushed folder, and the paths of the files in it, as the readers take paths."""

import os
import posixpath
from functools import cached_property
from typing import Any

from theloom.errors import StoreError
from theloom.remote.blocks import BlockCache, RemoteFile
from theloom.remote.manifest import MANIFEST, Manifest
from theloom.remote.places import Store, is_url, join
from theloom.store.hdf5 import byte_source

_DEEPEST = 4  # folders between a file and its manifest, at most


def find(path: Any) -> Any:
    """Find what a path or a URL leads to.

    Args:
        path: of a local file; or a URL of a pushed folder, or of a file in one.

    Returns:
        A `Path`, or a `RemotePath` of a file of hidden states.

    Raises:
        StoreError: nothing was pushed there, or it cannot be read.
    """
    if not is_url(path):
        return byte_source.as_path(path)
    store, url = Store(path), path.rstrip("/")
    folder, name = url, ""
    for _ in range(_DEEPEST):
        try:
            data = store.read(join(folder, MANIFEST))
        except FileNotFoundError:
            folder, _, last = folder.rpartition("/")
            name = posixpath.join(last, name) if name else last
            if not is_url(folder):
                break
            continue
        manifest = Manifest.decoded(data, join(folder, MANIFEST))
        found = RemotePath(RemoteFolder(folder, manifest), name or manifest.main)
        found.open_bytes()
        return found
    raise StoreError(
        f"{url}: no {MANIFEST} there or above; push the file with theloom push, or give another URL"
    )


class RemoteFolder:
    """A pushed folder: its URL, its manifest, and the blocks that were read last.

    Args:
        url: of the folder.
        manifest: which was read from it.
    """

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url, self.manifest = url, manifest
        self._files: dict[str, RemoteFile] = {}
        self._process = os.getpid()

    def __reduce__(self) -> tuple[type["RemoteFolder"], tuple[str, Manifest]]:
        return RemoteFolder, (self.url, self.manifest)

    @cached_property
    def store(self) -> Store:
        """Where it is."""
        return Store(self.url)

    @cached_property
    def cache(self) -> BlockCache:
        """Blocks of all of its files."""
        return BlockCache()

    def file(self, name: str) -> RemoteFile:
        """Open a file; nothing is read before it is requested.

        Args:
            name: in the folder.

        Returns:
            The file.

        Raises:
            StoreError: the folder has none of this name.
        """
        if self._process != os.getpid():  # a process that was forked makes connections of its own
            self._process = os.getpid()
            self._files = {}
            for kept in ("store", "cache"):
                self.__dict__.pop(kept, None)
        if name not in self.manifest.files:
            raise StoreError(
                f"{join(self.url, name)}: the folder's {MANIFEST} has no such file; "
                "push the file again, or give another URL"
            )
        if name not in self._files:
            self._files[name] = RemoteFile(
                self.store, self.cache, self.url, name, self.manifest.files[name]
            )
        return self._files[name]


class RemotePath:
    """The place of a file in a pushed folder.

    Args:
        folder: the pushed folder.
        name: of the file, or of a folder in it; empty: the pushed folder itself.
    """

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self.folder, self._name = folder, name

    def __str__(self) -> str:
        return join(self.folder.url, self._name) if self._name else self.folder.url

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.folder, posixpath.normpath(posixpath.join(self._name, name)))

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder of the file."""
        return RemotePath(self.folder, posixpath.dirname(self._name))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.folder.file(self._name).size

    def is_file(self) -> bool:
        """Whether the manifest has it.

        Returns:
            False for folders and for what is not there.
        """
        return self._name in self.folder.manifest.files

    def exists(self) -> bool:
        """Whether it is a file.

        Returns:
            As `is_file`.
        """
        return self.is_file()

    def resolve(self) -> "RemotePath":
        """Itself: there are no links.

        Returns:
            The same path.
        """
        return self

    def open_bytes(self) -> RemoteFile:
        """Open it.

        Returns:
            The file, which reads and checks blocks.

        Raises:
            StoreError: there is none.
        """
        return self.folder.file(self._name)
