"""`make gpu`: its steps on a simulated GPU, and the command on a machine without one."""

import json
import math
import subprocess
import sys

import pytest
from simulated_cuda import simulated
from support import ROOT

sys.path.insert(0, str(ROOT / "workflow/bench"))

import gpu
import gpu_steps


@pytest.mark.parametrize(
    "step", ["attention", "pinning", "arithmetic", "llama", "layer by layer", "disk"]
)
def test_a_step_on_a_simulated_gpu_measures(tmp_path, step):
    with simulated(policy="random"):
        rows = gpu_steps.STEPS[step].function(tmp_path)
    numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
    assert rows
    assert not any(math.isnan(n) for n in numbers)


def test_one_model_over_several_simulated_gpus_has_the_cpu_s_rows(tmp_path):
    with simulated(devices=2, policy="random"):
        (row,) = gpu_steps.STEPS["several GPUs"].function(tmp_path)
    assert row["difference of rows"] <= 1e-5
    assert all(row[name] > 0 for name in ("gain", "gain predicted", "tokens/s together"))


def test_one_gpu_is_not_several(tmp_path):
    with simulated(), pytest.raises(gpu_steps.SkippedError, match="this machine has one"):
        gpu_steps.STEPS["several GPUs"].function(tmp_path)


def test_back_off_ends_with_the_same_rows(tmp_path):
    with simulated():
        (row,) = gpu_steps.STEPS["back-off"].function(tmp_path)
    assert row["halved"] >= 1
    assert row["difference"] <= 1e-5


def test_the_command_writes_a_page_and_its_figures_and_skips_with_words(tmp_path):
    command = [sys.executable, str(ROOT / "workflow/bench/gpu.py"), "--output", tmp_path / "gpu"]
    done = subprocess.run(
        [*command, "--seconds", "6000", "--only", "arithmetic", "sanitizer"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "gpu.json").read_text())
    assert first["state"] == "done"
    assert first["rows"][1]["error"] < 1e-5
    assert second["state"] in ("done", "skipped")
    assert second["rows"] or second["words"]
    assert "| arithmetic | done |" in (tmp_path / "gpu.md").read_text()


def test_the_command_runs_on_a_simulated_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "workflow/bench/gpu.py"), "--output", tmp_path / "gpu"]
    options = ["--simulated", "--seconds", "6000", "--only", "versions"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (versions,) = json.loads((tmp_path / "gpu.json").read_text())
    assert {"what": "device", "value": "Simulated GPU"} in versions["rows"]


def test_a_step_that_does_not_end_costs_no_other_one(tmp_path):
    outcome = gpu.run("versions", tmp_path, limit=0.01)
    assert outcome.state == "timed out"


def test_all_steps_together_take_ten_minutes_at_most():
    assert sum(step.seconds for step in gpu_steps.STEPS.values()) <= gpu.SECONDS
