"""The writer: what is committed is on disk, what is torn is seen, and only finished files get their
name.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash
from shards import LENGTHS, POINTS, all_but_metrics, spec
from theloom.errors import MemoryPlanError, StoreError
from theloom.hooks.points import residual_points
from theloom.store import commit_log, file_format
from theloom.store import writer as writer_module
from theloom.store.commit_log import RECORD, committed
from theloom.store.hdf5 import element_types
from theloom.store.writer import ShardWriter


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def values(window: int, hook: str, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * window + len(hook))
    return torch.randn(LENGTHS[window], 8, generator=generator).to(dtype)


def write_window(writer: ShardWriter, window: int, dtype=torch.float32) -> None:
    for point in POINTS:
        rows = values(window, point.name, dtype)
        writer.write(window, point.name, 0, rows[:2])
        if len(rows) > 2:
            writer.write(window, point.name, 2, rows[2:])


def write_all(path, dtype=torch.float32, precision="fp32", order=(2, 0, 1)) -> None:
    with ShardWriter(path, spec(precision)) as writer:
        for count, window in enumerate(order):
            write_window(writer, window, dtype)
            writer.batch_done(count + 1, last=count == len(order) - 1)
        writer.finish()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rows_hashes_and_tables_are_what_was_written(tmp_path, precision):
    from theloom.precision import torch_dtype

    path = tmp_path / "s.h5"
    write_all(path, torch_dtype(precision), precision)
    assert names(tmp_path) == ["s.h5"]
    with h5py.File(path) as file:
        for number, point in enumerate(POINTS):
            expected = torch.cat([values(w, point.name, torch_dtype(precision)) for w in range(3)])
            stored = file[f"hooks/{point.name}/activations"]
            assert stored.chunks is None
            assert element_types.precision_of(stored) == precision
            assert np.array_equal(stored[:].astype("f8"), expected.double().numpy())
            for window in range(3):
                rows = values(window, point.name, torch_dtype(precision))
                digest = xxhash.xxh3_64_intdigest(element_types.bits(rows).tobytes())
                assert file["windows/hash"][window, number] == digest
        assert file["documents/id"][:].tolist() == [b"d0", b"d1", b"d2"]
        assert committed(file["commit_log"][:]) == 3


def test_bfloat16_keeps_every_bit_pattern_nan_payloads_included(tmp_path):
    every = (
        torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(-1, 8)
    )
    with ShardWriter(
        tmp_path / "s.h5", spec("bf16", lengths=[len(every)], allow_nonfinite=True)
    ) as writer:
        for point in POINTS:
            writer.write(0, point.name, 0, every)
        writer.batch_done(len(every), last=True)
        writer.finish()
    with h5py.File(tmp_path / "s.h5") as file:
        stored = file[f"hooks/{POINTS[0].name}/activations"]
        raw = np.fromfile(tmp_path / "s.h5", "<u2", count=1 << 16, offset=stored.id.get_offset())
        assert np.array_equal(raw, np.arange(1 << 16, dtype="<u2"))
        finite = np.isfinite(every.float().numpy())
        assert np.array_equal(stored[:].astype("f4")[finite], every.float().numpy()[finite])


def test_a_writer_that_leaves_early_keeps_the_partial_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)
    path = tmp_path / "s.h5"
    with ShardWriter(path, spec()) as writer:
        write_window(writer, 2)
        writer.batch_done(1)
    assert names(tmp_path) == ["s.h5.partial"]
    with ShardWriter(path, spec()) as writer:
        assert writer.batches_done == 1
        for window in (0, 1):
            write_window(writer, window)
            writer.batch_done(window + 2)
        writer.finish()
    whole = tmp_path / "whole.h5"
    write_all(whole)
    assert all_but_metrics(path) == all_but_metrics(whole)


def test_a_torn_log_record_is_not_believed():
    log = np.zeros(3, RECORD)
    log[0], log[1] = commit_log.record(1, 10, 7), commit_log.record(2, 20, 8)
    assert committed(log) == 2
    log[1]["checksum"] ^= 1
    assert committed(log) == 1
    log[0]["rows"] += 1
    assert committed(log) == 0
    assert committed(np.zeros(0, RECORD)) == 0


def test_rows_out_of_order_or_beyond_the_window_are_a_defect(tmp_path):
    with ShardWriter(tmp_path / "s.h5", spec()) as writer:
        with pytest.raises(ValueError, match="rows 1 to 2 after 0"):
            writer.write(0, POINTS[0].name, 1, torch.zeros(1, 8))
        with pytest.raises(ValueError, match="rows 0 to 4 after 0 of 3"):
            writer.write(0, POINTS[0].name, 0, torch.zeros(4, 8))
        with pytest.raises(ValueError, match="0 of 3 batches"):
            writer.finish()


def test_a_shard_without_rows_is_a_file_all_the_same(tmp_path):
    with ShardWriter(tmp_path / "s.h5", spec(lengths=[])) as writer:
        writer.finish()
    with h5py.File(tmp_path / "s.h5") as file:
        assert file[f"hooks/{POINTS[0].name}/activations"].shape == (0, 8)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    # lazily: the traceback of a test that failed keeps its files open
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_second_writer_is_rejected_as_long_as_the_first_lives(tmp_path):
    path = tmp_path / "s.h5"
    source = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import shards\n"
        "from pathlib import Path\n"
        "from theloom.store.writer import ShardWriter\n"
        "with ShardWriter(Path(sys.argv[2]), shards.spec()):\n"
        "    print('writing', flush=True); os.kill(os.getpid(), 19)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", source, str(Path(__file__).parents[1]), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "writing\n"
    with (
        pytest.raises(StoreError, match=rf"another job writes it \(process {first.pid} on"),
        ShardWriter(path, spec()),
    ):
        pass
    first.kill()
    first.wait()
    write_all(path)
    assert names(tmp_path) == ["s.h5"]


def test_figures_add_up_over_jobs_and_are_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)
    path = tmp_path / "s.h5"
    with ShardWriter(path, spec()) as writer:
        assert writer.metrics == dict.fromkeys(file_format.METRICS, 0.0)
        writer.metrics["tokens"] += 5
        write_window(writer, 2)
        writer.batch_done(5)
    with ShardWriter(path, spec()) as writer:
        assert writer.metrics["tokens"] == 5
        assert 0 < writer.metrics["seconds_disk"] < 60
        for window in (0, 1):
            writer.metrics["tokens"] += LENGTHS[window]
            write_window(writer, window)
            writer.batch_done(window, last=window == 1)
        writer.metrics["seconds_total"] = 1.5
        writer.finish()
    with h5py.File(path) as file:
        found = dict(zip(file_format.METRICS, file["metrics"][:].tolist(), strict=True))
    assert (found["tokens"], found["seconds_total"]) == (9, 1.5)


@pytest.mark.parametrize(
    ("latency", "speed", "expected"), [(0.0, 1e9, 8), (0.001, 1e9, 19), (0.1, 2e9, 64)]
)
def test_a_commit_is_as_large_as_the_disk_asks_for(tmp_path, monkeypatch, latency, speed, expected):
    """Of 1 ms and 1 GB/s: 20 MB, so that the wait is a twentieth."""
    with ShardWriter(tmp_path / "s.h5", spec()) as writer:
        clock, syncs = [0.0], []

        def fdatasync(fd):
            clock[0] += latency if syncs else 10**8 / speed
            syncs.append(fd)

        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        writer._to_disk(b"", writer._offsets["commit_log"], writer._metrics(), 10**8, 0.0)
        assert writer.commit_bytes >> 20 == expected


def test_values_beyond_fp16_are_an_error_unless_so_many_are_allowed(tmp_path, caplog):
    def write(path, allowed):
        with ShardWriter(path, spec("fp16", max_overflow=allowed)) as writer:
            for count, window in list(enumerate((2, 0, 1)))[writer.batches_done :]:
                for point in POINTS:
                    rows = values(window, point.name)
                    rows[0, 0] = 1e5 if window == 1 and point is POINTS[1] else 1.0
                    writer.write(window, point.name, 0, rows.half())
                writer.batch_done(count + 1, last=count == 2)
            writer.finish()

    path = tmp_path / "s.h5"
    with pytest.raises(
        StoreError, match=rf"1 of 72 values of {POINTS[1].name} .* store\.dtype=bf16"
    ):
        write(path, 0.0)
    assert names(tmp_path) == ["s.h5.partial"]
    write(path, 0.02)  # goes on with it
    assert "1 of 72 values" in caplog.text
    with h5py.File(path) as file:
        assert file["statistics/infinite"][:].tolist() == [0, 1]


def test_fp16_keeps_every_bit_pattern_nan_payloads_included(tmp_path):
    every = (
        torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(-1, 8)
    )
    with ShardWriter(
        tmp_path / "s.h5",
        spec("fp16", lengths=[len(every)], max_overflow=1.0, allow_nonfinite=True),
    ) as writer:
        for point in POINTS:
            writer.write(0, point.name, 0, every)
        writer.batch_done(len(every), last=True)
        writer.finish()
    with h5py.File(tmp_path / "s.h5") as file:
        offset = file[f"hooks/{POINTS[0].name}/activations"].id.get_offset()
        assert file["statistics/nonfinite"][0] == 2 * (1 << 10)
    assert np.array_equal(
        np.fromfile(tmp_path / "s.h5", "<u2", 1 << 16, offset=offset),
        np.arange(1 << 16, dtype="<u2"),
    )


def test_a_full_disk_ends_with_the_space_that_is_needed_and_leaves_nothing(small_disk):
    large = dataclasses.replace(spec(), points=residual_points(1, 1 << 16))
    with (
        pytest.raises(MemoryPlanError, match=r"no room for a shard of 0\.005 GB"),
        ShardWriter(small_disk / "s.h5", large),
    ):
        pass
    assert names(small_disk) == []


def test_a_shard_on_a_full_disk_goes_on_after_space_is_made(small_disk):
    """Packing needs room for a second file, which is not there."""
    lengths = [2000, 3000, 4000]
    requested = spec(lengths=lengths, compression="zstd")

    def write() -> int:
        with ShardWriter(small_disk / "s.h5", requested) as writer:
            there = writer.batches_done
            for window in range(there, 3):
                for point in POINTS:
                    rows = torch.randn(
                        lengths[window], 8, generator=torch.Generator().manual_seed(window)
                    )
                    writer.write(window, point.name, 0, rows)
                writer.batch_done(sum(lengths[: window + 1]), last=window == 2)
            writer.finish()
        return there

    with pytest.raises(
        MemoryPlanError, match=r"no room for a packed shard of 0\.00\d GB, .* are free"
    ):
        write()
    assert names(small_disk) == ["s.h5.partial"]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert write() == 3
    assert names(small_disk) == ["s.h5"]


def test_a_disk_that_fills_up_midway_loses_no_committed_row(small_disk, monkeypatch):
    """On a file system that does not keep allocated room; here none is allocated."""
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 1)
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    lengths = [6000] * 8  # 3 MB
    requested = spec(lengths=lengths)

    def rows_of(window: int) -> torch.Tensor:
        return torch.randn(lengths[window], 8, generator=torch.Generator().manual_seed(window))

    def write() -> int:
        with ShardWriter(small_disk / "s.h5", requested) as writer:
            there = writer.batches_done
            for window in range(there, len(lengths)):
                for point in POINTS:
                    writer.write(window, point.name, 0, rows_of(window))
                writer.batch_done(sum(lengths[: window + 1]), last=window == len(lengths) - 1)
            writer.finish()
        return there

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", lambda *_: None)
        with pytest.raises(
            MemoryPlanError,
            match=r"no room for a shard of 0\.003 GB, .* free disk space and run again",
        ):
            write()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert 1 <= write() < len(lengths)
    with h5py.File(small_disk / "s.h5") as file:
        for point in POINTS:
            stored = file[f"hooks/{point.name}/activations"][:]
            assert np.array_equal(
                stored, torch.cat([rows_of(w) for w in range(len(lengths))]).numpy()
            )
