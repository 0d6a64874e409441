"""A writer that dies: at each call that changes its file, and with the power, when only what was
synced is sure.

LONG_TESTS=1 (`make test-store`) takes every point and 150 power cuts; the short version takes a
seeded choice of them.
"""

import os
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from crashes import Disk, flip
from shards import POINTS, all_but_metrics, spec
from theloom.store import commit_log, file_format
from theloom.store import writer as writer_module
from theloom.store.commit_log import committed
from theloom.store.encoding import scaled
from theloom.store.writer import ShardWriter

LONG = bool(os.environ.get("LONG_TESTS"))
WINDOWS = [17, 3, 64, 30, 1, 9, 40, 25, 12, 33]
ORDER = [[2, 6], [9, 3], [7, 0], [8], [5, 1, 4]]


def rows_of(window: int, hook: str) -> torch.Tensor:
    return torch.randn(
        WINDOWS[window], 8, generator=torch.Generator().manual_seed(100 * window + len(hook))
    )


def write_batches(path: Path, kind: str = "none") -> int:
    """Write the shard, or go on with it; gives the batches that were there. `kind`: compressed by
    `zstd`, or of rows with a scale in a dataset of its own, `int8`.
    """
    kinds = {"zstd": {"compression": "zstd"}, "int8": {"precision": "int8"}}
    begun = spec(lengths=WINDOWS, batches=len(ORDER), **kinds.get(kind, {}))
    with ShardWriter(path, begun) as writer:
        there = writer.batches_done
        for number in range(there, len(ORDER)):
            for start in (0, 20, 40, 60):  # chunks
                for point in POINTS:
                    for window in ORDER[number]:
                        rows = rows_of(window, point.name)[start : start + 20]
                        if len(rows):
                            writer.write(window, point.name, start, rows)
            done = sum(WINDOWS[w] for batch in ORDER[: number + 1] for w in batch)
            writer.batch_done(done, last=number == len(ORDER) - 1)
        writer.finish()
    return there


def check_committed(path: Path) -> int:
    """Every row that an unfinished or finished file vouches for is right; gives the batches."""
    with h5py.File(path) as file:
        done = committed(file["commit_log"][:])
        for number, batch in enumerate(ORDER[:done], start=1):
            for window in batch:
                assert (file["windows/batch"][window] == number).all()
                first = int(file["windows/offset"][window])
                for point in POINTS:
                    name, expected = f"hooks/{point.name}/activations", rows_of(window, point.name)
                    part = slice(first, first + WINDOWS[window])
                    if f"{name}_scale" in file:
                        codes, scales = scaled.encode(expected, "int8")
                        assert np.array_equal(file[name][part], codes)
                        assert np.array_equal(file[f"{name}_scale"][part], scales)
                    else:
                        assert np.array_equal(file[name][part], expected.numpy())
    return done


@pytest.fixture(params=["none", "zstd", "int8"])
def recorded(request, tmp_path, monkeypatch):
    """A whole run of the writer, each batch committed, as a record of its calls; and its finished
    file.
    """
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)
    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patched:
        disk = Disk(folder, patched)
        write_batches(folder / "s.h5", request.param)
    assert [batches for _, batches in commits(disk) if batches] == [1, 2, 3, 4, 5]
    return disk, folder / "s.h5", request.param


def go_on(disk: Disk, target: Path, point: int, whole: Path, kind: str) -> None:
    """After a crash nothing committed is lost or wrong, and the job ends with the same file."""
    synced = max(
        (c[2] for c in disk.calls[:point] if c[0] == "sync ends" and c[1] == "s.h5.partial"),
        default=-1,
    )
    promised = max((batches for number, batches in commits(disk) if number < synced), default=0)
    partial = target / "s.h5.partial"
    if partial.exists():
        assert check_committed(partial) >= promised
    if not (target / "s.h5").exists():
        there = check_committed(partial) if partial.exists() else 0
        assert write_batches(target / "s.h5", kind) == there
    assert all_but_metrics(target / "s.h5") == all_but_metrics(whole)
    shutil.rmtree(target)


