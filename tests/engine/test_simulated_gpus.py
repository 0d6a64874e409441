"""The extraction on simulated GPUs: in every order that their streams allow, its rows are those of
the CPU.
"""

import functools
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import theloom
from simulated_cuda import POLICIES
from simulated_runs import Prepared, Rows, build, cpu_rows, difference, machine, prepare, read_rows
from theloom.errors import ModelError, StoppedError
from theloom.model import forward
from torch import OutOfMemoryError

EXACT = 1e-5  # of the largest value: chunks and batches add up in another order

# what is requested, GPUs
EXECUTIONS = {
    "resident": ("memory.streaming_chunk_size=512", 1),
    "chunks": ("", 1),
    "offloaded": ("extraction.cache=offloaded", 1),
    "layerwise": ("extraction.execution=layerwise", 1),
    "two GPUs for one model": ("", 2),
}
VERIFIED = [("chunks", "copies_first"), ("layerwise", "lazy")]
SCHEDULES = [*((policy, 0) for policy in POLICIES), ("random", 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return cpu_rows(tmp_path_factory.mktemp("cpu") / "run", model)


@pytest.fixture(scope="module")
def prepared_on(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """The run of an execution, prepared once."""

    @functools.cache
    def made(execution: str) -> Prepared:
        return prepare(tmp_path_factory.mktemp("run"), model, *EXECUTIONS[execution])

    return made


@pytest.mark.parametrize(("policy", "seed"), SCHEDULES)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_rows_are_those_of_the_cpu_in_any_order(
    prepared_on, expected, tmp_path, execution, policy, seed
):
    run = prepared_on(execution).again(tmp_path / "run")
    rows = run.rows(policy=policy, seed=seed, verified=(execution, policy) in VERIFIED)
    assert difference(rows, expected) <= EXACT


def test_the_host_does_not_wait_once_more_for_every_hook_point(prepared_on, model, tmp_path):
    """The model's thread: the writer's waits for a copy, which hold nobody up, are events."""
    hooks = "memory.activation_cache_filter=[blocks.*.hook_resid_*,blocks.*.mlp.*]"
    more = prepare(tmp_path / "more", model, f"{EXECUTIONS['layerwise'][0]} {hooks}", 1)
    waits = []
    for number, run in enumerate((prepared_on("layerwise"), more)):
        with machine(1) as world:
            run.again(tmp_path / f"{number}").run.extract()
        found = world.schedule.syncs
        waits.append(sum(count for cause, count in found.items() if "event" not in cause))
        assert "spinning event" not in found
    assert waits[1] <= waits[0] + 2


@pytest.mark.parametrize("told", [True, False])
def test_no_forward_pass_makes_the_host_wait(prepared_on, monkeypatch, tmp_path, told):
    """Where the model is told that each row is one document; else it asks the device."""
    if not told:
        monkeypatch.setattr(forward, "one_document_a_row", nullcontext)
    with machine(1) as world:
        prepared_on("resident").again(tmp_path / "run").run.extract()
    asked = sum(n for (_, place), n in world.schedule.places.items() if "masking_utils" in place)
    assert (asked == 0) is told


def test_the_seconds_of_passes_far_behind_the_host_are_recorded(prepared_on, tmp_path):
    run = prepared_on("two GPUs for one model").again(tmp_path / "run")
    run.rows(policy="lazy")
    metrics = theloom.open(run.run.shards[0]).metrics
    assert metrics["seconds_forward"] > 0.1 * metrics["seconds_total"]
    assert 0 < metrics["peak_memory"] <= metrics["predicted_memory"]


def test_an_offloaded_cache_over_three_gpus_has_the_cpu_s_rows(model, expected, tmp_path):
    run = prepare(tmp_path / "run", model, "extraction.cache=offloaded", gpus=3)
    rows = run.again(tmp_path / "rows").rows(policy="random", seed=3)
    assert difference(rows, expected) <= EXACT


def test_a_model_whose_end_is_not_loaded_goes_over_two_gpus(model, tmp_path):
    hook = "blocks.2.hook_resid_post"
    options = f"memory.activation_cache_filter=[{hook}]"
    run = prepare(tmp_path / "run", model, options, gpus=2)
    rows = run.again(tmp_path / "rows").rows(policy="lazy")
    assert rows.keys() == {hook}
    assert difference(rows, cpu_rows(tmp_path / "cpu", model, options)) <= EXACT


@pytest.mark.parametrize("requested", ["rows.keep='[3:-1]'", "rows.keep='~[:1]' rows.pool=mean"])
def test_kept_rows_of_two_gpus_are_those_of_the_cpu(model, tmp_path, requested):
    expected = cpu_rows(tmp_path / "cpu", model, requested)
    run = prepare(tmp_path / "run", model, requested, gpus=2)
    for policy in ("copies_first", "lazy"):
        assert difference(run.again(tmp_path / policy).rows(policy=policy), expected) <= EXACT


def test_another_architecture_on_the_second_gpu(tmp_path):
    model = build(tmp_path, "gpt_neox")
    expected = cpu_rows(tmp_path / "cpu", model)
    for execution in ("resident", "layerwise"):
        requested = f"extraction.execution={execution} extraction.device=cuda:1"
        run = prepare(tmp_path / execution, model, requested, gpus=2, leased=False)
        rows = run.again(tmp_path / f"{execution}-rows").rows(policy="random", seed=2)
        assert difference(rows, expected) <= EXACT


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("execution", ["chunks", "layerwise"])
def test_memory_that_runs_out_at_random_moments_changes_no_row(
    prepared_on, expected, tmp_path, execution, seed
):
    """What is not backed off from within the job is left to its next attempt, as Snakemake's."""
    run = prepared_on(execution).again(tmp_path / "run").run
    draw = random.Random(seed)
    moments = {draw.randrange(1, 600) for _ in range(3)}
    failures = 0
    for _ in range(4):
        with machine(1, policy="random", seed=seed) as world:
            world.devices[0].fail = lambda number, nbytes: number in moments
            try:
                run.extract()
            except (OutOfMemoryError, ModelError):
                moments.clear()
            else:
                break
            finally:
                failures += world.devices[0].failures
    run.merge()
    assert failures
    assert difference(read_rows(run.activations), expected) <= EXACT


def test_batches_that_do_not_fit_are_made_smaller(prepared_on, expected, tmp_path):
    run = prepared_on("chunks").again(tmp_path / "run").run
    with machine(1) as world:
        gpu = world.devices[0]
        gpu.fail = lambda number, nbytes: nbytes == 80 * 96 * 4  # four windows in the MLP
        run.extract()
    run.merge()
    assert gpu.failures
    assert theloom.open(run.shards[0]).metrics["oom_level"] >= 1
    assert difference(read_rows(run.activations), expected) <= EXACT


@pytest.mark.parametrize("execution", ["chunks", "layerwise", "two GPUs for one model"])
def test_a_job_that_is_stopped_by_ctrl_c_is_resumed(prepared_on, expected, tmp_path, execution):
    run = prepared_on(execution).again(tmp_path / "run")
    with machine(run.gpus, policy="lazy") as world:
        world.schedule.at[600] = lambda: signal.raise_signal(signal.SIGINT)
        with pytest.raises(StoppedError, match="stopped by SIGINT"):
            run.run.extract()
    assert difference(run.rows(policy="random"), expected) <= EXACT
