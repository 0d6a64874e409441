"""`ln_final.hook_out` is the model's own last hidden state; ESM's norm lies in its attention."""

import itertools

import pytest
import theloom
import torch
from support import build_tiny, stages, with_bytes
from theloom.errors import HookError
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.hooks.taps import Taps
from transformers import AutoModel, BertConfig, BertModel, EsmConfig, EsmModel

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
}


def scaled(model, folder):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim < 2 else 0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return with_bytes(folder)


def opt_with_projection(folder):
    return with_bytes(build_tiny("opt", folder, vocab_size=320, word_embed_proj_dim=32, ffn_dim=96))


MODELS = {
    "llama": lambda folder: with_bytes(build_tiny("llama", folder, vocab_size=320)),
    "gpt2": lambda folder: with_bytes(build_tiny("gpt2", folder, vocab_size=320)),
    "bert": lambda folder: scaled(BertModel(BertConfig(**SMALL)), folder),
    "opt with a projection": opt_with_projection,
    "esm": lambda folder: scaled(
        EsmModel(EsmConfig(**SMALL, pad_token_id=1, position_embedding_type="rotary")), folder
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_transformers_gives(tmp_path, name):
    folder = MODELS[name](tmp_path / "model")
    hooks = "memory.activation_cache_filter=[ln_final.hook_out,blocks.-1.hook_resid_post]"
    run = stages(
        tmp_path / "run", folder, f"{hooks} corpus.max_tokens=300 corpus.context_length=64"
    )
    acts = theloom.open(run.all().activations)
    plain = AutoModel.from_pretrained(folder).eval()
    for first, end in itertools.pairwise(acts.window_offset.tolist()):
        ids = torch.tensor([acts.input_ids.numpy(slice(first, end)).tolist()])
        with torch.no_grad():
            expected = plain(input_ids=ids).last_hidden_state[0]
        last = acts["ln_final.hook_out"][first:end]
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
    run.verify()


def test_layer_by_layer_it_is_the_same(tmp_path):
    folder = MODELS["llama"](tmp_path / "model")
    hooks = "memory.activation_cache_filter=[ln_final.*] corpus.max_tokens=300 extraction.shards=1"
    whole = stages(tmp_path / "whole", folder, hooks).all()
    swept = stages(tmp_path / "swept", folder, f"{hooks} extraction.execution=layerwise").all()
    expected, found = theloom.open(whole.activations), theloom.open(swept.activations)
    assert found.hooks == [f"ln_final.hook_{v}" for v in ("scale", "normalized", "out")]
    for hook in found.hooks:
        torch.testing.assert_close(found[hook][:], expected[hook][:], atol=1e-5, rtol=1e-5)
    swept.verify()


def test_layer_by_layer_it_is_refused_where_no_norm_gives_it(tmp_path):
    folder = opt_with_projection(tmp_path / "model")
    settings = "memory.activation_cache_filter=[ln_final.hook_out] corpus.max_tokens=200"
    run = stages(tmp_path / "run", folder, f"{settings} extraction.execution=layerwise")
    with pytest.raises(HookError, match="take the last block's hook_resid_post"):
        run.all()


def test_esm_has_the_norm_before_its_attention(tmp_path):
    model = AutoModel.from_pretrained(MODELS["esm"](tmp_path / "model")).eval()
    described = blocks.find_blocks(model)
    catalog = build_catalog(described)
    wanted = ["blocks.1.hook_resid_pre", "blocks.1.ln1.hook_normalized", "blocks.1.hook_resid_mid"]
    points = [p for p in catalog.points if p.name in wanted]
    assert [p.name for p in points] == wanted
    seen = {}
    ids = torch.arange(3, 23)[None]
    with (
        torch.no_grad(),
        Taps(described, points, lambda n, v: seen.__setitem__(n, v.clone())) as taps,
    ):
        taps.run(input_ids=ids, use_cache=False)
    attention = model.encoder.layer[1].attention
    norm = attention.LayerNorm
    expected = torch.nn.functional.layer_norm(seen[wanted[0]], (64,), eps=norm.eps)
    torch.testing.assert_close(seen[wanted[1]], expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        kept = []
        attention.register_forward_hook(lambda module, args, output: kept.append(output))
        model(input_ids=ids)
    middle = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    torch.testing.assert_close(seen[wanted[2]], middle, atol=1e-5, rtol=1e-5)
