"""A run whose memory runs out, that is stopped, or whose disk is slow: nothing committed is lost,
and it is said.
"""

import logging
import os
import re
import signal
import time

import pytest
import theloom
import torch
from support import extract_one_shard, stages
from theloom.corpus.batching import Batch
from theloom.dataset.inspect import check_hashes
from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import batch_loop, model_record, resident
from theloom.engine.progress import Moment, Progress, SweepProgress
from theloom.engine.row_probe import RowProbe
from theloom.errors import MemoryPlanError, ModelError, StoppedError
from theloom.hooks.points import residual_points
from theloom.planning import estimate
from theloom.store import ring_buffer, writer
from theloom.store.writer import ShardWriter

REQUESTED = (
    "corpus.max_tokens=3000 corpus.context_length=256 memory.streaming_chunk_size=128 "
    "extraction.shards=1"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama):
    return stages(tmp_path_factory.mktemp("whole"), tiny_llama, REQUESTED).all()


@pytest.fixture
def run(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    begun = stages(tmp_path, whole.config("extract").model.source, REQUESTED)
    for name in ("estimate.h5", "tokens.h5", "model.h5"):
        (begun.folder / name).write_bytes((whole.folder / name).read_bytes())
    return begun


@pytest.fixture
def memory_for(monkeypatch):
    """Has the model's second block fail, from its second call on, where a step has more tokens than
    there is room for.

    So a document that streams fails in the middle. Gives the tokens of every step that was run.
    """
    load, steps = model_record.load_again, []

    def limit(tokens):
        def load_again(*args):
            loaded = load(*args)

            def before(module, inputs):
                size = inputs[0].shape[0] * inputs[0].shape[1]
                steps.append(size)
                if size > tokens and len(steps) > 1:
                    raise torch.OutOfMemoryError(f"no room for {size} tokens")

            loaded.architecture.blocks[1].register_forward_pre_hook(before)
            return loaded

        monkeypatch.setattr(model_record, "load_again", load_again)
        return steps

    return limit


def assert_same_rows(run, whole):
    run.merge()
    found, expected = theloom.open(run.activations), theloom.open(whole.activations)
    assert len(found) == len(expected)
    for hook in found.hooks:
        error = float(
            (found[hook][:] - expected[hook][:]).abs().max() / expected[hook][:].abs().max()
        )
        assert error <= 1e-5, (hook, error)
    assert check_hashes(found)[0] == []


def test_where_memory_runs_out_a_run_resumes_smaller_with_the_same_rows(
    run, whole, memory_for, caplog
):
    steps = memory_for(64)
    run.extract()
    assert_same_rows(run, whole)
    assert caplog.text.count("resuming from the last committed row") >= 2
    assert "with batches of 64 in chunks of 64" in caplog.text
    assert max(steps[-5:]) <= 64


def test_after_three_failures_at_the_smallest_the_plan_s_advice_is_the_end(run, memory_for, caplog):
    memory_for(0)
    with pytest.raises(
        MemoryPlanError, match=r"ran out 3 times with the smallest batches .* tokens .*; set \w+"
    ):
        run.extract()
    assert caplog.text.count("trying once more") == 2


def test_a_retry_begins_with_smaller_batches_in_the_file_that_was_begun(
    run, whole, memory_for, caplog
):
    steps = memory_for(10**6)
    extract_one_shard(run, oom_level=2)
    assert max(steps) <= 64
    assert "out of memory" not in caplog.text
    assert_same_rows(run, whole)


@pytest.mark.parametrize(
    "plan",
    [
        "extraction.batch_tokens=64 memory.streaming_chunk_size=64",
        "extraction.batch_tokens=1024 memory.streaming_chunk_size=256",
        "extraction.cache=offloaded memory.memory_warning_threshold=0.5",
    ],
)
def test_another_plan_keeps_the_rows_that_are_committed(run, whole, monkeypatch, plan):
    forward, calls = resident.ResidentRunner.run, []

    def stops_in_the_sixth(self, *args):
        calls.append(args[0].shape)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(resident.ResidentRunner, "run", stops_in_the_sixth)
    monkeypatch.setattr(batch_loop, "riskiest", lambda *_: [])
    with pytest.raises(KeyboardInterrupt):
        run.extract()
    begun, source = calls[:5], whole.config("extract").model.source
    requested = " ".join(w for w in REQUESTED.split() if w.partition("=")[0] not in plan)
    again = stages(run.folder, source, f"{requested} {plan}")
    estimate.run_estimate(again.config("estimate"), again.folder / "estimate.h5")
    again.extract()
    tokens = sum(rows * width for rows, width in calls[6:])
    padded = sum(rows * width for rows, width in begun)
    assert tokens <= 3000 + 1024 - padded * 0.8
    if "batch_tokens=64" in plan:
        assert all(rows * width <= 64 for rows, width in calls[6:] if width <= 64)
    assert_same_rows(again, whole)


def test_an_error_that_is_not_of_memory_is_not_tried_again(run, memory_for, monkeypatch):
    def fails(*args):
        raise RuntimeError("a defect")

    monkeypatch.setattr(ShardWriter, "write", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        run.extract()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_requested_to_stop_commits_and_the_next_one_resumes(run, whole, monkeypatch, number):
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1 << 30)  # only the stop commits
    before, handlers = (
        resident.ResidentRunner.run,
        [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
    )
    calls = []

    def asked_in_the_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        before(self, *args)

    monkeypatch.setattr(resident.ResidentRunner, "run", asked_in_the_third)
    with pytest.raises(
        StoppedError, match=rf"stopped by {number.name} with [\d,]+ of 3,000 tokens on disk"
    ):
        run.extract()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(calls) == 3
    run.extract()
    assert_same_rows(run, whole)
    batches = len(calls)
    monkeypatch.setattr(resident.ResidentRunner, "run", before)
    assert batches >= 5  # none of the three was run again


def test_a_slow_disk_is_said_to_be_the_limit(run, whole, monkeypatch, caplog):
    write = ShardWriter.write

    def slowly(self, *args):
        time.sleep(0.02)
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", slowly)
    monkeypatch.setitem(ring_buffer.RING_BYTES, "cpu", 0)
    with caplog.at_level(logging.INFO):
        run.extract()
    assert "the disk is the limit: the model waited for it" in caplog.text
    assert_same_rows(run, whole)


def test_progress_says_tokens_speed_time_left_memory_and_bytes():
    progress = Progress(10_000, 1_000, 2 * 10**9, MemoryWatch(torch.device("cpu")))
    line = progress.line(Moment(4_000, 50_000_000, 0.5), 10.0)
    assert line.startswith("4,000 of 10,000 tokens, 300 tokens/s, 0:00:20 left; memory ")
    assert " of 2.00 GB predicted; 5.0 MB/s written" in line
    assert "the disk is the limit" not in line
    assert "the disk is the limit: 50% of the time" in progress.line(
        Moment(4_000, 50_000_000, 5.0), 10.0
    )


def test_a_log_gets_a_line_now_and_then_and_at_the_end(caplog):
    with caplog.at_level(logging.INFO):
        progress = Progress(100, 0, 10**9, MemoryWatch(torch.device("cpu")))
        for tokens in range(50):
            progress.update(Moment(tokens, 0, 0.0))
        assert not caplog.records  # it is not yet time
        progress.update(Moment(100, 0, 0.0), last=True)
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["100 of 100 tokens"]


def test_a_sweep_reports_blocks_batches_and_the_time_left(caplog, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        progress = SweepProgress(0, 2, 200)
        for block in range(2):
            for batch in range(2):
                progress.update(block, batch + 1, 2, 100)
    assert [r.getMessage() for r in caplog.records] == [
        "block 2 of 2, batch 1 of 2: 5 tokens/s through all blocks, 0:00:10 left",
        "block 2 of 2, batch 2 of 2: 5 tokens/s through all blocks, 0:00:00 left",
    ]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_the_probe_sees_the_middle_and_the_deepest_hook_point(blocks):
    points = residual_points(blocks, 8)
    rows = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))

    class Alone:
        def alone(self, ids, requested, window):
            assert {points[len(points) // 2], points[-1]} == set(requested)
            return {p.name: rows[1, :4] + 1.0 * (p is points[-1]) for p in requested}

    probe, batch = RowProbe([7], points, 1e-5), Batch((3, 7), (6, 4))
    probe.begin(batch, 512)
    for point in points:
        probe.keep(point.name, rows)
    with pytest.raises(ModelError, match=re.escape(f"{points[-1].name} differs by")):
        probe.compare(Alone(), batch, torch.zeros(2, 6, dtype=torch.int64))
