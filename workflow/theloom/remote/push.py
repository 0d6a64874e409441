"""`theloom push`: a file of hidden states, or a folder, with hashes and a data card to a URL.

A file counts as pushed when its record of hashes is there, which is written after it, and its size
is right. So a push that was killed is given again, and uploads what is missing: of a large file on
S3 the parts that are missing. The manifest is written last: until then nobody opens the folder.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from theloom.errors import StoreError
from theloom.remote import card, faults, multipart
from theloom.remote.manifest import CARD, HASHES, MANIFEST, Entry, Manifest, Record, is_inside
from theloom.remote.places import Store, is_url, join, record_url
from theloom.store import file_format, index
from theloom.store.index import FileIndex

log = logging.getLogger(__name__)

PART = 64 << 20  # bytes of a part of a large file
FILES_AT_ONCE = 4

_UNFINISHED = (".partial", ".lock", ".owner", ".new", ".packing", ".tmp")


@dataclass(frozen=True)
class Pushed:
    """What a push did: files and bytes in the folder, and those of them that it uploaded."""

    url: str
    main: str
    files: int
    bytes: int
    uploaded_files: int
    uploaded_bytes: int
    manifest_sha256: str


@dataclass(frozen=True)
class Files:
    """Local files by their names in the pushed folder, and the one that is opened."""

    main: str
    paths: dict[str, Path]
    listed: FileIndex = field(repr=False)  # of the main file


def push(
    source: str | Path,
    url: str,
    licences: Sequence[str] = (),
    part_bytes: int = PART,
    done: Callable[[str, int], None] = lambda name, uploaded: None,
) -> Pushed:
    """Upload a file of hidden states with all that it refers to, or a run's folder.

    Args:
        source: `activations.h5`, a shard, or a folder with `activations.h5`.
        url: of the folder to be, such as `s3://bucket/run` or `hf://user/name`.
        licences: lines on licences for the data card.
        part_bytes: bytes of a part of a large file, 5 MiB at least on S3.
        done: called with the name of each file that is there, and the bytes that were uploaded.

    Returns:
        What was done.

    Raises:
        StoreError: a file is missing, damaged or changes while it is uploaded; or the store cannot
            be reached, has no such bucket or forbids to write.
    """
    if not is_url(url):
        raise StoreError(
            f"{url}: is no URL; give s3://bucket/folder, gs://bucket/folder or hf://user/name"
        )
    store, files, url = Store(url), gather(Path(source)), url.rstrip("/")

    def one(name: str) -> tuple[Record, int]:
        record, uploaded = push_file(store, files.paths[name], url, name, part_bytes)
        done(name, uploaded)
        return record, uploaded

    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        results = dict(zip(files.paths, pool.map(one, files.paths), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    records = {name: record for name, (record, _) in results.items()}
    manifest = Manifest(files.main, {name: Entry.of(record) for name, record in records.items()})
    if CARD not in files.paths:
        text = card.data_card(files.listed, url, files.main, manifest, licences)
        _write(store, join(url, CARD), text.encode())
    encoded = manifest.encoded()
    _write(store, join(url, MANIFEST), encoded)
    uploaded = [count for _, count in results.values() if count]
    return Pushed(
        url,
        files.main,
        len(records),
        sum(record.size for record in records.values()),
        len(uploaded),
        sum(uploaded),
        card.sha256(encoded),
    )


def gather(source: Path) -> Files:
    """List the files that belong to what is pushed.

    Args:
        source: a file of hidden states, or a folder.

    Returns:
        The files. Of a virtual dataset its shards belong to it.

    Raises:
        StoreError: a file is missing, damaged or outside of the folder.
    """
    if not source.is_dir():
        listed, names = _referred(source)
        paths = {source.name: source} | {name: source.parent / name for name in names}
        for name, path in paths.items():
            if not is_inside(name):
                raise StoreError(
                    f"{source}: refers to {name}, which is outside of its folder; copy it there, "
                    "or merge with store.merge=physical"
                )
            if not path.is_file():
                raise StoreError(f"{source}: refers to {path}, which is missing; put it back")
        return Files(source.name, paths, listed)
    main = source / "activations.h5"
    if not main.is_file():
        raise StoreError(f"{source}: has no activations.h5; give the folder of a finished run")
    top, paths = source.resolve(), {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        own = name == MANIFEST or name.startswith(f"{HASHES}/")
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if own or hidden or name.endswith(_UNFINISHED) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(top):
            raise StoreError(
                f"{path}: is a link to {path.resolve()}, outside of the folder; remove the link, "
                "or push the file by itself"
            )
        paths[name] = path
    listed, names = _referred(main)
    if missing := [name for name in names if name not in paths]:
        raise StoreError(f"{main}: refers to {missing[0]}, which is not in {source}; put it there")
    return Files(main.name, paths, listed)


def _referred(path: Path) -> tuple[FileIndex, list[str]]:
    """The index of a file of hidden states, and the names of the shards that it refers to."""
    with file_format.reading(path) as file:
        listed = index.of(file, path)
        file_format.check_format(path, "activations", listed.attributes)
        if "sources/file" not in listed.datasets:
            return listed, []
        return listed, [name.decode() for name in listed.array(file.fd, "sources/file").tolist()]


def push_file(
    store: Store, path: Path, url: str, name: str, part_bytes: int = PART
) -> tuple[Record, int]:
    """Upload a file unless it is there, and its record after it.

    Args:
        store: where to.
        path: the local file.
        url: of the folder.
        name: of the file in it.
        part_bytes: bytes of a part of a large file.

    Returns:
        Its record, and the bytes that were uploaded: 0 where it was there.

    Raises:
        StoreError: it changes meanwhile, or cannot be written.
    """
    before, record = _state(path), Record.of(path)
    encoded, target, hashes = record.encoded(), join(url, name), record_url(url, name)
    try:
        written = store.read(hashes)
    except FileNotFoundError:
        written = None
    if written == encoded and store.size(target) == record.size:
        return record, 0
    if written:  # of other bytes: from now on this object has no record that could fit by chance
        _write(store, hashes, b"")
    uploaded = _upload(store, path, target, record.size, part_bytes)
    if _state(path) != before:
        raise StoreError(
            f"{path}: changed while it was uploaded; push it again when it is complete"
        )
    if (size := store.size(target)) != record.size:
        raise StoreError(f"{target}: has {size} of {record.size} bytes; push it again")
    _write(store, hashes, encoded)
    return record, uploaded


def _upload(store: Store, path: Path, url: str, size: int, part_bytes: int) -> int:
    """Write an object; returns the bytes that were sent."""
    if size <= part_bytes:
        _write(store, url, path.read_bytes())
        return size
    if multipart.supported(store):
        return multipart.upload(store, path, url, size, part_bytes)
    target = store.path(url)
    _requested(url, lambda: _put(store, path, target))
    return size


def _put(store: Store, path: Path, target: str) -> None:
    store.make_folder(target)
    store.filesystem.put_file(str(path), target)


def _write(store: Store, url: str, data: bytes) -> None:
    target = store.path(url)

    def write() -> None:
        store.make_folder(target)
        store.filesystem.pipe_file(target, data)

    _requested(url, write)


def _requested(url: str, request: Callable[[], None]) -> None:
    try:
        faults.retried(url, "written", request)
    except FileNotFoundError:
        raise faults.no_bucket(url) from None


def _state(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)  # noqa: PTH116
    return found.st_size, found.st_mtime_ns, found.st_ino
