"""`make gpu`: its steps on a simulated GPU, and the command on a machine without one."""

import json
import math
import sys

import pytest
from simulated_cuda import simulated
from support import ROOT
from theloom.devices import accelerator

sys.path.insert(0, str(ROOT / "workflow/bench"))

import gpu
import gpu_steps
from gpu_machine import SkippedError
from gpu_runs import DIFFERENCE


def numbers_of(rows):
    return [v for row in rows for v in row.values() if isinstance(v, float)]


@pytest.mark.parametrize(
    "step", ["attention", "pinning", "arithmetic", "llama", "layer by layer", "disk"]
)
def test_a_step_on_a_simulated_gpu_measures(tmp_path, step):
    with simulated(policy="random"):
        rows = gpu_steps.STEPS[step].function(tmp_path)
    assert rows
    assert all(row.get("right", True) for row in rows)
    assert all(map(math.isfinite, numbers_of(rows)))


def test_one_model_over_several_simulated_gpus_has_the_cpu_s_rows(tmp_path):
    with simulated(devices=2, policy="random"):
        (row,) = gpu_steps.STEPS["several GPUs"].function(tmp_path)
    assert row[DIFFERENCE] <= 1e-5
    assert all(row[name] > 0 for name in ("gain", "gain predicted", "tokens/s together"))


def test_one_gpu_is_not_several(tmp_path):
    with simulated(), pytest.raises(SkippedError, match="this machine has one"):
        gpu_steps.STEPS["several GPUs"].function(tmp_path)


def test_back_off_ends_with_the_same_rows(tmp_path):
    with simulated():
        (row,) = gpu_steps.STEPS["back-off"].function(tmp_path)
    assert row["times halved"] >= 1
    assert row[DIFFERENCE] <= 1e-5


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command in this process, whose steps are processes of their own."""

    def call(*options):
        output = ["--output", str(tmp_path / "gpu"), "--seconds", "6000"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *output, *options])
        gpu.main()

    return call


def test_the_command_writes_a_page_and_its_figures_and_skips_with_words(command, tmp_path):
    command("--only", "arithmetic", "sanitizer")
    first, second = json.loads((tmp_path / "gpu.json").read_text())
    assert first["state"] == "done"
    assert first["rows"][1]["largest error / largest value"] < 1e-5
    assert second["state"] in ("done", "skipped")
    assert second["rows"] or second["words"]
    assert "| arithmetic | done |" in (tmp_path / "gpu.md").read_text()


def test_the_command_runs_on_a_simulated_gpu(command, tmp_path):
    command("--simulated", "--only", "versions")
    (versions,) = json.loads((tmp_path / "gpu.json").read_text())
    assert {"what": "device", "value": "Simulated GPU"} in versions["rows"]


@pytest.mark.skipif(accelerator.kind_here() != "cpu", reason="make gpu itself has a GPU's figures")
def test_the_whole_battery_runs_on_a_machine_without_a_gpu(tmp_path):
    """All steps in this process, but for that of the tests, which this suite runs itself."""
    outcomes = []
    for step in gpu_steps.STEPS.keys() - {"tests"}:
        folder = tmp_path / step.replace(" ", "-")
        folder.mkdir()
        outcome = gpu.Outcome(step, "", seconds=0, **gpu.alone(step, folder / "run"))
        assert outcome.state == ("skipped" if outcome.words else "done"), outcome
        assert outcome.rows or outcome.words.endswith("this machine has no CUDA or ROCm GPU")
        assert all(map(math.isfinite, numbers_of(outcome.rows)))
        json.dumps(outcome.rows, allow_nan=False)
        outcomes.append(outcome)
    page = gpu.page(outcomes)
    assert "There is none: the steps ran on the CPU where they can." in page
    assert "nan" not in page.split()


def test_a_wrong_figure_makes_its_step_wrong(monkeypatch, tmp_path):
    rows = [{"off": math.inf, "right": False}]
    monkeypatch.setitem(gpu_steps.STEPS, "disk", gpu_steps.Step(lambda folder: rows, 1))
    assert gpu.alone("disk", tmp_path) == {
        "state": "wrong",
        "rows": [{"off": "inf", "right": False}],
    }


def test_a_step_gets_the_time_that_others_left(monkeypatch, tmp_path):
    limits = []

    def run(step, folder, limit, simulated):
        limits.append(limit)
        return gpu.Outcome(step, "", "done", 0.0)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu")])
    gpu.main()
    assert limits[0] == pytest.approx(gpu_steps.STEPS["versions"].seconds, abs=1)
    assert limits[-1] == pytest.approx(sum(s.seconds for s in gpu_steps.STEPS.values()), abs=5)


def test_a_step_that_does_not_end_costs_no_other_one(tmp_path):
    outcome = gpu.run("versions", tmp_path, limit=0.01)
    assert outcome.state == "timed out"


def test_all_steps_together_take_ten_minutes_at_most():
    assert sum(step.seconds for step in gpu_steps.STEPS.values()) <= gpu.SECONDS
