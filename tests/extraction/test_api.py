"""The public functions against plain transformers: one pass, chunks, padding on either side; models
left alone.
"""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from support import TINY, allocator_peak, build_tiny
from theloom.devices.gpu import GPUManager
from theloom.errors import HookError, InputError, ModelError
from theloom.extraction.api import (
    collect_streaming_results,
    extract_hidden_states,
    extract_inference_optimized,
    extract_streaming,
    extract_with_checkpointing,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

LENGTHS = (5, 23, 14)
MODELS = [t for t in TINY if t != "qwen3_moe"]
RECURRENT = {"lru_width": 64, "attention_window_size": 8}


def tiny(folder, model_type, attention=None, **numbers):
    model = AutoModelForCausalLM.from_pretrained(
        build_tiny(model_type, folder, **numbers), attn_implementation=attention
    )
    return model.eval()


def encoder(kind=BertModel, config=BertConfig):
    torch.manual_seed(0)
    return kind(
        config(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            vocab_size=128,
        )
    ).eval()


def rows():
    seeded = torch.Generator().manual_seed(2)
    return [torch.randint(3, 128, (n,), generator=seeded) for n in LENGTHS]


def padded(side):
    """The rows as one batch, with ids in the padding that no embedding has, and its mask."""
    ids, mask = torch.full((3, max(LENGTHS)), -100), torch.zeros(3, max(LENGTHS), dtype=torch.long)
    for i, row in enumerate(rows()):
        place = slice(-len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def plain(model, ids):
    """Residuals before the last block's output by plain transformers, (position, hidden size)."""
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
    return {f"blocks.{i - 1}.hook_resid_post": s[0] for i, s in enumerate(states[:-1]) if i}


def far(found, expected):
    found, expected = (v.masked_fill(v.isneginf(), 0) for v in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def state_of(model):
    """All that an extraction could leave changed."""
    modules = list(model.modules())
    return (
        [
            (id(p), p.dtype, p._version, p.requires_grad)
            for p in [*model.parameters(), *model.buffers()]
        ],
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in modules
        ],
        [
            (id(getattr(m, "config", None)), getattr(m, "gradient_checkpointing", None))
            for m in modules
        ],
        model.config._attn_implementation,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODELS)
def test_padding_on_either_side_gives_the_rows_of_each_sequence_alone(tmp_path, model_type, side):
    model = tiny(tmp_path, model_type, "eager")
    ids, mask = padded(side)
    found = extract_hidden_states(model, ids, hooks=[], attention_mask=mask)
    assert torch.equal(found.attention_mask, mask.bool())
    streamed = collect_streaming_results(
        extract_streaming(model, ids, 7, hooks=[], attention_mask=mask)
    )
    assert torch.equal(streamed.attention_mask, mask.bool())
    for i, row in enumerate(rows()):
        alone = extract_hidden_states(model, row, hooks=[])
        theirs = plain(model, row)
        here = mask[i].bool()
        for name, expected in alone.items():
            for values in (found[name][i], streamed[name][i]):
                if name.endswith(("attn_scores", "pattern")):
                    fill = -torch.inf if name.endswith("scores") else 0
                    assert (values[:, ~here] == fill).all()
                    assert (values[:, :, ~here] == fill).all()
                    mine = values[:, here][:, :, here]
                else:
                    assert (values[~here] == 0).all()
                    mine = values[here]
                assert far(mine, expected[0]) <= 1e-5, name
        for name, expected in theirs.items():
            assert far(found[name][i, here], expected) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "model", [encoder(), encoder(RobertaModel, RobertaConfig)], ids=["bert", "roberta"]
)
def test_padding_on_either_side_of_an_encoder(model, side):
    ids, mask = padded(side)
    found = extract_hidden_states(
        model, ids, hooks=["blocks.*.hook_resid_post", "*.hook_pattern"], attention_mask=mask
    )
    for i, row in enumerate(rows()):
        here = mask[i].bool()
        for name, expected in plain(model, row).items():
            assert far(found[name][i, here], expected) <= 1e-5
        pattern = found["blocks.1.attn.hook_pattern"][i][:, here]
        torch.testing.assert_close(pattern[:, :, here].sum(-1), torch.ones(4, len(row)))


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 100])
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "mistral", "gemma3_text", "bloom", "opt", "falcon"]
)
def test_streaming_gives_the_values_of_one_pass(tmp_path, model_type, chunk_size):
    model = tiny(tmp_path, model_type, "eager")
    ids = torch.randint(3, 128, (2, 80), generator=torch.Generator().manual_seed(1))
    whole = extract_hidden_states(model, ids, hooks=[])
    starts, keys = [], []

    def seen():
        for chunk in extract_streaming(model, ids, chunk_size, hooks=[]):
            starts.append(chunk.start)
            keys.append(chunk["blocks.1.attn.hook_pattern"].shape[2:])
            assert chunk["blocks.0.hook_resid_post"].shape[:2] == chunk.attention_mask.shape
            yield chunk

    found = collect_streaming_results(seen())
    assert starts == list(range(0, 80, chunk_size))
    assert keys == [(min(chunk_size, 80 - s), min(s + chunk_size, 80)) for s in starts]
    assert list(found) == list(whole)
    for name, expected in whole.items():
        assert found[name].shape == expected.shape
        assert torch.equal(found[name].isneginf(), expected.isneginf())
        assert far(found[name], expected) <= 1e-5, name


