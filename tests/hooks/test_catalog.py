"""What models have and have not, refused with the reason; the model is left as it was; every hook
point on disk.
"""

import numpy as np
import pytest
import theloom
import torch
from support import allocator_peak, build_tiny, stages, values_of, with_bytes
from theloom.config import model_dims
from theloom.errors import HookError
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.hooks.points import PATTERN, SCORES, llama_catalog
from theloom.hooks.taps import Taps
from theloom.memory import trace
from theloom.memory.closed_form import covers
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model import fake
from tiny_configs import tiny_config
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

IDS = torch.arange(3, 23)[None]


def tiny(folder, model_type="llama", attention=None, **numbers):
    folder = build_tiny(model_type, folder, **numbers)
    return blocks.find_blocks(
        AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_the_catalog_of_a_llama_follows_from_its_numbers(tmp_path, model_type):
    described = tiny(
        tmp_path, model_type, **({"sliding_window": None} if model_type == "mistral" else {})
    )
    size = model_dims.numbers(described.model.config)
    assert covers(size)
    assert llama_catalog(size) == build_catalog(described)
    assert fake.fake_model(described.model.config, "bf16").catalog == build_catalog(described)


@pytest.mark.parametrize(
    ("model_type", "entry", "reason"),
    [
        ("gpt_neox", "blocks.1.hook_resid_mid", "run in parallel"),
        ("phi", "blocks.-1.ln2.hook_scale", "share one norm"),
        ("olmo2", "blocks.*.ln1.*", "no norm comes before its attention"),
        ("gpt2", "blocks.0.mlp.hook_pre_linear", "no gate"),
        ("gpt2", "blocks.0.attn.hook_rot_q", "not rotary"),
        ("llama", "hook_pos_embed", "no learned positions"),
        ("qwen3_moe", "blocks.2.mlp.hook_post", "experts"),
        ("falcon", "blocks.0.attn.hook_pattern", "attention=eager"),
        ("recurrent_gemma", "blocks.0.attn.hook_z", "no attention"),
    ],
)
def test_what_an_architecture_has_not_is_refused_with_the_reason(
    tmp_path, model_type, entry, reason
):
    small = {"lru_width": 64, "attention_window_size": 8} if model_type == "recurrent_gemma" else {}
    found = build_catalog(tiny(tmp_path, model_type, **small))
    with pytest.raises(HookError, match=rf"{entry.replace('*', '.')}.*{reason}".replace("-", ".")):
        found.select([entry])
    assert found.select(["blocks.1.hook_resid_post"])


def test_an_encoder_has_what_makes_sense_there(tmp_path):
    small = BertConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = BertModel(small).eval()
    described = blocks.find_blocks(model)
    found = build_catalog(described)
    assert {p.value for p in found.points} == {
        *(
            "hook_embed",
            "hook_pos_embed",
            "hook_resid_pre",
            "attn.hook_q",
            "attn.hook_k",
            "attn.hook_v",
        ),
        *(SCORES, PATTERN, "attn.hook_z", "hook_attn_out", "mlp.hook_pre", "mlp.hook_post"),
        *("hook_mlp_out", "hook_resid_post", "ln_final.hook_out"),
    }
    mask = (torch.arange(20) < 13).long()[None]
    values = values_of(described, IDS, attention_mask=mask)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask, output_hidden_states=True).hidden_states
        alone = values_of(described, IDS[:, :13])
    for block in range(3):
        torch.testing.assert_close(values[f"blocks.{block}.hook_resid_post"], expected[block + 1])
        layer = model.encoder.layer[block]
        mid = layer.attention.output.LayerNorm(
            expected[block] + values[f"blocks.{block}.hook_attn_out"]
        )
        post = layer.output.LayerNorm(mid + values[f"blocks.{block}.hook_mlp_out"])
        torch.testing.assert_close(post, expected[block + 1])
        pattern = values[f"blocks.{block}.attn.hook_pattern"]
        assert (pattern[..., 13:] == 0).all()
        torch.testing.assert_close(
            pattern[:, :, :13, :13], alone[f"blocks.{block}.attn.hook_pattern"]
        )


def test_the_model_is_left_as_it_was(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_tiny("llama", tmp_path)).train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    configs = [m.self_attn.config for m in model.model.layers]
    described = blocks.find_blocks(model)
    before = torch.get_rng_state()
    points = build_catalog(described).points

    def fail(name, value):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Taps(described, points, fail) as taps:
        taps.run(input_ids=IDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )
    assert all(m.self_attn.config is c for m, c in zip(model.model.layers, configs, strict=True))
    assert model.config._attn_implementation == "sdpa"


def test_modules_that_were_replaced_are_found_anew(tmp_path):
    described = tiny(tmp_path)
    before = values_of(described, IDS)
    old = described.blocks[1].mlp.down_proj
    described.blocks[1].mlp.down_proj = torch.nn.Sequential(old)
    again = values_of(described, IDS)
    torch.testing.assert_close(again, before)


