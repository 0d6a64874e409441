"""What goes wrong between here and a remote store: tried again where that helps, else one line.

Libraries of remote stores raise what they like. `kind_of` sorts it into four kinds by type, number
and HTTP status; what is no fault of a connection or a store stays as it is, with its traceback.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from theloom.credentials import hidden
from theloom.errors import StoreError

log = logging.getLogger(__name__)

TRIES = 6  # of each request, beyond those of the store's own library
FIRST_WAIT = 0.5  # seconds before the second; each wait is twice as long, up to the longest
LONGEST_WAIT = 20.0

TRANSIENT, MISSING, FORBIDDEN, OTHER = "transient", "missing", "forbidden", "other"

_BUSY = {errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN, errno.EPIPE, errno.ECONNRESET}
_OF_STORES = frozenset(
    [
        "botocore",
        "aiobotocore",
        "aiohttp",
        "gcsfs",
        "google",
        "azure",
        "adlfs",
        "huggingface_hub",
        "httpx",
        "httpcore",
        "requests",
        "urllib3",
        "fsspec",
        "s3fs",
    ]
)
_NO_LOGIN = frozenset(
    [
        "NoCredentialsError",
        "PartialCredentialsError",
        "TokenRetrievalError",
        "GatedRepoError",
        "LocalTokenNotFoundError",
        "DefaultCredentialsError",
    ]
)
_WIRE = frozenset(
    [
        "ConnectionError",
        "HTTPClientError",
        "ClientConnectionError",
        "ClientPayloadError",
        "TransportError",
        "TransientError",
        "ChecksumError",
        "ResponseStreamingError",
        "FSTimeoutError",
        "ConnectionClosedError",
        "ProtocolError",
        "FlexibleChecksumError",
        "IncompleteReadError",
        "ChunkedEncodingError",
        "Timeout",
        "HTTPError",
    ]
)

_T = TypeVar("_T")


def kind_of(error: BaseException) -> str | None:
    """What kind of fault an exception is.

    Args:
        error: what a file system of fsspec raised.

    Returns:
        TRANSIENT (dropped, throttled or late: it may work the next time), MISSING, FORBIDDEN or
        OTHER; None: it is no fault of a remote store.

    Examples:
        >>> kind_of(ConnectionResetError()), kind_of(PermissionError()), kind_of(KeyError("a"))
        ('transient', 'forbidden', None)
    """
    names = {base.__name__ for base in type(error).__mro__}
    ours = type(error).__module__.partition(".")[0] not in _OF_STORES
    if ours and not isinstance(error, OSError | TimeoutError):
        return None
    status = _status(error)
    if status in (401, 403) or isinstance(error, PermissionError) or names & _NO_LOGIN:
        return FORBIDDEN
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return MISSING
    if status is not None and (status in (408, 425, 429) or status >= 500):
        return TRANSIENT
    if isinstance(error, ConnectionError | TimeoutError) or names & _WIRE:
        return TRANSIENT
    if isinstance(error, OSError) and error.errno in _BUSY:
        return TRANSIENT
    return OTHER


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, if any."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None)
    for name in ("code", "status"):
        found = getattr(error, name, None) if found is None else found
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else None


def retried(url: str, what: str, request: Callable[[], _T]) -> _T:
    """Make a request, again and with longer and longer waits where the connection or the store
    fails.

    Args:
        url: what is read or written, for messages.
        what: `read` or `written`.
        request: makes the request; it may be called several times.

    Returns:
        What the request returns.

    Raises:
        FileNotFoundError: there is no such object, or no such bucket.
        StoreError: it is forbidden; or the connection or the store fails each time.
    """
    for number in range(1, TRIES + 1):
        try:
            return request()
        except Exception as error:
            kind = kind_of(error)
            if kind is None:
                raise
            if kind == MISSING:
                raise FileNotFoundError(url) from None
            if kind != TRANSIENT or number == TRIES:
                raise _final(url, what, kind, error, number) from None
            wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
            log.warning(
                "%s: %s, attempt %d of %d; again in %.1f s", url, _name(error), number, TRIES, wait
            )
        time.sleep(wait)
    raise AssertionError


def _final(url: str, what: str, kind: str, error: Exception, tries: int) -> StoreError:
    if kind == FORBIDDEN:
        return StoreError(
            f"{url}: may not be {what} ({_name(error)}); give credentials that allow it, as the "
            "store's own tools take them"
        )
    if kind == TRANSIENT:
        return StoreError(
            f"{url}: could not be {what} in {tries} attempts ({_name(error)}); check the network "
            "and the endpoint, and give the command again, which resumes"
        )
    return StoreError(f"{url}: could not be {what} ({_name(error)}); check the URL")


def _name(error: BaseException) -> str:
    """The type of an error and what it says, in a few words: of a store's own error its code."""
    cause = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if isinstance(cause, dict) and (code := cause.get("Error", {}).get("Code")):
        return str(code)
    text = hidden(" ".join(str(error).split()))[:120]
    if not text or type(error).__module__.partition(".")[0] in ("requests", "urllib3"):
        return type(error).__name__  # whose texts have the signatures of URLs
    return f"{type(error).__name__}: {text}"


def no_bucket(url: str) -> StoreError:
    """The error for a bucket or a repository that is not there.

    Args:
        url: that was to be written.

    Returns:
        The error, to be raised.
    """
    return StoreError(
        f"{url}: there is no such bucket or repository; create it, or give another URL"
    )
