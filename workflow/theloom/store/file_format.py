"""What the HDF5 files have in common: attributes, and raw contiguous datasets.

Hidden states are stored in contiguous datasets, so that a program can map them. FP32 and FP16 are
HDF5's IEEE types; BF16 is an HDF5 float of two bytes (8 exponent bits, 7 of mantissa), which HDF5
tools read as numbers; codes of rows with a scale are integers of one byte (`store.encoding`).
"""

import errno
import json
import os
import resource
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from theloom.errors import MemoryPlanError, StoreError
from theloom.store.hdf5 import byte_source
from theloom.store.hdf5.byte_source import ByteSource, SourcePath
from theloom.store.hdf5.objects import CutShortError, ForeignError, Objects

FORMAT_VERSION = 1

# what h5py, and code that uses values of a file, may raise where the file is damaged
DAMAGE = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SystemError,
    MemoryError,
    struct.error,
)


def are_offsets(values: np.ndarray, count: int, end: int) -> bool:
    """Whether an array has the offsets of `count` parts, one after the other, from 0 to `end`.

    Args:
        values: an array of integers.
        count: of the parts.
        end: where the last part ends.

    Returns:
        True for (count + 1,) that ascend; parts may be empty.

    Examples:
        >>> are_offsets(np.array([0, 2, 2, 5]), 3, 5), are_offsets(np.array([0, 3, 2]), 2, 2)
        (True, False)
    """
    if values.shape != (count + 1,) or values[0] != 0 or values[-1] != end:
        return False
    return not (values[1:] < values[:-1]).any()


def create_contiguous(
    group: h5py.Group, name: str, shape: tuple[int, ...], type_id: h5py.h5t.TypeID
) -> h5py.Dataset:
    """Create a contiguous dataset whose offset is fixed at once and whose bytes are not written.

    Args:
        group: the file, or a group of it.
        name: of the dataset; groups in it are created.
        shape: of the dataset.
        type_id: its HDF5 type, from `hdf5_type`.

    Returns:
        The dataset.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # with a time in the metadata, two equal runs would have different files
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return h5py.Dataset(
        h5py.h5d.create(group.id, name.encode(), type_id, space, dcpl=properties, lcpl=links)
    )


def hook_path(hook: str) -> str:
    """The name of the dataset of a hook point's rows.

    Args:
        hook: the name of the hook point.

    Returns:
        The path in the file.

    Examples:
        >>> hook_path("blocks.0.hook_resid_post")
        'hooks/blocks.0.hook_resid_post/activations'
    """
    return f"hooks/{hook}/activations"


def scale_path(hook: str) -> str:
    """The name of the dataset of the scales of a hook point's rows, where they have scales.

    Args:
        hook: the name of the hook point.

    Returns:
        The path in the file.

    Examples:
        >>> scale_path("hook_embed")
        'hooks/hook_embed/activations_scale'
    """
    return f"{hook_path(hook)}_scale"


def byte_offset(dataset: h5py.Dataset) -> int:
    """Find where the bytes of a contiguous dataset begin in its file.

    Args:
        dataset: of an open file.

    Returns:
        Bytes; 0 for an empty dataset.
    """
    return dataset.id.get_offset() or 0


def fixed_strings(values: list[str]) -> np.ndarray:
    """Encode strings to a fixed length, which HDF5 stores in the dataset itself, not in its heap.

    Args:
        values: any strings.

    Returns:
        (strings,) of UTF-8 bytes, as long as the longest.

    Examples:
        >>> fixed_strings(["a", "bcd"]).dtype
        dtype('S3')
    """
    encoded = [v.encode() for v in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def set_attributes(group: h5py.Group, attributes: Mapping[str, Any]) -> None:
    """Write attributes; values that HDF5 has no type for (dicts, lists, None) become JSON.

    Args:
        group: the file, or a group of it.
        attributes: values by name.
    """
    for name, value in attributes.items():
        if isinstance(value, list | dict | tuple) or value is None:
            value = json.dumps(value)
        group.attrs[name] = value


def pwrite(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset of a file; `os.pwrite` may write fewer.

    Args:
        fd: of the file, open for writing.
        data: the bytes.
        offset: where they go.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def is_full(error: Exception) -> bool:
    """Whether an error means that a disk or a quota is full.

    HDF5 reports that in the text alone, in errors of any type.

    Args:
        error: of the operating system or of HDF5.

    Returns:
        True where the disk or the quota is full.

    Examples:
        >>> is_full(OSError(errno.ENOSPC, "No space left on device")), is_full(ValueError("shape"))
        (True, False)
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(
        os.strerror(number) in str(error) for number in full
    )


def no_room_error(folder: Path, what: str, needed: int) -> MemoryPlanError:
    """The error for a full disk.

    Args:
        folder: where the file was to be written.
        what: the file, as the message names it.
        needed: its size in bytes.

    Returns:
        The error, to be raised.
    """
    free = shutil.disk_usage(folder).free
    return MemoryPlanError(
        f"{folder}: no room for {what} of {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
        "free disk space and run again, which resumes from what is written, or request fewer hook "
        "points, fewer tokens or a smaller store.dtype"
    )