def test_a_pattern_of_one_block_leaves_the_others_their_fused_attention(tmp_path, monkeypatch):
    described = tiny(tmp_path)
    plain = values_of(described, IDS)
    fused = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: fused.append(1) or attention(*a, **k),
    )
    seen = {}
    points = build_catalog(described).select(
        ["blocks.1.attn.hook_pattern", "blocks.*.attn.hook_rot_k", "blocks.2.hook_*"]
    )
    with torch.no_grad(), Taps(described, points, seen.__setitem__) as taps:
        taps.run(input_ids=IDS)
    assert len(fused) == 2
    torch.testing.assert_close(seen["blocks.2.attn.hook_rot_k"], plain["blocks.2.attn.hook_rot_k"])
    torch.testing.assert_close(
        seen["blocks.1.attn.hook_pattern"], plain["blocks.1.attn.hook_pattern"]
    )
    one, none = (
        trace.run(described, torch.zeros(1, 512, dtype=torch.int64), Workload(1, 512, 512), chosen)[
            0
        ].total
        for chosen in (points, points[-1:])
    )
    assert one - none > 4 * 512 * 512 * 4  # scores of four heads, at least once


def test_the_pattern_of_one_block_takes_the_scores_of_one_block(tmp_path):
    """Real memory: at 1024 tokens, eager attention in one block of six is a sixth of the patterns
    of all, when held.
    """
    described = tiny(tmp_path, num_hidden_layers=6, max_position_embeddings=1024)
    ids, scores = (
        torch.arange(1024)[None] % 128,
        4 * 1024 * 1024 * 4,
    )  # heads × queries × keys × bytes

    def peak(*filters):
        def work():
            held = []
            points = build_catalog(described).select(filters)
            with (
                torch.inference_mode(),
                Taps(described, points, lambda name, value: held.append(value)) as taps,
            ):
                taps.run(input_ids=ids, use_cache=False)

        return allocator_peak(work)

    none = peak("blocks.5.hook_resid_post")
    one = peak("blocks.3.attn.hook_pattern", "blocks.5.hook_resid_post")
    every = peak("blocks.*.attn.hook_pattern", "blocks.5.hook_resid_post")
    assert scores <= one - none <= 4.5 * scores
    assert every - one == pytest.approx(5 * scores, rel=0.5)
    assert none < scores  # the fused kernel never has them


def test_a_hook_point_that_a_forward_does_not_reach_is_an_error(tmp_path):
    described = tiny(tmp_path)
    points = build_catalog(described).select(["blocks.0.hook_mlp_out"])
    described.blocks[0].mlp.forward = described.blocks[0].mlp.forward
    with Taps(described, points, lambda *_: None) as taps:
        described.blocks[0].mlp._forward_hooks.clear()
        with pytest.raises(HookError, match=r"blocks\.0\.hook_mlp_out: was not reached"):
            taps.run(input_ids=IDS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_every_hook_point_comes_back_from_disk(tmp_path, model_type):
    """Windows of uneven length, some in chunks, in two shards: all rows of all hook points, and
    what is beyond them.
    """
    folder = with_bytes(build_tiny(model_type, tmp_path / "model", vocab_size=260))
    (tmp_path / "texts").mkdir()
    for number, length in enumerate((64, 1, 100, 7, 65, 130)):
        text = "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(length))
        (tmp_path / f"texts/{number}.txt").write_text(text)
    requested = (
        f"memory.activation_cache_filter=[] corpus=text corpus.path={tmp_path / 'texts'} "
        "corpus.context_length=100 extraction.shards=2"
    )
    run = stages(tmp_path / "run", folder, f"{requested} extraction.batch_tokens=200").all()
    run.verify()
    acts = theloom.open(run.activations)
    described = blocks.find_blocks(AutoModel.from_pretrained(folder).eval())
    points = build_catalog(described).points
    assert acts.hooks == [p.name for p in points]
    windows = np.diff(acts.window_offset)
    assert sorted(windows.tolist()) == [1, 7, 30, 64, 65, 100, 100]
    longest = int(windows.max())
    for begin, end in zip(
        acts.window_offset[:-1].tolist(), acts.window_offset[1:].tolist(), strict=True
    ):
        expected = values_of(
            described, torch.from_numpy(acts.input_ids.numpy(slice(begin, end)).astype("i8"))[None]
        )
        for point in points:
            found, value = acts[point.name][begin:end], expected[point.name][0]
            assert found.shape == (end - begin, *point.row(longest))
            if point.over_keys:
                assert (found[..., end - begin :] == point.fill).all()
                found, value = found[..., : end - begin], value.transpose(0, 1)
            assert torch.equal(found.isneginf(), value.isneginf())
            found, value = (v.masked_fill(v.isneginf(), 0) for v in (found, value))
            assert float((found - value).abs().max() / value.abs().max()) <= 1e-5, point.name


def test_values_that_are_no_rows_leave_the_others_alone():
    """ZAYA's mixers give heads apart; its attention and residuals are rows as everywhere."""
    catalog = Traced(tiny_config("zaya"), None).catalog()
    assert "is not one row for each" in catalog.unsupported["blocks.0.mixer.hook_out"]
    there = {p.name: p.shape for p in catalog.points}
    assert there["blocks.2.hook_resid_post"] == (64,)
    assert there["blocks.2.attn.hook_pattern"] == (4,)


def test_several_residual_streams_are_in_one_row():
    catalog = Traced(tiny_config("hy_v4"), None).catalog()
    streams = {p.shape for p in catalog.points if p.value.startswith("hook_resid_p")}
    assert streams == {(4, 64)}