def commits(disk: Disk) -> list[tuple[int, int]]:
    """The calls that write the log: which, and the batches that each vouches for."""
    return [
        (number, committed(np.frombuffer(call[3], commit_log.RECORD)))
        for number, call in enumerate(disk.calls)
        if call[0] == "write" and call[2:] and len(call[3]) % commit_log.RECORD.itemsize == 0
    ]


def points(disk: Disk, some: int, choose: random.Random) -> list[int]:
    every = range(len(disk.calls) + 1)
    return list(every) if LONG else sorted(choose.sample(every, min(some, len(every))))


def test_a_writer_killed_at_any_call_loses_nothing_and_ends_the_same(recorded, tmp_path):
    disk, whole, kind = recorded
    for point in points(disk, 25, random.Random(1)):
        disk.after_kill(point, tmp_path / "after")
        go_on(disk, tmp_path / "after", point, whole, kind)


def test_a_power_cut_at_any_moment_loses_nothing_that_was_committed(recorded, tmp_path):
    disk, whole, kind = recorded
    choose = random.Random(2)
    for _ in range(150 if LONG else 20):
        point = choose.randrange(len(disk.calls) + 1)
        disk.after_power_cut(point, tmp_path / "after", choose)
        go_on(disk, tmp_path / "after", point, whole, kind)


def test_a_log_that_is_written_before_the_data_is_found_out(tmp_path, monkeypatch):
    """The control: the check above bites a writer that commits in the wrong order."""
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)
    folder = tmp_path / "run"
    folder.mkdir()

    def log_first(self, log_records, offset, metrics, size, seconds_writing) -> float:
        file_format.pwrite(self._fd, log_records, offset)
        os.fdatasync(self._fd)
        return 0.0

    def late(self, data, offset) -> None:  # rows wait until their record is on its way
        self.__dict__.setdefault("late", []).append((bytes(data), offset))

    def commit_then_write(self) -> None:
        original(self)
        self._wait_for_commit()
        for data, offset in self.__dict__.pop("late", []):
            file_format.pwrite(self._fd, data, offset)

    original = ShardWriter._commit
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "_to_disk", log_first)
        patched.setattr(ShardWriter, "_pwrite", late)
        patched.setattr(ShardWriter, "_commit", commit_then_write)
        patched.setattr(ShardWriter, "finish", lambda self: None)
        disk = Disk(folder, patched)
        write_batches(folder / "s.h5")
    found = 0
    for point in range(len(disk.calls) + 1):
        target = tmp_path / "after"
        disk.after_kill(point, target)
        if (target / "s.h5.partial").exists():
            try:
                check_committed(target / "s.h5.partial")
            except AssertionError:
                found += 1
        shutil.rmtree(target)
    assert found > 10


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_damage_to_committed_rows_is_found_when_a_job_goes_on(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)
    write_batches(tmp_path / "whole.h5", kind)
    choose = random.Random(3)
    damageable = ["hooks", "commit_log", "windows/hash", "windows/batch"]
    if kind == "int8":
        damageable = ["hooks", f"hooks/{POINTS[0].name}/activations_scale"]
    for number in range(200 if LONG else 16):
        path = tmp_path / "s.h5"
        partial = shutil.copy(tmp_path / "whole.h5", tmp_path / "s.h5.partial")
        with h5py.File(partial) as file:
            name = damageable[number % len(damageable)]
            dataset = (
                file[f"hooks/{choose.choice(POINTS).name}/activations"]
                if name == "hooks"
                else file[name]
            )
            offset = dataset.id.get_offset() + choose.randrange(dataset.id.get_storage_size())
        flip(partial, offset, choose.randrange(8))
        assert write_batches(path, kind) < len(ORDER)
        assert all_but_metrics(path) == all_but_metrics(tmp_path / "whole.h5")
        path.unlink()
    assert "are not what was written" in caplog.text


def test_an_unfinished_file_with_a_damaged_table_or_attribute_is_discarded(tmp_path, caplog):
    write_batches(tmp_path / "s.h5")
    partial = (tmp_path / "s.h5").rename(tmp_path / "s.h5.partial")
    with h5py.File(partial) as file:
        offset = file["tokens/input_ids"].id.get_offset()
    flip(partial, offset + 5, 0)
    assert write_batches(tmp_path / "s.h5") == 0
    assert "is damaged (its tables of tokens, documents and windows): discarded" in caplog.text
