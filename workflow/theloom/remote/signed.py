"""Ranges of S3 by plain GETs of signed URLs, at the speed of the network.

The client of s3fs runs in one thread of Python, which hands on each answer in small pieces: on a
fast network it takes most of the time. A URL that s3fs signs is read by requests in any thread.
Where such a URL is not accepted, s3fs reads as always.
"""

import errno
import logging
import time
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

_VALID = 900  # seconds of a signature; it is renewed after half of them
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer
_CONNECTIONS = 16


class SignedRanges:
    """GETs of ranges of objects.

    Args:
        filesystem: an `s3fs.S3FileSystem`.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self._urls: dict[str, tuple[str, float]] = {}
        self._accepted = True
        self._lock = Lock()

    @cached_property
    def _session(self) -> "requests.Session":
        import requests
        from requests.adapters import HTTPAdapter

        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
        return session

    def get(self, path: str, start: int, stop: int) -> "requests.Response | None":
        """Request a range.

        Args:
            path: of the object, as s3fs spells it.
            start: the first byte.
            stop: the byte after the last.

        Returns:
            The answer, whose `raw` is read; None: s3fs is to read the range, or to say why not.

        Raises:
            OSError: the connection fails, or the server is busy.
        """
        if not self._accepted:
            return None
        import requests

        try:
            answer = self._session.get(
                self._url(path),
                headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
                stream=True,
                timeout=_TIMEOUT,
            )
        except (requests.exceptions.SSLError, requests.exceptions.ProxyError) as error:
            log.warning("signed URLs cannot be read here (%s); s3fs reads", type(error).__name__)
            self._accepted = False
            return None
        begin = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/")
        if answer.status_code == 206 and begin:
            return answer
        answer.close()
        if answer.status_code == 429 or answer.status_code >= 500:
            raise OSError(errno.EBUSY, f"HTTP status {answer.status_code}")
        with self._lock:
            self._urls.pop(path, None)
        return None

    def _url(self, path: str) -> str:
        with self._lock:
            url, until = self._urls.get(path, ("", 0.0))
            if time.monotonic() > until:
                url = self._filesystem.sign(path, expiration=_VALID)
                self._urls[path] = url, time.monotonic() + _VALID / 2
            return url
