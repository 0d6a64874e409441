"""The writer of one shard: a file that a killed job cannot spoil.

All HDF5 metadata is written and synced before the first row (`shard_file`). From then on only bytes
are written, at offsets that are known beforehand: rows of hidden states, their hashes, and a log of
what is committed. They go through `os.pwrite`, not through HDF5: HDF5 would keep metadata in memory
and write it when it likes, and a thread would wait for its global lock.

A commit is data, fdatasync, log record, fdatasync. A disk may write in any order what is not
synced: without the first fdatasync a record could be on disk before the rows that it vouches for,
and without the second a job would count batches as committed that a power cut takes away. So
whatever the log lists is on disk, and a job that dies loses no more than what came after its last
record. fdatasync suffices, since the size of the file never changes. The unfinished file is
`<shard>.partial`, which the next job resumes; the finished one is renamed.

A commit runs in a thread while the next batches are written. So do the statistics: threads read the
rows back while they are in the page cache, always batch by batch and tile by tile, so that the
result does not depend on how often a job was killed.
"""

import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import xxhash

from theloom.errors import StoreError
from theloom.precision import read_as
from theloom.store import checksums, commit_log, file_format, index, shard_file, statistics
from theloom.store.commit_log import RECORD
from theloom.store.compression import pack_shard
from theloom.store.encoding.rows_at import RowsAt, parts_of
from theloom.store.file_format import METRICS
from theloom.store.lock import WriterLock
from theloom.store.nonfinite import check_finite
from theloom.store.partial import partial_of
from theloom.store.shard_file import ShardSpec

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

# The two syncs of a commit cost their latency whatever its size. So a commit is large enough to
# keep that below a twentieth of its time on this disk, within bounds: from COMMIT_BYTES to
# MOST_TIMES_THAT as many, which is the most that a killed job loses.
COMMIT_BYTES, MOST_TIMES_THAT = 8 << 20, 8

_LATENCY_SHARE = 0.05

COUNTERS = 2  # threads that compute the statistics, each of its own hook points


