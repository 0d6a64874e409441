"""What the HDF5 files have in common: element types, attributes, and raw contiguous datasets.

Hidden states lie in contiguous datasets, so that a program can map them; FP32 and FP16 are HDF5's
IEEE types, BF16 is a native HDF5 float of two bytes (8 exponent bits, 7 of mantissa), which HDF5
tools read as numbers.
"""

import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from theloom.errors import MemoryPlanError, StoreError

if TYPE_CHECKING:
    import torch


FORMAT_VERSION = 1


# what h5py, and reading what it gives, may raise where a file's metadata is damaged
DAMAGE = (
    OSError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
)


def bfloat16() -> h5py.h5t.TypeID:
    """The HDF5 type of bfloat16, little endian."""
    t = h5py.h5t.IEEE_F32LE.copy()
    t.set_fields(15, 7, 8, 0, 7)
    t.set_size(2)
    t.set_ebias(127)
    return t


def hdf5_type(precision: str) -> h5py.h5t.TypeID:
    """The HDF5 type of fp32, fp16 or bf16."""
    if precision == "bf16":
        return bfloat16()
    return {"fp32": h5py.h5t.IEEE_F32LE, "fp16": h5py.h5t.IEEE_F16LE}[precision]


def precision_of(dataset: h5py.Dataset) -> str:
    """fp32, fp16 or bf16: the inverse of `hdf5_type`. Raises StoreError for any other type."""
    t = dataset.id.get_type()
    for precision in ("fp32", "fp16", "bf16"):
        if t.equal(hdf5_type(precision)):
            return precision
    raise StoreError(f"{dataset.file.filename}: {dataset.name} is neither fp32, fp16 nor bf16")


def bits(tensor: "torch.Tensor") -> np.ndarray:
    """The bytes of a CPU tensor as an array of unsigned integers of its item size, without a copy
    if contiguous.
    """
    import torch

    integer = {2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
    return tensor.contiguous().view(integer).numpy()


def raw_bytes(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a CPU tensor, row by row, without a copy if it is contiguous."""
    return bits(tensor).data.cast("B")


def tensor_from_bits(array: np.ndarray, precision: str) -> "torch.Tensor":
    """The inverse of `bits`: a tensor over the same memory."""
    import torch

    from theloom.precision import torch_dtype

    return torch.from_numpy(array).view(torch_dtype(precision))


def bits_dtype(precision: str) -> np.dtype:
    """The unsigned integer that holds one element."""
    return np.dtype({"fp32": "<u4", "fp16": "<u2", "bf16": "<u2"}[precision])


def create_contiguous(
    group: h5py.Group, name: str, shape: tuple[int, ...], type_id: h5py.h5t.TypeID
) -> h5py.Dataset:
    """A contiguous dataset whose offset in the file is fixed at once and whose bytes are not
    written.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(
        False
    )  # a time in the metadata would make two runs' files differ
    space = h5py.h5s.create_simple(shape)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return h5py.Dataset(
        h5py.h5d.create(group.id, name.encode(), type_id, space, dcpl=properties, lcpl=links)
    )


def hook_path(hook: str) -> str:
    """Where a hook point's rows lie in a file."""
    return f"hooks/{hook}/activations"


def byte_offset(dataset: h5py.Dataset) -> int:
    """Where a contiguous dataset's bytes begin in its file; 0 for an empty one, which has none."""
    return dataset.id.get_offset() or 0


def fixed_strings(values: list[str]) -> np.ndarray:
    """UTF-8 strings of fixed length: they lie in the dataset itself, not in HDF5's global heap."""
    encoded = [v.encode() for v in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def set_attributes(group: h5py.Group, attributes: Mapping[str, Any]) -> None:
    """Write attributes; what HDF5 has no type for (dicts, lists, None) as JSON text."""
    for name, value in attributes.items():
        if isinstance(value, list | dict | tuple) or value is None:
            value = json.dumps(value)
        group.attrs[name] = value


def pwrite(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at a offset of a file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk or a quota is full; HDF5 says so in its text alone, in
    errors of any type.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(
        os.strerror(number) in str(error) for number in full
    )


def no_room(folder: Path, what: str, needed: int) -> MemoryPlanError:
    """The error for a full disk: what was to be written, the bytes that it needs and those that
    there are.
    """
    free = shutil.disk_usage(folder).free
    return MemoryPlanError(
        f"{folder}: no room for {what} of {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; free disk space and run "
        "again, which goes on from what is written, or ask for fewer hook points, fewer tokens or a smaller store.dtype"
    )


def too_many_files(path: Path) -> StoreError:
    """The error for a process that may open no more files: HDF5 itself would read zeros."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return StoreError(
        f"{path}: cannot be opened, this process may have {limit} files open at once; raise the limit (ulimit -n), or "
        "set store.merge=physical"
    )


def damaged(path: str | Path, error: Exception) -> StoreError:
    """The error for a file of which HDF5 cannot make sense."""
    return StoreError(
        f"{path}: is damaged ({' '.join(str(error).split())}); run the pipeline again, or fetch the file again"
    )


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_h5(path: str | Path, kind: str) -> h5py.File:
    """Open one of the run's files for reading, and check that it is of that kind and of a format
    that we know.
    """
    file = open_any(Path(path))
    try:
        check_format(Path(path), kind, file.attrs)
    except StoreError:
        file.close()
        raise
    return file


def open_any(path: Path) -> h5py.File:
    """Open a file for reading. Raises StoreError where it is not there, not HDF5, or one open file
    too many.
    """
    if path.is_dir():
        raise StoreError(
            f"{path} is a folder; give a file in it, for example {path / 'activations.h5'}"
        )
    if not path.is_file():
        raise StoreError(f"no file {path}; run the pipeline first, or give another path")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
            raise too_many_files(path) from None
        raise StoreError(f"{path}: {_why_unreadable(str(error))}") from None


def _why_unreadable(said: str) -> str:
    """What HDF5 said of a file that it does not open, and what to do."""
    if match := re.search(r"truncated file: eof = (\d+), .*stored_eof = (\d+)", said):
        return f"cut short, {int(match[1]):,} of {int(match[2]):,} bytes are there; copy it again, or run the pipeline"
    if "file signature not found" in said:
        return "cannot be read as HDF5 (it is none); give activations.h5 or a shard of a run"
    return f"cannot be read as HDF5 ({' '.join(said.split())}); copy it again, or run the pipeline"


def _format(found: Any, version: Any) -> str:
    return "a file of another program" if found is None else f"{found} version {version}"


def check_format(path: Path, kind: str, attributes: Mapping[str, Any]) -> None:
    """That a file's attributes name this kind and this version of the format. Raises StoreError."""
    found, version = attributes.get("format"), attributes.get("format_version")
    if found != f"theloom.{kind}" or version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: not a file of theloom.{kind} version {FORMAT_VERSION}, found {_format(found, version)}; "
            + (
                "give activations.h5 or a shard of a run"
                if kind == "activations"
                else "run the pipeline again"
            )
        )


# where a shard's time went; seconds_disk is the writer's own, the others are its caller's; block by
# block the weights are read and waited for. peak_memory and predicted_memory are bytes, oom_level
# says how often batch and chunk were halved: of these three the largest counts
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
