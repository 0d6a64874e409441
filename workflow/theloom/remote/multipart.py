"""Uploads to S3 in parts, which a push that was killed goes on with: parts that are there stay.

S3 keeps the parts of an upload until it is completed, and names each by the MD5 of its bytes. A
part whose MD5 is that of the local bytes is not sent again. Where a bucket encrypts with a key of
its own the names are no MD5, and all parts are sent.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from theloom.errors import StoreError
from theloom.remote import faults
from theloom.remote.places import Store

_MOST_PARTS = 10_000  # of S3
_AT_ONCE = 4  # parts, each in memory


def supported(store: Store) -> bool:
    """Whether a store has uploads in parts that another process can go on with.

    Args:
        store: the store.

    Returns:
        True for S3.
    """
    return "s3" in store.filesystem.protocol and hasattr(store.filesystem, "call_s3")


def upload(store: Store, path: Path, url: str, size: int, part_bytes: int) -> int:
    """Upload a file in parts, or what is missing of it.

    Args:
        store: an S3.
        path: the local file.
        url: of the object.
        size: bytes of the file.
        part_bytes: of a part.

    Returns:
        The bytes that were sent.

    Raises:
        FileNotFoundError: there is no such bucket.
        StoreError: it cannot be written, or arrives changed.
    """
    step = max(part_bytes, -(-size // _MOST_PARTS))
    s3 = _Object(store, url)
    number, there = s3.begun()

    def part(at: int) -> tuple[dict[str, Any], int]:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), min(step, size - at * step), at * step)
        digest, known = hashlib.md5(data, usedforsecurity=False).hexdigest(), there.get(at + 1)
        if known == (len(data), digest):
            return {"PartNumber": at + 1, "ETag": f'"{digest}"'}, 0
        answer = s3.call("upload_part", UploadId=number, PartNumber=at + 1, Body=data)
        etag = str(answer["ETag"]).strip('"')
        if _is_md5(answer) and etag != digest:
            raise StoreError(f"{url}: part {at + 1} arrived changed; push the file again")
        return {"PartNumber": at + 1, "ETag": answer["ETag"]}, len(data)

    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        done = list(pool.map(part, range(-(-size // step))))
    finally:
        pool.shutdown(cancel_futures=True)
    s3.call(
        "complete_multipart_upload",
        UploadId=number,
        MultipartUpload={"Parts": [one for one, _ in done]},
    )
    return sum(sent for _, sent in done)


def _is_md5(answer: dict[str, Any]) -> bool:
    return "aws:kms" not in str(answer.get("ServerSideEncryption", "")) and not any(
        name.startswith("SSECustomer") for name in answer
    )


class _Object:
    """An object of S3, by the requests that fsspec has no names for."""

    def __init__(self, store: Store, url: str) -> None:
        self._s3, self._url = store.filesystem, url
        self._bucket, self._key, _ = store.filesystem.split_path(store.path(url))

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Make a request about the object, again where the connection fails."""
        try:
            return self._call(method, Bucket=self._bucket, Key=self._key, **arguments)
        except FileNotFoundError:
            raise StoreError(
                f"{self._url}: there is no such bucket, or another program ended this upload; "
                "create the bucket, or push the file again"
            ) from None

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return faults.retried(self._url, "written", lambda: self._s3.call_s3(method, **arguments))

    def begun(self) -> tuple[str, dict[int, tuple[int, str]]]:
        """The upload of this object that was begun last, or a new one: its id, and size and MD5 of
        each part by number.
        """
        uploads = [
            upload
            for answer in self._pages("list_multipart_uploads", "uploads")
            for upload in answer.get("Uploads", [])
            if upload["Key"] == self._key
        ]
        if not uploads:
            return self.call("create_multipart_upload")["UploadId"], {}
        last = max(uploads, key=lambda upload: upload["Initiated"])["UploadId"]
        parts = {
            part["PartNumber"]: (part["Size"], part["ETag"].strip('"'))
            for answer in self._pages("list_parts", "parts", Key=self._key, UploadId=last)
            for part in answer.get("Parts", [])
        }
        return last, parts

    def _pages(self, method: str, kind: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """The answers to a request whose answer comes in pages."""
        after: dict[str, Any] = {"Prefix": self._key} if kind == "uploads" else {}
        while True:
            try:
                answer = self._call(method, Bucket=self._bucket, **arguments, **after)
            except FileNotFoundError:
                raise faults.no_bucket(self._url) from None
            yield answer
            if not answer.get("IsTruncated"):
                return
            if kind == "parts":
                after["PartNumberMarker"] = answer["NextPartNumberMarker"]
            else:
                after["KeyMarker"] = answer["NextKeyMarker"]
                after["UploadIdMarker"] = answer["NextUploadIdMarker"]
