"""Weights that are not those of the model by its config: refused in the first stage, by headers
alone; and those that are, whatever they are called and stored as.
"""

import pytest
import torch
import transformers
from model_folders import (
    change_weights,
    describe,
    errors_against_plain,
    llama,
    refusal,
    run,
    scaled,
)
from safetensors.torch import load_file
from support import a_config, byte_tokenizer
from theloom.model.files import prepare_files
from theloom.model.loading import load_model
from theloom.planning import estimate
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, Qwen2_5OmniThinkerForConditionalGeneration


@pytest.fixture
def source(tmp_path):
    return llama(tmp_path / "model")


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
    ],
)
def test_weights_of_other_types_without_a_quantisation_are_refused(tmp_path, source, stored, name):
    def quantise(weights):
        for key in [k for k in weights if "_proj" in k]:
            weights[key] = (10 * weights[key]).to(stored)

    change_weights(source, quantise)
    assert f"stores 21 weights as {name}" in refusal(tmp_path, source)


def test_pickled_weights_of_other_types_are_refused(tmp_path, source):
    pickled = AutoModelForCausalLM.from_pretrained(source).state_dict()
    pickled["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)
    (source / "model.safetensors").unlink()
    torch.save(pickled, source / "pytorch_model.bin")
    line = refusal(tmp_path, source, "model.allow_pickle=true")
    assert "stores 1 weights as int8 (model.layers.0.mlp.up_proj.weight)" in line


def test_weights_of_any_plain_float_are_taken(tmp_path, source):
    stored = [torch.float16, torch.bfloat16, torch.float64]

    def cast(weights):
        for number, (key, value) in enumerate(sorted(weights.items())):
            weights[key] = value.to(stored[number % 3])

    change_weights(source, cast)
    assert errors_against_plain(run(tmp_path, source).all(), source) < 1e-5


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.mlp.up_proj.weight",
        "model.extra.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_weights_that_are_left_over_are_refused(tmp_path, source, key):
    change_weights(source, lambda weights: weights.update({key: torch.ones(4)}))
    assert f"({key})" in refusal(tmp_path, source)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.embeddings.position_ids",
        "model.layers.0.self_attn.masked_bias",
        "mtp.layers.0.weight",
        "score.weight",
    ],
)
def test_weights_that_no_hook_point_reads_are_no_matter(tmp_path, source, key):
    change_weights(source, lambda weights: weights.update({key: torch.ones(4)}))
    made = run(tmp_path, source)
    estimate.run_estimate(made.config("estimate"), made.folder / "estimate.h5")


def test_blocks_that_predict_further_tokens_are_no_matter(tmp_path):
    source = llama(tmp_path / "model", num_hidden_layers=3)
    describe(source, num_hidden_layers=2, num_nextn_predict_layers=1)
    made = run(tmp_path, source)
    estimate.run_estimate(made.config("estimate"), made.folder / "estimate.h5")
    describe(source, num_nextn_predict_layers=None)
    assert "has 9 weights that have no place in LlamaModel" in refusal(tmp_path, source)


@pytest.mark.parametrize("execution", ["resident", "layerwise"])
def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path, execution):
    source = llama(tmp_path / "model", tie_word_embeddings=True)
    kept = llama(tmp_path / "kept", tie_word_embeddings=True)

    def rename(weights):
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    change_weights(source, rename)
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(
        plain.get_input_embeddings().weight,
        AutoModelForCausalLM.from_pretrained(kept).get_input_embeddings().weight,
    )
    made = run(tmp_path, source, f"extraction.execution={execution}").all()
    made.verify()
    assert errors_against_plain(made, kept) < 1e-5


def test_a_head_stands_for_no_embedding_that_files_have_elsewhere(tmp_path):
    """Qwen2.5-Omni's files have the embedding below other modules than its class; the default of
    its config for text alone says that they are tied.
    """
    config = tiny_config("qwen2_5_omni_thinker")
    model = scaled(Qwen2_5OmniThinkerForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    config = a_config(tmp_path / "model")
    loaded = load_model(config, prepare_files(config.model))
    embedding = loaded.architecture.model.get_input_embeddings()
    assert torch.equal(embedding.weight, stored["model.embed_tokens.weight"])


def test_a_head_stands_for_an_untied_embedding_nowhere(tmp_path):
    source = llama(tmp_path / "model", tie_word_embeddings=False)
    change_weights(source, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert "lacks 1 weights of LlamaModel (embed_tokens.weight" in refusal(tmp_path, source)


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("deepseek_v4", "DeepseekV4ForCausalLM"),  # `model.norm`, which is renamed with its prefix
        ("lighton_ocr", "LightOnOcrForConditionalGeneration"),  # no prefix is known for its class
    ],
)
def test_weights_whose_keys_have_one_part_more_are_those_of_the_class_with_a_head(
    tmp_path, kind, whole, caplog
):
    model = scaled(getattr(transformers, whole)(tiny_config(kind)))
    with torch.no_grad():
        for parameter in model.parameters():  # norms are ones at first, which would hide a lost one
            parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "model")
    plain = getattr(transformers, whole).from_pretrained(tmp_path / "model")
    config = a_config(tmp_path / "model")
    loaded = load_model(config, prepare_files(config.model)).architecture.model
    expected = plain.model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert "LOAD REPORT" not in caplog.text  # transformers' table of what was tried


def test_a_weight_that_no_other_part_explains_is_missing(tmp_path):
    model = scaled(transformers.DeepseekV4ForCausalLM(tiny_config("deepseek_v4")))
    model.save_pretrained(tmp_path / "model")
    change_weights(tmp_path / "model", lambda weights: weights.pop("model.norm.weight"))
    byte_tokenizer(tmp_path / "model")
    words = refusal(tmp_path, tmp_path / "model")
    assert "lacks 1 weights of DeepseekV4Model (norm.weight" in words