def too_many_files(path: Path) -> StoreError:
    """The error for a process that may open no more files, where HDF5 would read zeros.

    Args:
        path: the file that could not be opened.

    Returns:
        The error, to be raised.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return StoreError(
        f"{path}: cannot be opened, this process may have {limit} files open at once; "
        "raise the limit (ulimit -n), or set store.merge=physical"
    )


def damaged_error(path: str | Path, error: Exception) -> StoreError:
    """The error for a file that cannot be read.

    Args:
        path: the file.
        error: what reading it raised.

    Returns:
        The error, to be raised.

    Examples:
        >>> print(damaged_error("a.h5", KeyError("metrics")))
        a.h5: is damaged (it lacks 'metrics'); run the pipeline again, or fetch the file again
    """
    what = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, KeyError):
        what = f"it lacks {what}"
    return StoreError(
        f"{path}: is damaged ({what}); run the pipeline again, or fetch the file again"
    )


def sync(path: Path) -> None:
    """fsync a file or a folder.

    Args:
        path: the file or folder; it is on the disk when this returns.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def open_h5(path: str | Path, kind: str) -> Iterator[h5py.File]:
    """Open one of a run's own files for reading, and check its format.

    Args:
        path: the file.
        kind: `tokens`, `estimate`, `model` or `verification`; hidden states are read by `reading`.

    Yields:
        The file, open for reading.

    Raises:
        StoreError: the file is missing, unreadable, of another kind or of another version; or what
            is read of it, within the context, is damaged.
    """
    with reading(path) as objects:
        for _ in objects.datasets():
            pass  # HDF5's library hangs at a group that refers to itself
        with h5py.File(path, "r") as file:
            check_format(Path(path), kind, file.attrs)
            yield file


@contextmanager
def reading(path: Any) -> Iterator[Objects]:
    """Open an HDF5 file by its bytes alone.

    Args:
        path: the file: of a local one a `str` or a `Path`, else a `byte_source.SourcePath`.

    Yields:
        Its objects, and what all of it is read with (`fd`).

    Raises:
        StoreError: the file is missing or not HDF5, or the process may open no more files; or what
            is read of it, within the context, is damaged.
    """
    path = byte_source.as_path(path)
    with open_bytes(path) as file:
        try:
            yield Objects(byte_source.of(file))
        except ForeignError as error:
            raise StoreError(
                f"{path}: cannot be read as HDF5 ({error}); give activations.h5 or a shard of a run"
            ) from None
        except CutShortError as error:
            raise StoreError(
                f"{path}: cut short, {error}; copy it again, or run the pipeline"
            ) from None
        except DAMAGE as error:
            if getattr(error, "filename", None) not in (None, str(path)):
                raise  # of a file that is written from this one
            raise damaged_error(path, error) from None


def open_bytes(path: Path | SourcePath) -> BinaryIO | ByteSource:
    """Open a file for reading.

    Args:
        path: the file.

    Returns:
        The file, unbuffered; the caller closes it.

    Raises:
        StoreError: it is missing, a folder or not a file that can be read, or the process may open
            no more files.
    """
    if not isinstance(path, Path):
        return path.open_bytes()
    try:
        # non-blocking: opening a pipe would wait for its writer
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise too_many_files(path) from None
        if isinstance(error, FileNotFoundError):
            raise StoreError(
                f"no file {path}; run the pipeline first, or give another path"
            ) from None
        raise StoreError(f"{path}: cannot be opened ({error.strerror})") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb", 0)
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise StoreError(
            f"{path} is a folder; give a file in it, for example {path / 'activations.h5'}"
        )
    raise StoreError(f"{path}: is not a file; give activations.h5 or a shard of a run")


def _format(name: Any, version: Any) -> str:
    return "a file of another program" if name is None else f"{name} version {version}"


def check_format(path: Path, kind: str, attributes: Mapping[str, Any]) -> None:
    """Check that the attributes of a file name this kind and this version of the format.

    Args:
        path: the file, for the message.
        kind: as of `open_h5`.
        attributes: of its root.

    Raises:
        StoreError: they name another kind or version.
    """
    name, version = attributes.get("format"), attributes.get("format_version")
    if name != f"theloom.{kind}" or version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: not a file of theloom.{kind} version {FORMAT_VERSION}, "
            f"found {_format(name, version)}; "
            + (
                "give activations.h5 or a shard of a run"
                if kind == "activations"
                else "run the pipeline again"
            )
        )


# Where a shard's time went, and its memory, as `metrics` of its file lists them (file-format.md has
# their meanings). The writer sets seconds_disk, its caller the others. peak_memory and
# predicted_memory are bytes; a merge takes the largest of these two and of oom_level, else the sum.
METRICS = (
    "seconds_total",
    "seconds_forward",
    "seconds_copy",
    "seconds_disk",
    "seconds_waiting_for_disk",
    "seconds_idle",
    "seconds_waiting_for_weights",
    "bytes_of_weights",
    "tokens",
    "tokens_forwarded",
    "peak_memory",
    "predicted_memory",
    "oom_level",
)