def test_smollm2_of_a_tokenizer_s_batch(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder, padding_side="left")
    texts = [
        "A loom weaves.",
        "The warp is held under tension while the weft is drawn through it, again and again.",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all()
    found = extract_hidden_states(model, batch)
    assert list(found) == [f"blocks.{i}.hook_resid_post" for i in range(30)]
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        for name, expected in plain(model, ids).items():
            assert far(found[name][i, batch.attention_mask[i].bool()], expected) <= 1e-5


@pytest.mark.parametrize("kind", ["tensor", "row", "list", "lists", "uneven lists", "encoding"])
def test_every_form_of_tokens_gives_the_same(tmp_path, kind):
    model = tiny(tmp_path, "llama")
    ids = torch.arange(3, 15)
    tokens = {
        "tensor": ids[None],
        "row": ids,
        "list": ids.tolist(),
        "lists": [ids.tolist()],
        "uneven lists": [ids.tolist(), [5, 6]],
        "encoding": {
            "input_ids": ids[None],
            "attention_mask": torch.ones(1, 12),
            "token_type_ids": ids[None] * 0,
        },
    }[kind]
    found = extract_hidden_states(model, tokens)
    assert found["blocks.1.hook_resid_post"].shape == (2 if kind == "uneven lists" else 1, 12, 64)
    assert (
        far(found["blocks.1.hook_resid_post"][0], plain(model, ids)["blocks.1.hook_resid_post"])
        <= 1e-5
    )


def test_token_types_reach_the_model_with_their_tokens(tmp_path):
    model = encoder()
    ids, mask = padded("left")
    types = (torch.arange(23) > 18).long().expand(3, -1)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    found = extract_hidden_states(model, batch)
    for i, row in enumerate(rows()):
        with torch.no_grad():
            own = types[i, -len(row) :][None]
            expected = model(
                row[None], token_type_ids=own, output_hidden_states=True
            ).hidden_states[2][0]
        assert far(found["blocks.1.hook_resid_post"][i, -len(row) :], expected) <= 1e-5


def test_layers_are_short_for_the_residual_after_them_and_end_the_forward(tmp_path):
    model = tiny(tmp_path, "llama")
    reached = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: reached.append(2))
    found = extract_hidden_states(model, [5, 6, 7], layers=[-2], hooks=["blocks.0.attn.hook_z"])
    assert list(found) == ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post"]
    reached.clear()
    extract_hidden_states(model, [5, 6, 7], layers=[-2])
    assert reached == []
    with pytest.raises(HookError, match=r"layers: 3 is not in this model, which has 3 blocks"):
        extract_hidden_states(model, [5, 6, 7], layers=[3])
    with pytest.raises(HookError, match=r"did you mean 'blocks\.2\.hook_resid_post'"):
        extract_hidden_states(model, [5, 6, 7], hooks=["blocks.7.hook_resid_pst"])


@pytest.mark.parametrize(
    ("tokens", "mask", "words"),
    [
        ("a text", None, "text was given"),
        (["a", "b"], None, "text was given"),
        ([], None, "integers"),
        (torch.ones(2, 3), None, "integers of shape"),
        (torch.ones(2, 3, 4, dtype=torch.long), None, "integers of shape"),
        ([[5, 6, 7, 8]], [[1, 0, 1, 1]], "row 0 has padding between its tokens"),
        ([[5, 6, 7, 8]], [[1, 1, 1]], r"attention_mask is \(1, 3\) and the tokens are \(1, 4\)"),
        ([[5, 6]], [[0, 0]], "no token but padding"),
        ({"ids": [[5]]}, None, "needs 'input_ids'"),
        ({"input_ids": [[5, 6]], "bbox": [[1, 2]]}, None, "does not take 'bbox'"),
        ([[5, 6], [7, 128]], None, r"id 128 \(row 1, token 1\).* has 128 rows"),
        ([[5, -1]], None, r"id -1 \(row 0, token 1\)"),
        (torch.tensor([2**63], dtype=torch.uint64), None, r"id -\d+ \(row 0, token 0\)"),
        (list(range(100)) * 3, None, "300 in a row, and GPT2LMHeadModel has 256 positions"),
    ],
)
def test_tokens_that_cannot_be_a_batch_are_refused_in_a_line(tmp_path, tokens, mask, words):
    with pytest.raises(InputError, match=words):
        extract_hidden_states(tiny(tmp_path, "gpt2"), tokens, attention_mask=mask)


