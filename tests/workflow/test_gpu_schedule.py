"""Several GPUs for one model work at the same time: the extraction's own reckoned time on simulated
GPUs is that of the schedule simulator, which knows the rules alone.
"""

import json
import sys

import pytest
from simulated_runs import build, machine, prepare
from support import ROOT

sys.path.insert(0, str(ROOT / "workflow/bench"))

from gpu_schedule import Timeline, in_turn, together


@pytest.mark.parametrize("gpus", [1, 2, 5])
@pytest.mark.parametrize("batches", [1, 7])
def test_equal_parts_without_copies_take_the_time_of_a_pipeline(gpus, batches):
    found = together([2.0] * gpus, batches)
    assert found.seconds == pytest.approx(2 * (batches + gpus - 1))
    assert found.bubble == pytest.approx((gpus - 1) / (batches + gpus - 1))
    assert in_turn([2.0] * gpus, batches).seconds == pytest.approx(2 * batches * gpus)


def test_the_slowest_gpu_sets_the_pace_and_copies_take_its_time():
    assert together([1.0, 3.0, 1.0], 100).seconds == pytest.approx(302)
    assert together([1.0, 3.0, 1.0], 100, copy=0.5).seconds == pytest.approx(352.5)


@pytest.mark.parametrize(("gpus", "rows"), [(2, ""), (3, ""), (2, "rows.pool=mean")])
def test_the_extraction_keeps_its_gpus_as_busy_as_the_schedule_says(tmp_path, gpus, rows):
    """In the middle of a run: that of twice the batches less the other."""
    model, found = build(tmp_path, num_hidden_layers=2 * gpus), []
    for batches in (8, 16):
        line = json.dumps({"text": 30 * "a"}) + "\n"
        (tmp_path / "corpus.jsonl").write_text(batches * line, encoding="utf-8")
        hooks = "memory.activation_cache_filter=[blocks.*.hook_resid_post]"
        options = f"extraction.batch_tokens=32 {hooks} {rows}"
        run = prepare(tmp_path / f"{batches}", model, options, gpus)
        with machine(gpus) as world:
            run.again(tmp_path / f"{batches}-rows").run.extract()
            streams = [device.stream for device in world.devices]
            busy = tuple(stream.busy for stream in streams)
            found.append(Timeline(max(stream.ends for stream in streams), busy))
    seconds = found[1].seconds - found[0].seconds
    parts = [(b - a) / 8 for a, b in zip(found[0].busy, found[1].busy, strict=True)]
    expected = together(parts, 16).seconds - together(parts, 8).seconds
    assert expected <= seconds <= 1.15 * expected
    assert in_turn(parts, 8).seconds / seconds >= 0.75 * gpus
