"""Models whose rows depend on a document's length: through the stages, against transformers alone.

Every document's rows equal those of a model that has seen nothing else, whatever shares its batch,
with lengths at, around and far beyond each switch, in one pass and in chunks.
"""

import json
from functools import cache

import numpy as np
import pytest
import theloom
import torch
from support import build_tiny, plain_residuals, stages, with_bytes
from theloom.corpus.batching import plan_batches
from theloom.errors import InputError, ModelError
from theloom.extraction.api import (
    collect_streaming_results,
    extract_hidden_states,
    extract_streaming,
    extract_with_checkpointing,
)
from theloom.model.length_switches import LengthSwitch, length_switches, notable_lengths
from theloom.verification import choice
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

SWITCH = 64
LENGTHS = [1, 150, SWITCH, SWITCH + 1, 2, SWITCH - 1, 100, 200, 5, 66, 90]


def longrope(dim):
    return {
        "rope_type": "longrope",
        "short_factor": [1.0] * dim,
        "long_factor": [4.0 + i for i in range(dim)],
        "original_max_position_embeddings": SWITCH,
        "rope_theta": 10000.0,
    }


def dynamic():
    return {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH_LENGTHS = {"max_position_embeddings": 256, "original_max_position_embeddings": SWITCH}
PER_LAYER = {
    "rope_parameters": {
        "full_attention": dynamic(),
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "layer_types": ["sliding_attention", "full_attention"],
}
MODELS = {
    "phi3": {"rope_parameters": longrope(8), **BOTH_LENGTHS, **SPECIAL},
    "phimoe": {
        "rope_parameters": longrope(8) | {"short_mscale": 1.1, "long_mscale": 1.4},
        "num_local_experts": 4,
        **BOTH_LENGTHS,
        **SPECIAL,
    },
    "llama": {"rope_parameters": dynamic(), "max_position_embeddings": SWITCH},
    "gpt_neox": {
        "rope_parameters": dynamic() | {"partial_rotary_factor": 0.5},
        "max_position_embeddings": SWITCH,
    },
    "gemma3_text": {"max_position_embeddings": SWITCH, **PER_LAYER},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


def tiny(name, folder):
    """A model of two blocks: both attend over positions that change with the length."""
    small = {"vocab_size": 320, "num_hidden_layers": 2}
    return with_bytes(build_tiny(name, folder, **small, **MODELS[name]))


@cache
def alone(model, ids):
    """Every residual of a document by a model that has run nothing else."""
    return plain_residuals(model, list(ids))


def corpus_of(folder, lengths):
    path = folder / "texts.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(letters[(n * 7 + i * i) % 26] for i in range(n)) for n in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_of(folder, model, lengths, overrides=""):
    path = corpus_of(folder, lengths)
    settings = f"corpus=text corpus.path={path} corpus.context_length=256 corpus.max_tokens=20000"
    return stages(folder / "run", model, f"{settings} extraction.batch_tokens=1024 {overrides}")


def errors(acts, model):
    """The largest error of each document against it alone."""
    found = {}
    for document, name in enumerate(acts.documents):
        rows = acts.document(document)
        expected = alone(model, tuple(map(int, rows.input_ids)))
        found[name] = max(
            float((rows[hook] - value).abs().max() / value.abs().max())
            for hook, value in expected.items()
            if hook in acts.hooks
        )
    return found


@pytest.mark.parametrize("chunk", [512, 32], ids=["one pass", "chunks"])
def test_rows_are_those_of_the_document_at_its_own_length(tmp_path, model, chunk):
    run = run_of(tmp_path, model, LENGTHS, f"memory.streaming_chunk_size={chunk}").all()
    acts = theloom.open(run.activations)
    assert np.diff(acts.window_offset).tolist() == LENGTHS
    found = errors(acts, model)
    assert max(found.values()) < 1e-5, found
    run.verify()


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_layer_by_layer_they_are_too(tmp_path, name):
    model = tiny(name, tmp_path / "model")
    layerwise = "extraction.execution=layerwise memory.streaming_chunk_size=32"
    run = run_of(tmp_path, model, LENGTHS, layerwise).all()
    found = errors(theloom.open(run.activations), model)
    assert max(found.values()) < 1e-5, found
    run.verify()


def test_the_functions_give_each_row_its_own_length(model):
    ids = [[5 + i % 90 for i in range(n)] for n in (150, 64, 100, 30)]
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    hook = "blocks.1.hook_resid_post"
    states = extract_hidden_states(loaded, ids, hooks=[hook])
    for row, tokens in enumerate(ids):
        expected = alone(model, tuple(tokens))[hook]
        torch.testing.assert_close(states[hook][row, : len(tokens)], expected, atol=1e-5, rtol=0)
        chunks = extract_streaming(loaded, tokens, chunk_size=32, hooks=[hook])
        streamed = collect_streaming_results(chunks)
        torch.testing.assert_close(streamed[hook][0], expected, atol=1e-5, rtol=0)
    for function in (extract_streaming, extract_with_checkpointing):
        with pytest.raises(InputError, match="computes rows of more than 64 tokens otherwise"):
            function(loaded, ids)


def test_a_longer_pass_between_two_chunks_changes_nothing(model):
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    hook, tokens = "blocks.1.hook_resid_post", [5 + i % 90 for i in range(100)]
    chunks = []
    for chunk in extract_streaming(loaded, tokens, chunk_size=32, hooks=[hook]):
        chunks.append(chunk[hook][0])
        with torch.no_grad():
            loaded(torch.arange(200)[None])
    expected = alone(model, tuple(tokens))[hook]
    torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-5, rtol=0)


def test_a_batch_never_mixes_the_sides_of_a_switch():
    once, every = LengthSwitch("longrope", 64, False), LengthSwitch("dynamic", 64, True)
    lengths = np.array([66, 64, 65, 63, 66])
    assert [b.lengths for b in plan_batches(lengths, 999, 512, 1, [once])] == [
        (66, 66, 65),
        (64, 63),
    ]
    assert [b.lengths for b in plan_batches(lengths, 999, 512, 1, [every])] == [
        (66, 66),
        (65,),
        (64, 63),
    ]


def test_switches_are_found_in_old_and_new_configs():
    longest = LlamaConfig(max_position_embeddings=64)
    assert length_switches(longest) == ()
    longest.rope_scaling = {"type": "dynamic", "factor": 2.0}
    assert length_switches(longest) == (LengthSwitch("dynamic", 64, True),)
    qwen = LlamaConfig(max_position_embeddings=2048, use_dynamic_ntk=True)
    assert length_switches(qwen) == (LengthSwitch("use_dynamic_ntk", 2048, True),)
    sparse = AutoConfig.for_model("big_bird", block_size=4, num_random_blocks=1)
    assert length_switches(sparse) == (LengthSwitch("block_sparse", 28, True),)
    assert notable_lengths(MistralConfig(sliding_window=16)) == (16, 131072)


def test_a_model_that_cannot_be_told_a_length_goes_in_one_pass(tmp_path, monkeypatch, caplog):
    """As a model with code of its own, whose rotary module takes no positions."""
    from theloom.model import checks

    model = tiny("llama", tmp_path / "model")
    monkeypatch.setattr(checks, "rotary_modules", lambda model: [])
    chunked = "memory.streaming_chunk_size=32"
    run = run_of(tmp_path, model, [150, 60, 40], f"{chunked} extraction.shards=1").all()
    assert "documents of more than 64 tokens otherwise (dynamic)" in caplog.text
    acts = theloom.open(run.activations)
    assert acts.attributes["chunk_size"] == "[150]"
    assert max(errors(acts, model).values()) < 1e-5


def test_verification_looks_at_both_sides_of_a_switch(tmp_path):
    model = tiny("phi3", tmp_path / "model")
    lengths = [7] * 40 + [200, 61, 66, 64, 30, 12]
    run = run_of(tmp_path, model, lengths, "memory.streaming_chunk_size=128").all()
    acts = theloom.open(run.activations)
    tokens = np.diff(acts.window_offset)
    chosen = tokens[choice.choose_windows(acts, 8, 0, (64, 256))].tolist()
    assert {200, 64, 66, 7} <= set(chosen), chosen
    batches = [b for b, _ in choice.batches_of(acts)]
    assert sorted(w for b in batches for w in b.windows) == list(range(len(tokens)))
    assert not any(min(b.lengths) <= 64 < max(b.lengths) for b in batches)


def test_rows_that_depend_on_the_batch_stop_the_job(tmp_path, monkeypatch):
    """A switch that no config names: the trial of 24 tokens does not see it, the run does."""
    from transformers.models.llama import modeling_llama

    model = with_bytes(build_tiny("llama", tmp_path / "model", vocab_size=320))
    forward = modeling_llama.LlamaRotaryEmbedding.forward

    def other_beyond_40(self, x, position_ids):
        far = position_ids.shape[-1] > 40
        return forward(self, x, position_ids * 2 if far else position_ids)

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", other_beyond_40)
    run = run_of(tmp_path, model, [50, 30, 48, 35], "memory.streaming_chunk_size=128")
    run.prepare()
    with pytest.raises(ModelError, match="from the document alone: this model's rows depend on"):
        run.extract()
    assert not run.shards