def test_padding_may_have_an_id_beyond_the_embedding(tmp_path):
    model = tiny(tmp_path, "gpt2")
    plain = extract_hidden_states(model, [[5, 6, 7]]).hidden_states
    model.config.pad_token_id = 128
    padded = extract_hidden_states(model, [[5, 6, 7, 128]], attention_mask=[[1, 1, 1, 0]])
    for name, value in padded.hidden_states.items():
        torch.testing.assert_close(value[:, :3], plain[name])


def test_models_that_cannot_stream_are_refused_and_run_in_one_pass(tmp_path):
    recurrent, bert = tiny(tmp_path, "recurrent_gemma", **RECURRENT), encoder()
    ids = torch.arange(3, 23)
    for model in (recurrent, bert):
        with pytest.raises(ModelError, match=r"cannot be streamed: .*; use extract_hidden_states"):
            extract_streaming(model, ids, chunk_size=8)
        (chunk,) = extract_streaming(model, ids, chunk_size=20)
        assert (
            far(chunk["blocks.0.hook_resid_post"][0], plain(model, ids)["blocks.0.hook_resid_post"])
            <= 1e-5
        )
    with pytest.raises(ModelError, match="a model of transformers is needed, found Linear"):
        extract_hidden_states(torch.nn.Linear(2, 2), ids)


def test_the_memory_of_a_chunk_is_free_once_it_is_dropped(tmp_path):
    model = tiny(tmp_path, "llama")
    ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    storages = []
    for chunk in extract_streaming(model, ids, chunk_size=32):
        assert not any(s() for s in storages)
        storages = [weakref.ref(value) for value in chunk.hidden_states.values()]
        del chunk
    assert len(storages) == 3
    numbers = {"num_hidden_layers": 8, "hidden_size": 256, "num_key_value_heads": 1, "head_dim": 16}
    every = tiny(tmp_path / "wide", "llama", **numbers)

    def stream():
        for _ in extract_streaming(every, ids, chunk_size=32):
            pass

    held = 8 * 256 * 256 * 4  # all residuals of all tokens
    assert allocator_peak(lambda: list(extract_streaming(every, ids, chunk_size=32))) > held
    assert allocator_peak(stream) < held / 2


def test_collecting_takes_one_chunk_beside_the_result(tmp_path):
    model = tiny(tmp_path, "llama", num_hidden_layers=8, hidden_size=256)
    ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    stored = list(extract_streaming(model, ids, chunk_size=32))
    held = 8 * 256 * 256 * 4
    assert held <= allocator_peak(lambda: collect_streaming_results(iter(stored))) < held * 1.1
    part = collect_streaming_results(stored[:3])
    assert part.attention_mask.sum() == 96
    with pytest.raises(InputError, match="no chunks to collect"):
        collect_streaming_results([])


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(tmp_path, training):
    model = tiny(tmp_path, "llama").train(training)
    model.activation_checkpointing_enable()
    model.model.layers[1].eval()
    ids = torch.arange(3, 43)
    before = state_of(model)
    extract_hidden_states(model, ids, hooks=[])
    assert state_of(model) == before
    chunks = extract_streaming(model, ids, 8, hooks=[])
    next(chunks)
    assert state_of(model) == before  # between chunks too: the caller may use the model
    assert model(ids[None]).logits.requires_grad
    chunks.close()
    assert state_of(model) == before
    for precision in ("fp16", "bf16"):
        extract_inference_optimized(
            model=model, tokens=ids, layers=[-1], precision=precision, clear_cache=True
        )
        assert state_of(model) == before


def test_the_model_is_left_as_it_was_after_an_error(tmp_path):
    model = tiny(tmp_path, "llama").train()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > failing_after:
            raise ZeroDivisionError

    failing_after = 10**6
    model.model.layers[1].mlp.register_forward_hook(fail)
    ids = torch.arange(3, 43)
    extract_hidden_states(model, ids, hooks=[])
    list(extract_streaming(model, ids, 8))
    before = state_of(model)
    failing_after = len(calls)
    for work in (
        lambda: extract_hidden_states(model, ids, hooks=[]),
        lambda: extract_inference_optimized(model, ids, precision="bf16", clear_cache=True),
    ):
        with pytest.raises(ZeroDivisionError):
            work()
        assert state_of(model) == before
    failing_after = len(calls) + 2
    chunks = extract_streaming(model, ids, 8, hooks=[])
    with pytest.raises(ZeroDivisionError):
        list(chunks)
    assert state_of(model) == before


