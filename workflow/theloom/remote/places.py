"""URLs of remote stores, and the requests to them.

Any file system of fsspec will do: `s3://`, `gs://`, `az://`, `hf://`, `file://`. Credentials are
those that the store's own tools find: the environment or their own files, never the URL.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from theloom.credentials import has_credential
from theloom.errors import StoreError
from theloom.remote import faults
from theloom.remote.manifest import HASHES
from theloom.remote.signed import SignedRanges

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of pip, by protocol


def is_url(path: object) -> bool:
    """Whether a path is the URL of a remote store.

    Args:
        path: a path as a user gives it.

    Returns:
        True for a string such as `s3://bucket/run`.

    Examples:
        >>> is_url("s3://bucket/run"), is_url("results/run")
        (True, False)
    """
    return isinstance(path, str) and bool(_URL.match(path))


def path_or_url(text: str) -> str | Path:
    """A path of the command line.

    Args:
        text: as it was typed.

    Returns:
        The text itself where it is a URL, else a `Path`.
    """
    return text if is_url(text) else Path(text)


def join(url: str, name: str) -> str:
    """The URL of a file in a folder.

    Args:
        url: of the folder.
        name: of the file in it.

    Returns:
        Its URL.

    Examples:
        >>> join("s3://bucket/run/", "a.h5")
        's3://bucket/run/a.h5'
    """
    return f"{url.rstrip('/')}/{name}"


class Store:
    """The file system of a URL, for requests that are made again where the connection fails.

    Args:
        url: any URL in it.

    Raises:
        StoreError: no such file system is known or installed, or the URL holds a password.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = 0
        self._opened: Any = None
        self._signed: SignedRanges | None = None
        if has_credential(url):
            raise StoreError(
                f"{url}: holds a password or a token; give it as the store's own tools take it, "
                "such as in the environment"
            )
        self.path(url)  # raises here what is wrong with the URL

    @property
    def filesystem(self) -> Any:
        """The file system of fsspec. Threads may share it, processes not: one that was forked has
        connections of its own.
        """
        if self._process != os.getpid():
            self._opened = self._filesystem()
            self._signed = SignedRanges(self._opened) if "s3" in self._opened.protocol else None
            self._process = os.getpid()
        return self._opened

    def _filesystem(self) -> Any:
        import fsspec

        protocol = self._url.partition("://")[0].lower()
        try:
            return fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            what = _EXTRAS.get(protocol)
            advice = f"pip install 'theloom[{what}]'" if what else str(error)
            raise StoreError(
                f"{self._url}: the file system of {protocol}:// is not installed; {advice}"
            ) from None
        except ValueError:
            raise StoreError(
                f"{self._url}: no file system has URLs of {protocol}://; give s3://, gs://, az://, "
                "hf:// or another one of fsspec"
            ) from None

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self._url,)

    def path(self, url: str) -> str:
        """A URL as the file system spells it; `hf://user/name` is a dataset of the hub.

        Args:
            url: the URL.

        Returns:
            The path.
        """
        protocol, _, rest = url.partition("://")
        kinds = ("datasets/", "models/", "spaces/", "buckets/")
        if protocol.lower() == "hf" and not rest.startswith(kinds):
            url = f"hf://datasets/{rest}"
        return self.filesystem._strip_protocol(url)

    def read(self, url: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read an object, or a range of its bytes.

        Args:
            url: of the object.
            start: the first byte; None: from the beginning.
            stop: the byte after the last; None: to the end.

        Returns:
            The bytes.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be read.
        """
        path = self.path(url)
        return faults.retried(
            url, "read", lambda: self.filesystem.cat_file(path, start=start, end=stop)
        )

    def chunks(self, url: str, start: int, stop: int, step: int) -> Iterator[bytes | memoryview]:
        """Read a range piece by piece, each as soon as it is there.

        Args:
            url: of the object.
            start: the first byte.
            stop: the byte after the last.
            step: bytes of a piece; the last one may be shorter.

        Yields:
            The pieces.

        Raises:
            Exception: what the file system raises; nothing is requested again.
        """
        path = self.path(url)
        if self._signed is not None:
            answer = self._signed.get(path, start, stop)
            if answer is not None:
                with answer:
                    for at in range(start, stop, step):
                        yield _whole(answer.raw.read(min(step, stop - at)), min(step, stop - at))
                return
        data = memoryview(self.filesystem.cat_file(path, start=start, end=stop))
        for at in range(0, stop - start, step):
            yield _whole(data[at : at + step], min(step, stop - start - at))

    def size(self, url: str) -> int | None:
        """The size of an object.

        Args:
            url: of the object.

        Returns:
            Bytes; None: there is none.

        Raises:
            StoreError: it cannot be read.
        """
        path = self.path(url)
        try:
            found = faults.retried(url, "read", lambda: self.filesystem.info(path))
        except FileNotFoundError:
            return None
        return None if found.get("type") == "directory" else int(found["size"])

    def make_folder(self, path: str) -> None:
        """Create the folders of a file where the store has some; object stores have none.

        Args:
            path: of the file, as `path` gives it.
        """
        if "file" in self.filesystem.protocol or "local" in self.filesystem.protocol:
            self.filesystem.makedirs(self.filesystem._parent(path), exist_ok=True)


def _whole(data: bytes | memoryview, size: int) -> bytes | memoryview:
    if len(data) != size:
        raise ConnectionError("the answer ended early")
    return data


def record_url(folder: str, name: str) -> str:
    """Where the record of a file is.

    Args:
        folder: URL of the pushed folder.
        name: of the file in it.

    Returns:
        The URL of its hashes.

    Examples:
        >>> record_url("s3://bucket/run", "a.h5")
        's3://bucket/run/hashes/a.h5'
    """
    return join(folder, f"{HASHES}/{name}")
