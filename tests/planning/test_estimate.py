"""The estimate against what real models, caches and files take."""

import pytest
import theloom
import torch
from support import ROOT, TINY, a_config, build_tiny, stages
from theloom.config import compose, frozen
from theloom.model import loading
from theloom.model.files import prepare_files
from theloom.model.forward import forward_residuals
from theloom.planning import estimate
from theloom.planning.estimates import estimate_file, run_models
from transformers import AutoModelForCausalLM, DynamicCache


def of_profile(profile: str, overrides: str = "") -> tuple[compose.Run, estimate_file.Estimate]:
    (run,) = compose.runs(ROOT / "config", profile, overrides).values()
    typed = frozen.to_config(run.config)
    return run, estimate.estimate(typed, run_models.estimator_of(typed))


@pytest.mark.parametrize("profile", ["smollm2-135m", "3b", "7b", "13b", "30b", "70b"])
def test_weights_of_every_profile_are_its_public_parameter_count(profile):
    run, found = of_profile(profile)
    numbers = run.config["model"]["architecture"]
    head = 0 if numbers["tie_word_embeddings"] else numbers["vocab_size"] * numbers["hidden_size"]
    rotary = 4 * (numbers["head_dim"] or numbers["hidden_size"] // numbers["num_attention_heads"])
    left_out = head + numbers["hidden_size"]  # the LM head and the final norm are not loaded
    assert found.weights["bf16"] == 2 * (numbers["parameters"] - left_out) + rotary
    assert found.weights["fp32"] - rotary == 2 * (found.weights["bf16"] - rotary)
    assert found.weights["int4"] < found.weights["int8"] < found.weights["fp16"]
    assert found.load_peak["int4"] > found.weights["int4"]


def test_a_multi_head_7b_has_a_gigabyte_of_keys_and_values_at_2048_tokens():
    (run,) = compose.runs(ROOT / "config", "7b", "corpus.context_length=2048").values()
    settings = frozen.to_config(
        run.config | {"model": run.config["model"] | {"architecture": LLAMA_2_7B}}
    )
    found = estimate.estimate(settings, run_models.estimator_of(settings))
    assert found.find("fp16", 2048, 1024).kv_cache == 1_073_741_824


LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "parameters": 6738415616,
}


@pytest.mark.parametrize("model_type", [t for t in TINY if t != "qwen3_moe"])
def test_weights_cache_and_captures_are_those_of_the_real_model(tmp_path, model_type):
    folder = build_tiny(model_type, tmp_path)
    requested = (
        "memory.activation_cache_filter=[blocks.*.hook_resid_post] memory.streaming_chunk_size=32"
    )
    settings = a_config(folder, f"{requested} corpus.context_length=96 extraction.batch_tokens=64")
    found = estimate.estimate(settings, run_models.estimator_of(settings))
    files = prepare_files(settings.model)
    loaded = loading.load_model(settings, files)
    real = loaded.architecture.model
    part = loading.load_model(
        settings, files, loaded.catalog.select(["blocks.*.hook_resid_post"])
    ).architecture.model
    held = {
        t.data_ptr(): t.numel() * t.element_size() for t in [*part.parameters(), *part.buffers()]
    }
    assert found.weights["fp32"] == pytest.approx(sum(held.values()), rel=1e-3)
    captured = forward_residuals(loaded.architecture, torch.zeros(2, 32, dtype=torch.int64), 32)
    assert found.row_bytes["fp32"] * 64 == sum(t.numel() * 4 for t in captured.values())
    catalog = loaded.catalog
    traced = run_models.estimator_of(settings, trace=True).catalog()
    assert traced == run_models.estimator_of(settings).catalog() == catalog
    if "sliding_window" not in TINY[model_type]:
        cache = DynamicCache(config=real.config)
        with torch.no_grad():
            real(torch.zeros(1, 96, dtype=torch.int64), past_key_values=cache, use_cache=True)
        taken = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
        assert found.find("fp32", 96, 32).kv_cache == taken


def test_smollm2_is_estimated_from_its_dimensions_as_it_is_loaded(smollm2):
    _, found = of_profile("smollm2-135m")
    real = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    held = [*real.model.parameters(), *real.model.buffers()]
    assert (
        found.weights["fp32"]
        == sum(p.numel() * 4 for p in held) - 4 * real.model.norm.weight.numel()
    )
    assert found.hooks == [f"blocks.{i}.hook_resid_post" for i in (5, 15, 29)]
    statistics = 2 * 3 * 576 * 24  # of two shards
    assert found.disk_bytes("fp32") == 16384 * (3 * 576 * 4 + 12 + 9) + statistics


def test_the_closed_form_and_the_trace_give_the_same_estimate():
    hooks = "memory.activation_cache_filter=[blocks.5.hook_resid_post,blocks.7.hook_resid_post]"
    requested = f"corpus.context_length=1500 {hooks}"
    (run,) = compose.runs(ROOT / "config", "smollm2-135m", requested).values()
    eight = run.config["model"]["architecture"] | {"num_hidden_layers": 8}  # a trace runs each
    settings = frozen.to_config(
        run.config | {"model": run.config["model"] | {"architecture": eight}}
    )
    formula = estimate.estimate(settings, run_models.estimator_of(settings), "cuda")
    traced = estimate.estimate(settings, run_models.estimator_of(settings, trace=True), "cuda")
    assert formula.weights == traced.weights
    for kind, passes in formula.passes.items():
        for one, other in zip(passes, traced.passes[kind], strict=True):
            assert one.parts.total == pytest.approx(other.parts.total, rel=1e-3)


def test_the_disk_of_a_run_is_what_its_shards_take(tmp_path, tiny_llama):
    run = stages(tmp_path, tiny_llama, "corpus.max_tokens=20000").all()
    needed = estimate_file.read(run.folder / "estimate.h5").disk_bytes("fp32")
    taken = sum(s.stat().st_size for s in run.shards)
    assert needed <= taken <= 1.02 * needed
    assert len(theloom.open(run.activations)) == 20000


def test_an_estimate_survives_its_file(tmp_path):
    run, found = of_profile("3b")
    estimate_file.write(found, frozen.to_config(run.config), tmp_path / "estimate.h5")
    assert estimate_file.read(tmp_path / "estimate.h5") == found


def test_a_run_without_a_token_limit_has_no_disk_size():
    _, found = of_profile("3b", "corpus.max_tokens=null")
    assert found.rows is None
    assert found.disk_bytes("bf16") is None