class ShardWriter:
    """Writes rows window by window, in any order, and commits batch by batch, in a fixed order.

    Use it as a context manager; `finish` gives the file its final name, and leaving without it
    keeps the `.partial` for the next job. `batches_done` counts the batches that earlier jobs have
    committed: the caller resumes after them. `metrics` starts with what earlier jobs committed, and
    is committed with the rows. Only one thread may call the methods.

    Args:
        path: the shard's final file.
        spec: what the shard will hold.

    Raises:
        StoreError: on entry, if another writer has the file.
        MemoryPlanError: on entry, or while writing, if the disk is full.
    """

    taker = "disk"

    def __init__(self, path: Path, spec: ShardSpec) -> None:
        self.path = path
        self.partial = partial_of(path)
        self.batches_done = 0
        self.metrics = dict.fromkeys(METRICS, 0.0)
        self._spec = spec
        self._lock = WriterLock(path)
        self._points = {p.name: p for p in spec.points}
        self._number = {p.name: n for n, p in enumerate(spec.points)}
        self._rows: dict[str, RowsAt] = {}  # where those of each hook point lie in the file
        self._statistics = {
            p.name: statistics.empty_statistics(p.name, p.width(spec.keys)) for p in spec.points
        }
        # windows of which a part is written: the state of their hash, how many rows there are, and
        # their scales, which the hash comes to last
        self._unfinished: dict[tuple[int, str], tuple[xxhash.xxh3_64, int, bytes]] = {}
        self._hashes: dict[int, int] = {}  # of what this batch wrote, by cell (`commit_log`)
        self._digest = 0
        self._records: list[np.ndarray] = []  # of batches that are written and not committed
        self._uncommitted = 0
        self.commit_bytes = COMMIT_BYTES  # of the next commit: adapted to the disk after each
        self._seconds_writing = 0.0
        self._fd = -1

    def __enter__(self) -> "ShardWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        try:
            if not self._can_resume():
                self._create()
            with h5py.File(self.partial, "r") as file:
                self._offsets = shard_file.byte_offsets(file)
                self._rows = shard_file.rows_at(file, self._spec)
                self.metrics = dict(zip(METRICS, file["metrics"][:].tolist(), strict=True))
            self._fd = os.open(self.partial, os.O_RDWR)
            self._check_committed()
        except BaseException:
            self._close()
            raise
        self._syncing = ThreadPoolExecutor(1)
        self._counting = [ThreadPoolExecutor(1) for _ in range(min(COUNTERS, len(self._points)))]
        self._sync: Future[float] | None = None
        self._counted: list[Future[None]] = []  # of the batch that was written last
        self._to_count: list[Future[None]] = []  # of the last that is being committed
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._syncing.shutdown()  # waits for a commit that is on its way
        for counting in self._counting:
            counting.shutdown(cancel_futures=True)
        self._close()

    def write(self, window: int, hook: str, start: int, rows: "torch.Tensor") -> None:
        """Write rows of one hook point and window. The chunks of a window are written in order.

        Args:
            window: its number in the shard.
            hook: name of the hook point.
            start: the number of the first row among the window's stored ones.
            rows: (positions, …), on the CPU, in the stored dtype; in any float dtype where the
                store has a scale for each row, by which they are encoded here. The caller may reuse
                the memory as soon as this returns. Attention may have fewer keys than the file: the
                others are filled with the value of masked keys.

        Raises:
            ValueError: the rows do not follow those before, or exceed the window.
            MemoryPlanError: the disk is full.
        """
        first = int(self._spec.tokens.row_offset[window])
        length = int(self._spec.tokens.row_offset[window + 1]) - first
        point = self._points[hook]
        if point.over_keys:
            rows = with_all_keys(rows, self._spec.keys, point.fill)
        parts = parts_of(rows, self._spec.precision)
        state, seen, scales = self._unfinished.pop((window, hook), (xxhash.xxh3_64(), 0, b""))
        if start != seen or start + len(rows) > length:
            raise ValueError(
                f"window {window}: rows {start} to {start + len(rows)} after {seen} of {length}"
            )
        state.update(parts[0])
        scales += b"".join(parts[1:])
        for data, (offset, size) in zip(parts, self._rows[hook].places, strict=True):
            self._pwrite(data, offset + (first + start) * size)
            self._uncommitted += len(data)
        if start + len(rows) < length:
            self._unfinished[window, hook] = (state, start + len(rows), scales)
        else:
            state.update(scales)
            self._hashes[window * len(self._number) + self._number[hook]] = state.intdigest()

    def batch_done(self, rows: int, last: bool = False) -> None:
        """End a batch; commits if the batches since the last commit are large enough.

        Args:
            rows: of the shard that are written, with this batch.
            last: whether this is the last batch, which is always committed.

        Raises:
            StoreError: more values are not finite than the spec allows.
            MemoryPlanError: the disk is full.
        """
        if self._unfinished:
            raise ValueError(
                f"windows {sorted({w for w, _ in self._unfinished})} are written in part"
            )
        self.batches_done += 1
        cells = np.array(sorted(self._hashes), "<u8")
        hashes = np.array([self._hashes[c] for c in cells.tolist()], "<u8")
        for run in np.split(np.arange(len(cells)), np.flatnonzero(np.diff(cells) != 1) + 1):
            if len(run):
                first = int(cells[run[0]])
                self._pwrite(hashes[run].tobytes(), self._offsets["windows/hash"] + 8 * first)
                numbers = np.full(len(run), self.batches_done, "<u4").tobytes()
                self._pwrite(numbers, self._offsets["windows/batch"] + 4 * first)
        self._digest = commit_log.chain(self._digest, cells, hashes)
        self._records.append(commit_log.record(self.batches_done, rows, self._digest))
        counters = len(self._counting)
        self._counted = [
            counting.submit(self._count, cells[cells % len(self._points) % counters == number])
            for number, counting in enumerate(self._counting)
        ]
        self._hashes.clear()
        if self._uncommitted >= self.commit_bytes or last:
            self._commit()
        if last:
            self._wait_for_commit()

    def commit(self) -> None:
        """Commit all batches that are done, and wait until they are on disk."""
        if self._records:
            self._commit()
        self._wait_for_commit()

    def finish(self) -> None:
        """Complete the file and give it its final name.

        Raises:
            ValueError: batches are missing.
            StoreError: more values are not finite than the spec allows.
            MemoryPlanError: the disk is full.
        """
        if self.batches_done != self._spec.batches or self._unfinished or self._hashes:
            raise ValueError(f"{self.batches_done} of {self._spec.batches} batches are written")
        self.commit()
        for counted in self._counted:
            counted.result()
        self._check_finite(last=True)
        for name, values in statistics.statistics_columns(
            [self._statistics[p.name] for p in self._spec.points]
        ).items():
            self._pwrite(values.tobytes(), self._offsets[name])
        self._pwrite(self._metrics(), self._offsets["metrics"])
        checksums.write_checksums(self.partial, checksums.RESULTS, checksums.METRICS)
        os.fsync(self._fd)
        if self._spec.compression == "none":
            self.partial.replace(self.path)
        else:
            pack_shard(self.partial, self.path)
        file_format.sync(self.path.parent)

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        started = time.perf_counter()
        try:
            file_format.pwrite(self._fd, data, offset)
        except OSError as error:
            # possible despite posix_fallocate: some file systems copy on write
            if file_format.is_full(error):
                raise self._no_room() from None
            raise
        self._seconds_writing += time.perf_counter() - started
        self.metrics["seconds_disk"] += time.perf_counter() - started

    def _commit(self) -> None:
        """Start the commit of all batches that are done, after the one before has ended."""
        self._wait_for_commit()
        for counted in self._to_count:
            counted.result()  # so that the statistics are at most a commit behind
        if self._to_count:
            self._check_finite()
        self._to_count = self._counted
        first = self.batches_done - len(self._records)
        log_records = np.array(self._records, RECORD).tobytes()
        offset = self._offsets["commit_log"] + first * RECORD.itemsize
        self._sync = self._syncing.submit(
            self._to_disk,
            log_records,
            offset,
            self._metrics(),
            self._uncommitted,
            self._seconds_writing,
        )
        self._records.clear()
        self._uncommitted, self._seconds_writing = 0, 0.0

    def _to_disk(
        self, log_records: bytes, offset: int, metrics: bytes, size: int, seconds_writing: float
    ) -> float:
        """Commit; returns the seconds that it took."""
        started = time.perf_counter()
        os.fdatasync(self._fd)  # the rows are on disk before the record that vouches for them
        synced = time.perf_counter()
        file_format.pwrite(self._fd, log_records, offset)
        file_format.pwrite(self._fd, metrics, self._offsets["metrics"])
        os.fdatasync(self._fd)  # the record is on disk before anything counts on it
        ended = time.perf_counter()
        latency, bandwidth = ended - synced, size / (synced - started + seconds_writing)
        wanted = int(latency * bandwidth / _LATENCY_SHARE)
        self.commit_bytes = min(max(wanted, COMMIT_BYTES), COMMIT_BYTES * MOST_TIMES_THAT)
        return ended - started

    def _wait_for_commit(self) -> None:
        if self._sync:
            sync, self._sync = self._sync, None
            try:
                self.metrics["seconds_disk"] += sync.result()
            except OSError as error:
                if file_format.is_full(error):
                    raise self._no_room() from None
                raise

    def _metrics(self) -> bytes:
        return np.array([self.metrics[name] for name in METRICS], "<f8").tobytes()

    def _count(self, cells: np.ndarray) -> None:
        """Add the rows of a batch to the statistics; they are read from the file."""
        hooks = list(self._rows.items())
        for cell in cells.tolist():
            window, number = divmod(cell, len(hooks))
            begin, end = (int(r) for r in self._spec.tokens.row_offset[window : window + 2])
            hook, rows = hooks[number]
            for tile in rows.tiles(self._fd, begin, end):
                self._statistics[hook].add(tile, read_as(rows.precision))

    def _check_finite(self, last: bool = False) -> None:
        check_finite(self._spec, self._statistics, self.path.name, self._fd, self._rows, last)

    def _can_resume(self) -> bool:
        """Whether there is an unfinished file to resume; any other is discarded, with a warning."""
        if not self.partial.exists():
            return False
        try:
            with file_format.reading(self.partial) as file:
                listed = index.of(file, self.partial)
                same = listed.attributes.get("shard_fingerprint") == self._spec.fingerprint
                reason = "" if same else "is of another config, model or corpus"
                parts = (checksums.METADATA, checksums.TABLES)
                if same and (broken := checksums.changed_parts(file.fd, listed, *parts)):
                    reason = f"is damaged ({', '.join(broken)})"
        except StoreError:
            reason = "is not a shard that can be read"
        if reason:
            log.warning("%s %s: discarded", self.partial.name, reason)
        return not reason

    def _check_committed(self) -> None:
        """Check what earlier jobs have committed, and resume after the last intact batch."""
        verified = commit_log.verify_committed(
            self.partial, self._spec.tokens.row_offset, self._rows, self._statistics
        )
        self.batches_done, self._digest = verified.batches, verified.digest
        if verified.batches < verified.vouched:
            log.warning(
                "%s: of %d committed batches, those from %d on are not what was written (the disk "
                "or a program has changed them): extracted again",
                *(self.partial.name, verified.vouched, verified.batches + 1),
            )
        if verified.vouched:
            log.info(
                "resuming %s after %d of %d batches",
                self.partial.name,
                verified.batches,
                self._spec.batches,
            )
        with h5py.File(self.partial, "r") as file:
            batch_of, records = file["windows/batch"][:], file["commit_log"][:]
        # what a later commit would otherwise vouch for again
        batch_of[batch_of > verified.batches] = 0
        records[verified.batches :] = np.zeros((), RECORD)
        file_format.pwrite(self._fd, records.tobytes(), self._offsets["commit_log"])
        file_format.pwrite(self._fd, batch_of.tobytes(), self._offsets["windows/batch"])
        os.fdatasync(self._fd)

    def _create(self) -> None:
        """Lay out the unfinished file, with room for all rows."""
        try:
            shard_file.create(self.partial, self._spec)
        except (OSError, RuntimeError) as error:  # h5py raises either when a file cannot be closed
            if not file_format.is_full(error):
                raise
            raise self._no_room() from None

    def _no_room(self) -> Exception:
        return file_format.no_room_error(
            self.path.parent, "a shard", self._spec.rows * sum(self._spec.row_bytes().values())
        )

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()


def with_all_keys(rows: "torch.Tensor", keys: int, fill: float) -> "torch.Tensor":
    """Rows of attention with so many keys: a batch is as wide as its longest window.

    Args:
        rows: (positions, heads, keys of the batch).
        keys: of the result.
        fill: the value of masked keys.

    Returns:
        (positions, heads, keys).
    """
    import torch

    rows = rows[..., :keys]
    return torch.nn.functional.pad(rows, (0, keys - rows.shape[-1]), value=fill)
