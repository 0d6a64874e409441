"""8 bits layer by layer on a simulated GPU: bitsandbytes' own code with kernels of the CPU."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from simulated_cuda import simulated
from simulated_runs import build
from support import a_config
from theloom.devices import accelerator, streams
from theloom.engine.layerwise import block_loader
from theloom.engine.layerwise.model import opened
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.model import quantization
from theloom.model.files import prepare_files

pytest.importorskip("bitsandbytes")  # before the simulation, which stands in for a part of it

TOKENS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 6}
    return build(tmp_path_factory.mktemp("llama"), **sizes)


def swept(model: Path, device: str) -> tuple[dict[str, torch.Tensor], int]:
    """The residuals after every block, and the bytes of a block."""
    overrides = f"memory.precision_mode=fp32 memory.quantization=8bit extraction.device={device}"
    config = a_config(model, overrides)
    rows: dict[str, torch.Tensor] = {}
    with opened(config, prepare_files(config.model)) as found:
        points = found.loaded.catalog.select(["blocks.*.hook_resid_post"])
        runner = LayerwiseRunner(found.shell, found.source, points, 64, "fp32")
        batches = [torch.arange(TOKENS)[None]]
        store = ResidualStore(runner.residuals(batches, ""), None, device=found.loaded.device)
        if device == "cuda":
            accelerator.empty_cache(found.loaded.device)
            accelerator.reset_peak(found.loaded.device)
        with store:
            runner.sweep(batches, store, lambda _, name, *values: rows.update({name: values[1]}))
        return {name: value.cpu() for name, value in rows.items()}, found.sizes(points).block


@pytest.mark.parametrize("policy", ["lazy", "random"])
def test_rows_are_those_of_the_cpu(model, policy):
    expected, _ = swept(model, "cpu")
    with simulated(policy=policy):
        found, _ = swept(model, "cuda")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_gpu_never_holds_a_third_block(model, monkeypatch):
    """The next block is made once the GPU is through with the last but one, not once the host has
    queued it.
    """
    peaks, original = [], quantization.bitsandbytes_config

    def without_outliers(*arguments):  # the host waits for their number at every product
        config = original(*arguments)
        config.llm_int8_threshold = 0.0
        return config

    monkeypatch.setattr(quantization, "bitsandbytes_config", without_outliers)
    for waits in (True, False):
        if not waits:
            monkeypatch.setattr(block_loader._Slot, "arriving", _without_wait)
        held: list[int] = []
        with simulated(policy="lazy") as world:
            gpu = world.devices[0]

            def note(*_, gpu=gpu, held=held):  # with what is freed and still in use
                held.append(sum(pool.allocated for pool in gpu._pools.values()))
                return False

            gpu.fail = note
            _, block = swept(model, "cuda")
        peaks.append(max(held))
    assert 2 * block <= peaks[0]
    assert peaks[1] >= peaks[0] + 0.5 * block


@contextmanager
def _without_wait(slot):
    side = slot._sides.of(slot._device)
    with streams.use(side):
        yield
    slot._copied = streams.Mark(side)
