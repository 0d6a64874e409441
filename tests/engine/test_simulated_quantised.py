"""8 and 4 bits on a simulated GPU: bitsandbytes' own code with kernels of the CPU.

Rows in 8 bits are those of the CPU. In 4 bits they are those of a model in FP32 whose weights are
what bitsandbytes makes of NF4: on a CPU with AVX512-BF16 its products of 4 bits are in BF16.
"""

import fnmatch
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional  # before the simulation, which stands in for a part of it
from safetensors.torch import load_file, save_file
from simulated_cuda import simulated
from simulated_runs import build, cpu_rows, difference, prepare
from support import a_config
from theloom.devices import accelerator, streams
from theloom.engine.layerwise import block_loader
from theloom.engine.layerwise.model import opened
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.model import quantization
from theloom.model.files import prepare_files

TOKENS = 4
PROJECTIONS = "*_proj.weight"  # what is quantised of a Llama


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


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of widths that bitsandbytes takes in 4 bits."""
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2}
    return build(tmp_path_factory.mktemp("narrow"), **sizes)


def in_nf4_and_back(model: Path, folder: Path) -> Path:
    """The same model, with the weights that its 4 bits stand for."""
    shutil.copytree(model.parent, folder)
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    for name in fnmatch.filter(weights, PROJECTIONS):
        quantised, state = functional.quantize_4bit(weights[name], quant_type="nf4")
        weights[name] = functional.dequantize_4bit(quantised, state)
    save_file(weights, file, {"format": "pt"})
    return folder / "model"


@pytest.mark.parametrize("execution", ["resident", "layerwise"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_extracted_rows_are_those_of_the_weights_that_the_bits_stand_for(
    narrow, tmp_path, bits, execution
):
    options = f"memory.quantization={bits} extraction.execution={execution}"
    if bits == "8bit":
        expected = cpu_rows(tmp_path / "cpu", narrow, f"memory.quantization={bits}")
    else:
        expected = cpu_rows(tmp_path / "cpu", in_nf4_and_back(narrow, tmp_path / "plain"))
    run = prepare(tmp_path / "run", narrow, options, gpus=1)
    assert difference(run.again(tmp_path / "rows").rows(policy="random"), expected) <= 1e-5
