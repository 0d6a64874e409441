"""The writer of one shard: a file that a killed job cannot spoil.

All HDF5 metadata is written and synced before the first row. From then on only bytes are written, at places that are
known beforehand: rows of hidden states, their hashes, and a log of what is committed. A commit is data, fdatasync, log
record, fdatasync; so whatever the log says is on disk, and a job that dies loses no more than what came after its last
record. The unfinished file is `<shard>.partial`, which the same job takes up again; the finished one is renamed.
"""

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import xxhash

from theloom import layout
from theloom.errors import MemoryPlanError
from theloom.hooks import HookPoint
from theloom.tokens import ShardTokens

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

COMMIT_BYTES = 32 << 20
# what one record of /commit_log holds; `check` is the hash of the other two, so that a torn record is seen
RECORD = np.dtype([("batches", "<u8"), ("rows", "<u8"), ("check", "<u8")])


@dataclass(frozen=True)
class ShardSpec:
    """What a shard will hold: its tokens, its hook points, the precision on disk, the attributes of the file.

    `keys`: the tokens of the longest window of all shards, the last axis of attention's rows. `identity` says which
    config, tokens and model made it: a `.partial` file of another identity is not taken up.
    """

    tokens: ShardTokens
    points: list[HookPoint]
    keys: int
    precision: str
    batches: int  # units of work that are committed: batches, or (block, batch) block by block
    identity: str
    attributes: Mapping[str, Any]
    figures: tuple[str, ...] = ()  # names of numbers that are noted in /figures when the work is done

    @property
    def rows(self) -> int:
        return len(self.tokens.input_ids)

    @property
    def windows(self) -> int:
        return len(self.tokens.window_document)


class ShardWriter:
    """Writes rows window by window, in any order, and commits batch by batch, in a fixed order.

    `batches_done` says how many batches an earlier job has committed: the caller goes on behind them. Use it as a
    context manager; `finish` renames the file, and leaving without it keeps the `.partial` for the next job.
    """

    def __init__(self, path: Path, spec: ShardSpec) -> None:
        self.path = path
        self.partial = partial_of(path)
        self._spec = spec
        self._hook_number = {p.name: n for n, p in enumerate(spec.points)}
        self._points = {p.name: p for p in spec.points}
        self._row_bytes = {p.name: p.width(spec.keys) * layout.bits_dtype(spec.precision).itemsize for p in spec.points}
        self._hashes: dict[tuple[int, str], tuple[xxhash.xxh3_64, int]] = {}
        self._uncommitted = 0
        self._fd = -1
        self.batches_done = 0

    def __enter__(self) -> "ShardWriter":
        done = self._take_up()
        if done is None:
            self._create()
        self.batches_done = done or 0
        with h5py.File(self.partial, "r") as file:
            self._places = _places(file, self._spec.points)
        self._fd = os.open(self.partial, os.O_RDWR)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, window: int, hook: str, start: int, rows: "torch.Tensor") -> None:
        """Rows of one hook point for the positions from `start` of a window: (positions, …), in stored dtype.

        Rows over keys may have less of them than the file: the others are filled as those of masked ones.

        The chunks of a window come in order; its hash is written with the last one.
        """
        first = int(self._spec.tokens.window_offset[window])
        length = int(self._spec.tokens.window_offset[window + 1]) - first
        point = self._points[hook]
        if point.over_keys:
            rows = _with_all_keys(rows, self._spec.keys, point.fill)
        data = layout.raw_bytes(rows)
        state, seen = self._hashes.pop((window, hook), (xxhash.xxh3_64(), 0))
        if start != seen or start + len(rows) > length:
            raise ValueError(f"window {window}: rows {start} to {start + len(rows)} after {seen} of {length}")
        state.update(data)
        try:
            _pwrite(self._fd, data, self._places[hook] + (first + start) * self._row_bytes[hook])
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a file system that does not keep what it allocated
                raise _no_room(self.path, self._spec.rows * sum(self._row_bytes.values()), error) from None
            raise
        if start + len(rows) < length:
            self._hashes[window, hook] = (state, start + len(rows))
        else:
            place = self._places["hash"] + 8 * (window * len(self._hook_number) + self._hook_number[hook])
            _pwrite(self._fd, state.intdigest().to_bytes(8, "little"), place)
        self._uncommitted += len(data)

    def batch_done(self, rows: int, last: bool = False) -> None:
        """Say that one more batch is written, `rows` in all; commits when enough has come together, or at the last."""
        self.batches_done += 1
        if self._uncommitted >= COMMIT_BYTES or last:
            self.commit(rows)

    def commit(self, rows: int) -> None:
        """Make safe what is written, `rows` in all, where anything is."""
        if not self.batches_done:
            return
        os.fdatasync(self._fd)
        place = self._places["commit_log"] + (self.batches_done - 1) * RECORD.itemsize
        _pwrite(self._fd, _record(self.batches_done, rows).tobytes(), place)
        os.fdatasync(self._fd)
        self._uncommitted = 0

    def note(self, figures: Mapping[str, float]) -> None:
        """Add to the numbers of /figures, in which several jobs may have a share."""
        for number, name in enumerate(self._spec.figures):
            place = self._places["figures"] + 8 * number
            so_far = np.frombuffer(os.pread(self._fd, 8, place), "<f8")[0]
            _pwrite(self._fd, np.array(so_far + figures[name], "<f8").tobytes(), place)

    def finish(self) -> None:
        """Give the file its name, for good."""
        if self.batches_done != self._spec.batches or self._hashes:
            raise ValueError(f"{self.batches_done} of {self._spec.batches} batches are written")
        os.fsync(self._fd)
        self.partial.replace(self.path)
        layout.sync(self.path.parent)

    def _take_up(self) -> int | None:
        """The number of batches that an unfinished file has committed, None if there is none that we can go on with."""
        if not self.partial.exists():
            return None
        try:
            with h5py.File(self.partial, "r") as file:
                identity = file.attrs.get("identity")
                done = committed(file["commit_log"][:]) if identity == self._spec.identity else 0
        except (OSError, KeyError):
            log.warning("%s is not a shard that can be read: discarded", self.partial.name)
            return None
        if identity != self._spec.identity:
            log.warning("%s is of another config, model or corpus: discarded", self.partial.name)
            return None
        log.info("going on with %s after %d of %d batches", self.partial.name, done, self._spec.batches)
        return done

    def _create(self) -> None:
        """Lay out the file with room for all rows; it gets its `.partial` name when all of that is on disk."""
        begun = self.partial.with_name(self.partial.name + ".begun")
        begun.unlink(missing_ok=True)
        with h5py.File(begun, "w") as file:
            _lay_out(file, self._spec)
            end = max(_ends(file, self._spec.points), default=0)
        try:
            with begun.open("rb+") as f:
                os.posix_fallocate(f.fileno(), 0, max(end, 1))
        except OSError as error:
            begun.unlink()
            raise _no_room(self.path, end, error) from None
        layout.sync(begun)
        begun.replace(self.partial)
        layout.sync(self.partial.parent)


