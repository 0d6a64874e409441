"""The extraction on simulated GPUs: in every order that their streams allow, its rows are those of
the CPU.
"""

import random
import signal
from pathlib import Path

import pytest
from simulated_cuda import POLICIES, World
from simulated_runs import Prepared, Rows, build, cpu_rows, difference, machine, prepare, read_rows
from theloom.errors import StoppedError

EXACT = 1e-5  # of the largest value: chunks and batches add up in another order

# what is requested, GPUs
EXECUTIONS = {
    "resident": ("memory.streaming_chunk_size=512", 1),
    "chunks": ("", 1),
    "offloaded": ("extraction.cache=offloaded", 1),
    "layerwise": ("extraction.execution=layerwise", 1),
    "two GPUs for one model": ("", 2),
}
SCHEDULES = [(policy, 0) for policy in POLICIES] + [("random", 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return cpu_rows(tmp_path_factory.mktemp("cpu") / "run", model)


@pytest.fixture(scope="module", params=EXECUTIONS)
def prepared(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    return prepare(tmp_path_factory.mktemp("run"), model, *EXECUTIONS[request.param])


@pytest.mark.parametrize(("policy", "seed"), SCHEDULES)
def test_rows_are_those_of_the_cpu_in_any_order(prepared, expected, tmp_path, policy, seed):
    run = prepared.again(tmp_path / "run")
    rows = run.rows(policy=policy, seed=seed, verified=policy == "copies_first")
    assert difference(rows, expected) <= EXACT
