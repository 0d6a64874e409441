"""A model run at another precision gives what it gives when it is loaded so; its own weights stay
as they are.
"""

import logging

import pytest
import torch
from support import allocator_peak, build_tiny
from theloom.devices import gpu
from theloom.errors import InputError, ModelError
from theloom.extraction.api import extract_hidden_states, extract_inference_optimized
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.arange(3, 23)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("requested", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_neox", "gemma3_text", "bloom", "opt", "qwen3_moe"]
)
def test_values_are_those_of_the_model_loaded_at_that_precision(tmp_path, model_type, requested):
    folder = build_tiny(model_type, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    found = extract_inference_optimized(model, IDS, precision=requested, hooks=[])
    expected = extract_hidden_states(
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[requested]).eval(), IDS, []
    )
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert (found.precision.requested, found.precision.resolved, found.precision.steps) == (
        requested,
        requested,
        (),
    )
    for name, parameter in model.named_parameters():
        assert id(parameter) == weights[name][0]
        assert torch.equal(parameter, weights[name][1])
        assert parameter.dtype == torch.float32


def test_a_16_bit_model_runs_in_fp32_and_on_the_cpu_auto_is_fp32(tmp_path):
    folder = build_tiny("llama", tmp_path)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found = extract_inference_optimized(half, IDS, precision="auto", layers=[-1])
    assert found.precision.resolved == "fp32"
    assert found["blocks.2.hook_resid_post"].dtype == torch.float32
    expected = extract_hidden_states(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float(), IDS
    )
    torch.testing.assert_close(
        found["blocks.2.hook_resid_post"], expected["blocks.2.hook_resid_post"]
    )
    assert half.dtype == torch.bfloat16
    own = extract_inference_optimized(half, IDS)
    assert own.precision is None
    assert own["blocks.0.hook_resid_post"].dtype == torch.bfloat16


def test_a_fallback_is_logged_and_recorded(tmp_path, monkeypatch, caplog):
    model = AutoModelForCausalLM.from_pretrained(build_tiny("llama", tmp_path)).eval()
    monkeypatch.setattr(gpu, "compute_capability", lambda device: (7, 5))
    with caplog.at_level(logging.WARNING):
        found = extract_inference_optimized(model, IDS, precision="bf16")
    assert found["blocks.2.hook_resid_post"].dtype == torch.float16
    assert (found.precision.requested, found.precision.resolved) == ("bf16", "fp16")
    assert "bf16 needs compute capability 8.0 or more" in found.precision.steps[0]
    assert found.precision.steps[0] in caplog.text
    monkeypatch.setattr(gpu, "compute_capability", lambda device: None)
    monkeypatch.setattr(gpu, "cpu_has_fp16", lambda: False)
    found = extract_inference_optimized(model, IDS, precision="fp16")
    assert found.precision.steps == ("fp16 is not available on this CPU: using fp32",)
    with pytest.raises(InputError, match="'int8' is not one of auto, fp32, fp16, bf16"):
        extract_inference_optimized(model, IDS, precision="int8")


def test_one_block_at_a_time_is_converted(tmp_path):
    numbers = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}
    model = AutoModelForCausalLM.from_pretrained(build_tiny("llama", tmp_path, **numbers)).eval()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = model.model.embed_tokens.weight.numel() + 128
    plain = allocator_peak(lambda: extract_hidden_states(model, IDS, layers=[-1]))
    cast = allocator_peak(lambda: extract_inference_optimized(model, IDS, [-1], "bf16"))
    assert 2 * (block + outside) <= cast <= plain + 2 * (block + outside) * 1.02


def test_quantised_weights_are_refused_another_precision(tmp_path):
    folder = build_tiny("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    with pytest.raises(ModelError, match="weights of this model are quantised"):
        extract_inference_optimized(model, IDS, precision="fp16")
    assert extract_inference_optimized(model, IDS)["blocks.2.hook_resid_post"].isfinite().all()


@pytest.mark.parametrize("requested", ["fp16", "bf16"])
def test_weights_that_transformers_keeps_in_fp32_stay_so(tmp_path, requested):
    numbers = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
    }
    folder = build_tiny("gpt_oss", tmp_path, **numbers)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[requested]).eval()
    assert loaded.model.layers[0].input_layernorm.weight.dtype == (
        torch.float32 if requested == "fp16" else DTYPES[requested]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, expected = (
        extract_inference_optimized(model, IDS, precision=requested),
        extract_hidden_states(loaded, IDS),
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