def _no_room(path: Path, size: int, error: OSError) -> MemoryPlanError:
    return MemoryPlanError(
        f"{path.parent}: no room for a shard of {size / 1e9:.3f} GB ({error.strerror}); free disk space and run again, "
        "or ask for fewer hook points, fewer tokens or a smaller store.dtype"
    )


def begun(path: Path, identity: str) -> dict[str, Any] | None:
    """The attributes of the unfinished file of a shard, None where there is none that can be gone on with."""
    try:
        with h5py.File(partial_of(path), "r") as file:
            return dict(file.attrs) if file.attrs.get("identity") == identity else None
    except OSError:
        return None


def partial_of(path: Path) -> Path:
    """Where the unfinished file of a shard is."""
    return path.with_name(path.name + ".partial")


def committed(log_records: np.ndarray) -> int:
    """Batches that the commit log of an unfinished or finished file vouches for."""
    for batches, rows, check in log_records[::-1].tolist():
        if batches and check == int(_record(batches, rows)["check"]):
            return batches
    return 0


def _with_all_keys(rows: "torch.Tensor", keys: int, fill: float) -> "torch.Tensor":
    import torch

    rows = rows[..., :keys]  # a batch is as wide as its longest window
    return torch.nn.functional.pad(rows, (0, keys - rows.shape[-1]), value=fill)


def _record(batches: int, rows: int) -> np.ndarray:
    record = np.zeros((), RECORD)
    record["batches"], record["rows"] = batches, rows
    record["check"] = xxhash.xxh3_64_intdigest(record.tobytes()[:16])
    return record


def _pwrite(fd: int, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, place)
        view, place = view[written:], place + written


def hook_path(hook: str) -> str:
    """Where a hook point's rows lie in a file."""
    return f"hooks/{hook}/activations"


def _lay_out(file: h5py.File, spec: ShardSpec) -> None:
    """All metadata and all tables of a shard; rows, hashes and log are places without content yet."""
    tokens = spec.tokens
    names = [p.name for p in spec.points]
    layout.set_attributes(file, {**spec.attributes, "identity": spec.identity, "rows": spec.rows, "hooks": names})
    for name in ("input_ids", "document", "position"):
        file[f"tokens/{name}"] = getattr(tokens, name)
    file["documents/offset"] = tokens.document_offset
    file["documents/id"] = tokens.document_id
    file["windows/offset"] = tokens.window_offset
    file["windows/document"] = tokens.window_document
    file["commit_log"] = np.zeros(spec.batches, RECORD)
    if spec.figures:
        file["figures"] = np.zeros(len(spec.figures), "<f8")
        file["figures"].attrs["names"] = list(spec.figures)
    file["windows/hash"] = np.zeros((spec.windows, len(names)), "<u8")
    for point in spec.points:
        shape = (spec.rows, *point.row(spec.keys))
        layout.create_contiguous(file, hook_path(point.name), shape, layout.hdf5_type(spec.precision))


def _places(file: h5py.File, points: list[HookPoint]) -> dict[str, int]:
    places = {p.name: layout.byte_offset(file[hook_path(p.name)]) for p in points}
    return places | {
        "hash": layout.byte_offset(file["windows/hash"]),
        "commit_log": layout.byte_offset(file["commit_log"]),
        **({"figures": layout.byte_offset(file["figures"])} if "figures" in file else {}),
    }


def _ends(file: h5py.File, points: list[HookPoint]) -> list[int]:
    return [
        layout.byte_offset(d) + d.id.get_storage_size() for d in (file[hook_path(p.name)] for p in points) if d.size
    ]