def test_results_can_be_inputs_of_a_probe(tmp_path):
    model = tiny(tmp_path, "llama")
    ids = torch.arange(3, 43)
    (chunk, *_) = extract_streaming(model, ids, 8)
    for found in (
        extract_hidden_states(model, ids),
        extract_inference_optimized(model, ids, [-1], "bf16"),
        chunk,
    ):
        value = found["blocks.2.hook_resid_post"]
        assert not value.requires_grad
        probe = torch.nn.Linear(64, 1, dtype=value.dtype)
        probe(value).sum().backward()
        assert probe.weight.grad.abs().max() > 0


def test_values_of_a_fused_projection_do_not_keep_the_whole_of_it_alive(tmp_path):
    model = tiny(tmp_path, "gpt2")
    found = extract_hidden_states(model, torch.arange(3, 43), hooks=["blocks.1.attn.hook_q"])[
        "blocks.1.attn.hook_q"
    ]
    assert found.untyped_storage().nbytes() == found.numel() * 4


@pytest.mark.gpu(real="traces of a model that is on the GPU")
def test_on_a_gpu_values_stay_there_and_chunks_are_given_back(tmp_path):
    numbers = {"num_hidden_layers": 8, "hidden_size": 256, "num_key_value_heads": 1, "head_dim": 16}
    model = tiny(tmp_path, "llama", max_position_embeddings=2048, **numbers).cuda()
    ids, mask = padded("left")
    found = extract_hidden_states(model, ids, attention_mask=mask)
    assert found["blocks.0.hook_resid_post"].device == model.device
    for i, row in enumerate(rows()):
        for name, expected in plain(model, row.cuda()).items():
            assert far(found[name][i, mask[i].bool()], expected) <= 1e-5
    long = torch.randint(3, 128, (1, 2048), generator=torch.Generator().manual_seed(0))
    in_use = []
    for chunk in extract_streaming(model, long, chunk_size=128):
        assert len(chunk) == 8
        del chunk
        in_use.append(torch.cuda.memory_allocated())
    held = 8 * 2048 * 256 * 4
    assert in_use[-1] - in_use[0] < held / 2  # the KV cache alone grows
    half = extract_inference_optimized(
        model, ids, [-1], "fp16", clear_cache=True, attention_mask=mask
    )
    assert half["blocks.7.hook_resid_post"].dtype == torch.float16


def test_importing_takes_no_transformers():
    code = "import sys, theloom.extraction; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    gc.collect()


def test_the_calls_of_the_specification(tmp_path):
    model = tiny(tmp_path, "llama")
    tokens = torch.randint(3, 128, (1, 80), generator=torch.Generator().manual_seed(1))
    shapes = []
    for chunk in extract_streaming(model, tokens, chunk_size=32):
        shapes.append({name: tuple(value.shape) for name, value in chunk.hidden_states.items()})
    assert [s["blocks.1.hook_resid_post"] for s in shapes] == [
        (1, 32, 64),
        (1, 32, 64),
        (1, 16, 64),
    ]
    full_hidden_states = collect_streaming_results(extract_streaming(model, tokens, chunk_size=32))
    assert full_hidden_states["blocks.1.hook_resid_post"].shape == (1, 80, 64)
    gpu = GPUManager()
    requested = (
        extract_hidden_states
        if gpu.can_allocate(required_memory_gb=0.001, device=0)
        else extract_streaming
    )
    assert requested(model, tokens).hidden_states["blocks.2.hook_resid_post"].shape == (1, 80, 64)
    assert gpu.check_memory_threshold(threshold=1.0)["warnings"] == []
    result = extract_inference_optimized(
        model=model, tokens=tokens, layers=[-1], precision="fp16", clear_cache=True
    )
    assert result.hidden_states["blocks.2.hook_resid_post"].dtype == torch.float16
    result = extract_with_checkpointing(model=model, tokens=tokens, use_reentrant=True)
    result.hidden_states["blocks.2.hook_resid_post"].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["fnet", "deepseek_v32"])
def test_where_padding_changes_rows_each_length_goes_by_itself(tmp_path, kind):
    from tiny_configs import tiny_config
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(kind)).eval()
    vocabulary = model.config.vocab_size
    rows = [[3 + (7 * i + n) % (vocabulary - 3) for i in range(n)] for n in (20, 11, 20, 5)]
    states = extract_hidden_states(model, rows, layers=[0, -1])
    for name, value in states.items():
        for row, tokens in enumerate(rows):
            alone = extract_hidden_states(model, [tokens], layers=[0, -1])[name][0]
            torch.testing.assert_close(value[row, : len(tokens)], alone, atol=1e-5, rtol=1e-5)
            assert value[row, len(tokens) :].abs().sum() == 0
