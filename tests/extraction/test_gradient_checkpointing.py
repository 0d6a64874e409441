"""Gradients through what `extract_with_checkpointing` returns are the plain forward's; far less is
kept for them.
"""

import copy
import gc

import pytest
import torch
from support import allocator_peak, build_tiny
from theloom.errors import ModelError
from theloom.extraction.api import extract_hidden_states, extract_with_checkpointing
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BertConfig, BertModel

BLOCKS = 12
# in training mode those that have dropout
MODELS = [
    ("llama", False),
    ("gpt2", True),
    ("gemma3_text", False),
    ("bloom", False),
    ("bert", True),
    ("bert", False),
]


def twelve_blocks(folder, model_type):
    if model_type == "bert":
        torch.manual_seed(0)
        small = {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "vocab_size": 128,
        }
        return BertModel(BertConfig(num_hidden_layers=BLOCKS, **small)).eval()
    layers = {"num_hidden_layers": BLOCKS} | (
        {"n_layer": BLOCKS} if model_type in ("gpt2", "bloom") else {}
    )
    return AutoModelForCausalLM.from_pretrained(build_tiny(model_type, folder, **layers)).eval()


def gradients(model, states, names):
    """Of a loss that every residual but the last has a part in, by parameter."""
    model.zero_grad()
    seeded = torch.Generator().manual_seed(0)
    loss = sum(
        (states[name] * torch.randn(states[name].shape, generator=seeded)).sum() for name in names
    )
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    """As equal as rounding lets sums be; some gradients, as of key biases, are nothing but
    rounding.
    """
    assert set(found) == set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max())
        assert error <= 1e-5 * max(float(gradient.abs().max()), 1e-2 * largest), name


def plain_states(model, ids):
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return {f"blocks.{i - 1}.hook_resid_post": s for i, s in enumerate(states[:-1]) if i}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("model_type", "training"), MODELS)
def test_gradients_are_those_of_the_plain_forward(tmp_path, model_type, training, use_reentrant):
    model = twelve_blocks(tmp_path, model_type).train(training)
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)  # dropout is drawn alike, as the models in training mode have it
    expected = plain_states(model, ids)
    torch.manual_seed(7)
    found = extract_with_checkpointing(model=model, tokens=ids, use_reentrant=use_reentrant)
    assert set(expected) < set(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    expected_gradients, found_gradients = (
        gradients(model, states, expected) for states in (expected, found)
    )
    assert len(found_gradients) > 60
    assert_equal(found_gradients, expected_gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_is_kept_for_the_backward_falls_by_more_than_forty_percent(
    tmp_path, model_type, use_reentrant
):
    model = twelve_blocks(tmp_path, model_type)
    ids = torch.randint(3, 128, (2, 128), generator=torch.Generator().manual_seed(1))

    def plain():
        return plain_states(model, ids)

    def again():
        return extract_with_checkpointing(model, ids, use_reentrant=use_reentrant)

    whole, checkpointed = live_after(plain), live_after(again)
    assert checkpointed < 0.6 * whole
    peaks = [allocator_peak(lambda work=work: backward(model, work())) for work in (plain, again)]
    assert peaks[1] < 0.6 * peaks[0]


def backward(model, states):
    model.zero_grad()
    states["blocks.10.hook_resid_post"].sum().backward()
    model.zero_grad()


def live_after(work):
    """Bytes that the CPU allocator has given out and not got back at the end of some work, its
    result being kept.
    """
    work()  # what libraries allocate once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert result
    return sum(e.nbytes() for e in events)


def test_inner_hook_points_keep_their_graph(tmp_path):
    model = twelve_blocks(tmp_path, "llama")
    ids = torch.arange(3, 23)[None]
    kept = []
    handle = model.model.layers[5].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    model(ids)
    handle.remove()
    kept[0].pow(2).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for use_reentrant in (False, True):
        model.zero_grad()
        found = extract_with_checkpointing(
            model,
            ids,
            hooks=["blocks.5.mlp.hook_post", "blocks.5.ln1.hook_normalized"],
            use_reentrant=use_reentrant,
        )
        found["blocks.5.mlp.hook_post"].pow(2).sum().backward()
        assert_equal(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_weights_behind_a_frozen_embedding_get_their_gradients(tmp_path, use_reentrant):
    model = twelve_blocks(tmp_path, "llama")
    model.get_input_embeddings().requires_grad_(False)
    ids = torch.arange(3, 23)[None]
    expected = plain_states(model, ids)
    expected_gradients = gradients(model, expected, expected)
    found = gradients(
        model, extract_with_checkpointing(model, ids, use_reentrant=use_reentrant), expected
    )
    assert_equal(found, expected_gradients)


def test_padded_rows_have_their_gradients_alone(tmp_path):
    model = twelve_blocks(tmp_path, "llama")
    short, long = torch.arange(3, 10), torch.arange(20, 34)
    batch = torch.zeros(2, 14, dtype=torch.long)
    batch[0, -7:], batch[1] = short, long
    mask = torch.ones(2, 14)
    mask[0, :7] = 0
    name = "blocks.4.hook_resid_post"
    model.zero_grad()
    sum(plain_states(model, row[None])[name].pow(2).sum() for row in (short, long)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    extract_with_checkpointing(model, batch, layers=[4], attention_mask=mask)[name].pow(
        2
    ).sum().backward()
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def test_a_model_s_own_checkpointing_is_not_stacked_and_stays_on(tmp_path):
    model = twelve_blocks(tmp_path, "llama").train()
    ids = torch.arange(3, 23)[None]
    expected = plain_states(model, ids)
    expected_gradients = gradients(model, expected, expected)
    model.activation_checkpointing_enable()
    extract_hidden_states(model, ids)  # what is looked up once
    calls = []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    result = extract_with_checkpointing(model, ids)
    found = gradients(model, result, expected)
    assert len(calls) == 2
    assert all(
        layer.gradient_checkpointing and "forward" not in vars(layer)
        for layer in model.model.layers
    )
    assert_equal(found, expected_gradients)


def test_the_model_is_left_as_it_was_also_after_an_error(tmp_path):
    model = twelve_blocks(tmp_path, "llama").train()
    ids = torch.arange(3, 23)[None]
    before = copy.copy(vars(model.model.layers[2]))
    extract_with_checkpointing(model, ids)
    assert vars(model.model.layers[2]) == before
    failing = model.model.layers[7].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract_with_checkpointing(
            model, ids, hooks=["*.hook_resid_post"], attention_mask=torch.ones(1, 20)
        )
    failing.remove()
    assert vars(model.model.layers[2]) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_a_model_without_gradients_is_refused(tmp_path):
    model = twelve_blocks(tmp_path, "llama").requires_grad_(False)
    with pytest.raises(
        ModelError,
        match=r"requires a gradient; use model\.requires_grad_\(\), or extract_hidden_stat",
    ):
        extract_with_checkpointing(model, [5, 6, 7])
    with torch.no_grad():
        found = extract_with_checkpointing(model.requires_grad_(True), [5, 6, 7])
    assert found["blocks.11.hook_resid_post"].requires_grad
    assert not extract_hidden_states(model, [5, 6, 7])["blocks.11.hook_resid_post"].requires_grad
