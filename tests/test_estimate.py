"""The estimate against what real models, caches and files take."""

import numpy as np
import pytest
import theloom
import torch
from support import ROOT, TINY, a_config, build_tiny, stages
from theloom import config, estimate, model, source
from theloom.errors import MemoryPlanError
from theloom.estimate import Components
from transformers import AutoModelForCausalLM, DynamicCache


def of_profile(profile: str) -> tuple[config.Run, estimate.Estimate]:
    (run,) = config.runs(ROOT / "config", profile).values()
    typed = config.typed(run.config)
    return run, estimate.estimate(typed, estimate.config_of(typed.model.architecture))


@pytest.mark.parametrize("profile", ["smollm2-135m", "3b", "7b", "13b", "30b", "70b"])
def test_weights_of_every_profile_are_its_public_parameter_count(profile):
    run, found = of_profile(profile)
    numbers = run.config["model"]["architecture"]
    head = 0 if numbers["tie_word_embeddings"] else numbers["vocab_size"] * numbers["hidden_size"]
    assert found.components["bf16"].weights == 2 * (numbers["parameters"] - head)  # the LM head is not loaded
    assert found.components["fp32"].weights == 2 * found.components["bf16"].weights
    assert found.components["int4"].weights < found.components["int8"].weights < found.components["fp16"].weights


def test_a_multi_head_7b_needs_a_gigabyte_of_keys_and_values_for_2048_tokens():
    (run,) = config.runs(ROOT / "config", "7b", "corpus.context_length=2048").values()
    typed = config.typed(run.config)
    llama_2 = estimate.config_of(typed.model.architecture)
    llama_2.num_key_value_heads = 32
    assert estimate.estimate(typed, llama_2).components["fp16"].kv_cache == 1_073_741_824


@pytest.mark.parametrize("model_type", [t for t in TINY if t != "qwen3_moe"])
def test_weights_cache_and_captures_are_those_of_the_real_model(tmp_path, model_type):
    folder = build_tiny(model_type, tmp_path)
    asked = "memory.activation_cache_filter=[blocks.*.hook_resid_post] memory.streaming_chunk_size=32"
    settings = a_config(folder, f"{asked} corpus.context_length=96 extraction.batch_tokens=64")
    found = estimate.estimate(settings, model.hf_config(settings.model)).components["fp32"]
    loaded = model.load(settings, source.prepare(settings.model))
    real = loaded.architecture.model
    assert found.weights == sum(p.numel() * p.element_size() for p in real.parameters())
    captured = model.residuals(loaded, torch.zeros(2, 32, dtype=torch.int64), 32)
    assert found.captured == sum(t.numel() * 4 for t in captured.values())
    if "sliding_window" not in TINY[model_type]:  # windows hold less: the estimate is an upper bound for them
        cache = DynamicCache(config=real.config)
        with torch.no_grad():
            real(torch.zeros(1, 96, dtype=torch.int64), past_key_values=cache, use_cache=True)
        assert found.kv_cache == sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))


def test_smollm2_is_estimated_from_its_numbers_as_it_is_loaded(smollm2):
    _, found = of_profile("smollm2-135m")
    real = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    assert found.components["fp32"].weights == sum(p.numel() * 4 for p in real.model.parameters())
    assert found.hooks == [f"blocks.{i}.hook_resid_post" for i in (5, 15, 29)]
    assert found.disk_bytes("fp32") == 16384 * (3 * 576 * 4 + 12)


def test_the_disk_of_a_run_is_what_its_shards_take(tmp_path, tiny_llama):
    run = stages(tmp_path, tiny_llama, "corpus.max_tokens=20000").all()
    needed = estimate.read(run.folder / "estimate.h5").disk_bytes("fp32")
    taken = sum(s.stat().st_size for s in run.shards)
    assert needed <= taken <= 1.02 * needed
    assert len(theloom.open(run.activations)) == 20000


def test_an_estimate_survives_its_file(tmp_path):
    run, found = of_profile("3b")
    estimate.write(found, config.typed(run.config), tmp_path / "estimate.h5")
    assert estimate.read(tmp_path / "estimate.h5") == found


def test_a_run_without_a_token_limit_has_no_disk_figure():
    (run,) = config.runs(ROOT / "config", "3b", "corpus.max_tokens=null").values()
    typed = config.typed(run.config)
    found = estimate.estimate(typed, estimate.config_of(typed.model.architecture))
    assert found.rows is None
    assert found.disk_bytes("bf16") is None


def test_memory_beyond_the_device_is_refused_and_beyond_the_threshold_is_said(caplog):
    needed = Components(weights=8 * 10**9, kv_cache=10**9, captured=0, working_set=0)
    with pytest.raises(MemoryPlanError, match=r"needs 9\.00 GB \(weights 8\.00, kv cache 1\.00"):
        estimate.check_memory(needed, 12 * 10**9, 8 * 10**9, "cuda:0", 0.85)
    estimate.check_memory(needed, 12 * 10**9, 12 * 10**9, "cuda:0", 0.85)
    assert not caplog.records
    estimate.check_memory(needed, 10 * 10**9, 10 * 10**9, "cuda:0", 0.85)
    assert "more than 85%" in caplog.text


def test_the_forward_of_a_plan_is_the_largest_batch_that_batching_makes():
    from theloom.batching import plan_batches

    for batch_tokens, chunk in ((2048, 512), (100, 512), (1000, 300)):
        plan = estimate.Plan(batch_tokens, chunk, context_length=4096, shards=1)
        lengths = np.random.default_rng(0).integers(1, 2000, 500)
        largest = max(len(b.windows) * min(b.width, chunk) for b in plan_batches(lengths, batch_tokens, chunk))
        assert largest <= max(plan.forward_tokens, batch_tokens)
