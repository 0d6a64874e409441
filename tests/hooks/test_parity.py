"""Hook points against TransformerLens' TransformerBridge on an eager model, and against the models'
own modules.

Where the Bridge is off the model's own values say so: its scores of OPT are the pattern, and it
does not take Falcon's grouped queries.
"""

import functools

import pytest
import torch
from support import TINY, build_tiny, chunks_of, values_of
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.hooks.points import IN_BLOCK, PATTERN, SCORES
from transformers import AutoModelForCausalLM, AutoTokenizer

BRIDGED = [t for t in TINY if t not in ("falcon", "qwen3_moe")]
IDS = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(0))


def bridge_values(folder, tokenizer, ids):
    from transformer_lens.model_bridge import TransformerBridge

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer)
    with torch.no_grad():
        return dict(bridge.run_with_cache(ids)[1].items())


def error(found, expected) -> float:
    """The largest difference as a share of the largest value; masked scores are -inf here and very
    small there.
    """
    assert found.numel() == expected.numel(), (found.shape, expected.shape)
    expected = expected.reshape(found.shape)
    masked = found.isneginf()
    assert (expected[masked] < -1e4).all()
    found, expected = found[~masked], expected[~masked]
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2.folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of each tiny model, built once."""
    return functools.cache(
        lambda model_type: build_tiny(model_type, tmp_path_factory.mktemp(model_type))
    )


@pytest.fixture(scope="module")
def eager(folder_of):
    """Each tiny model with eager attention, loaded once; its catalog is found once with it."""

    def load(model_type):
        model = AutoModelForCausalLM.from_pretrained(
            folder_of(model_type), attn_implementation="eager"
        ).eval()
        return blocks.find_blocks(model)

    return functools.cache(load)


@pytest.fixture(scope="module")
def smollm2_values(smollm2, tokenizer):
    """A sentence, and what the Bridge makes of it."""
    ids = tokenizer(
        "Weaving is a method of textile production in which two sets of yarns are interlaced."
    ).input_ids
    ids = torch.tensor(ids)[None]
    return ids, bridge_values(smollm2.folder, tokenizer, ids)


@pytest.mark.parametrize("model_type", BRIDGED)
def test_every_hook_point_of_both_is_equal(folder_of, eager, tokenizer, model_type):
    expected = bridge_values(folder_of(model_type), tokenizer, IDS)
    described = eager(model_type)
    found = values_of(described, IDS)
    if model_type == "opt":
        for block in range(3):
            assert torch.equal(
                expected.pop(f"blocks.{block}.{SCORES}"), expected[f"blocks.{block}.{PATTERN}"]
            )
    far = {n: error(v, expected[n]) for n, v in found.items() if n in expected}
    assert len(far) > 45
    assert max(far.values()) <= 1e-5, max(far, key=far.get)
    lacking = {n for n in expected if n.partition(".")[2].partition(".")[2] in IN_BLOCK} - set(
        found
    )
    assert lacking == set()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_hook_point_of_smollm2_is_equal(smollm2, smollm2_values, attention):
    ids, expected = smollm2_values
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.folder, attn_implementation=attention
    ).eval()
    found = values_of(blocks.find_blocks(model), ids)
    assert len(found) == 30 * 20 + 4
    last = found.pop("ln_final.hook_out")  # of transformers' own, not of TransformerLens' names
    with torch.no_grad():
        assert error(last, model.model(ids).last_hidden_state) <= 1e-5
    far = {name: error(value, expected[name]) for name, value in found.items()}
    assert max(far.values()) <= 1e-5, max(far, key=far.get)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_and_patterns_belong_to_what_the_model_computes(folder_of, model_type, attention):
    """softmax(scores) is the pattern, the pattern of the values is z; fused and eager attention
    give the same.
    """
    folder = folder_of(model_type)
    if attention == "sdpa" and model_type == "gemma2":
        attention = "eager"  # its capped scores are beyond the fused kernel
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    except ValueError:  # BLOOM
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    described = blocks.find_blocks(model)
    if model_type == "falcon" and attention == "sdpa":
        assert "eager" in build_catalog(described).unsupported["blocks.1.attn.hook_pattern"]
        return
    found = values_of(described, IDS)
    for block in range(3):
        scores, pattern, z, v = (
            found[f"blocks.{block}.attn.hook_{n}"] for n in ("attn_scores", "pattern", "z", "v")
        )
        torch.testing.assert_close(scores.softmax(-1), pattern)
        heads = pattern.shape[1] // v.shape[2]
        v = v.transpose(1, 2).repeat_interleave(heads, dim=1)
        torch.testing.assert_close((pattern @ v).transpose(1, 2), z, rtol=1e-4, atol=1e-5)
        assert (pattern[..., 0, 1:] == 0).all()
        assert scores[..., 0, 1:].isneginf().all()


def test_falcon_s_grouped_projection_is_split_as_the_model_splits_it(tmp_path):
    old = {"new_decoder_architecture": False}
    for numbers in (
        {},
        old | {"multi_query": True},
        old | {"multi_query": False, "num_kv_heads": 4},
    ):
        folder = build_tiny("falcon", tmp_path / str(numbers), **numbers)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        found = values_of(blocks.find_blocks(model), IDS)
        attn = model.transformer.h[1].self_attention
        kept = []
        attn.query_key_value.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        with torch.no_grad():
            model(IDS)
        for name, theirs in zip("qkv", attn._split_heads(kept[0]), strict=True):
            ours = found[f"blocks.1.attn.hook_{name}"]
            assert torch.equal(
                ours.repeat_interleave(theirs.shape[2] // ours.shape[2], dim=2), theirs
            )


@pytest.mark.parametrize("model_type", TINY)
def test_values_add_up_to_the_residual_stream(eager, model_type):
    found = values_of(eager(model_type), IDS)
    for block in range(3):
        at = {
            n: found.get(f"blocks.{block}.hook_{n}")
            for n in ("resid_pre", "resid_mid", "resid_post")
        }
        attn, mlp = (found[f"blocks.{block}.hook_{n}_out"] for n in ("attn", "mlp"))
        if at["resid_mid"] is not None:
            torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + attn)
        torch.testing.assert_close(
            at["resid_post"], at["resid_pre"] + attn + mlp, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 50])
@pytest.mark.parametrize("model_type", TINY)
def test_chunks_give_the_values_of_one_pass(eager, model_type, chunk_size):
    described = eager(model_type)
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    whole, chunked = values_of(described, ids), chunks_of(described, ids, chunk_size)
    assert set(whole) == set(chunked)
    far = {
        name: error(chunked[name], value.masked_fill(value.isneginf(), -1e30))
        for name, value in whole.items()
    }
    assert max(far.values()) <= 1e-5, max(far, key=far.get)
