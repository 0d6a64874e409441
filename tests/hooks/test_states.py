"""States of recurrent mixers: through the stages, against the cache of plain transformers."""

import re
from itertools import pairwise

import h5py
import pytest
import sweep
import theloom
import torch
from corpus_support import byte_tokenizer
from support import stages
from theloom.errors import HookError
from theloom.extraction import extract_hidden_states
from theloom.hooks.blocks import find_blocks
from theloom.hooks.catalog import build_catalog
from theloom.hooks.recurrent import cache_name
from theloom.hooks.taps import Taps
from theloom.model.forward import prefill
from transformers import AutoModel, DynamicCache

FILTER = "memory.activation_cache_filter=[blocks.*.ssm.*,blocks.*.mixer.*,blocks.0.hook_resid_post]"
LAST = f"{FILTER} rows.keep=last corpus.context_length=28 memory.streaming_chunk_size=12"


def build(model_type, folder):
    model = sweep.build(model_type)
    model.resize_token_embeddings(260)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def texts(folder):
    """Documents of uneven lengths: one token, and on both sides of a chunk."""
    for number, length in enumerate((1, 2, 13, 27)):
        text = "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(length))
        (folder / f"{number}.txt").write_text(text)
    return folder


def cached(model, ids):
    """The layers of the cache after a document."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, **{cache_name(model): cache})
    return cache.layers


def held(layers, name):
    layer = layers[int(name.split(".")[1])]
    (state,) = (
        layer.recurrent_states if name.endswith("hook_state") else layer.conv_states
    ).values()
    return state.float()


def of_rwkv(model, ids):
    output = model(input_ids=ids, use_cache=True)
    values = ("conv_state", "state", "normalizer_state", "max_state")
    kept = dict(zip(values, output.state[1:], strict=True))
    kept["conv_state"] = kept["conv_state"][:, :, None]
    return lambda block, value: kept[value][..., block]


def of_xlstm(model, ids):
    states = model(input_ids=ids, use_cache=True).cache_params.rnn_state
    values = ("state", "normalizer_state", "max_state")
    return lambda block, value: states[block][values.index(value)]


def of_recurrent_gemma(model, ids):
    model(input_ids=ids, use_cache=True)
    mixers = [layer.temporal_block for layer in model.layers]
    return lambda block, value: (
        mixers[block].conv1d_state
        if value == "conv_state"
        else mixers[block].rg_lru.recurrent_states
    )


def of_minimax(model, ids):
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return lambda block, value: cache.get_linear_cache(block)


def of_cache(model, ids):
    layers = cached(model, ids)
    return lambda block, value: held(layers, f"blocks.{block}.ssm.hook_{value}")


OWN = {
    "rwkv": of_rwkv,
    "xlstm": of_xlstm,
    "recurrent_gemma": of_recurrent_gemma,
    "minimax": of_minimax,
}
VALUES = {  # of block 0, or of the first with a mixer
    "mamba2": {"state", "conv_state"},  # in chunks
    "jamba": {"state", "conv_state"},  # the others in one pass
    "rwkv": {"state", "normalizer_state", "max_state", "conv_state"},
    "xlstm": {"state", "normalizer_state", "max_state"},
    "recurrent_gemma": {"state", "conv_state"},
    "minimax": {"state"},
    "lfm2": {"conv_state"},
}


@pytest.mark.parametrize("model_type", VALUES)
def test_states_are_those_that_transformers_keeps(tmp_path, model_type):
    folder, corpus = tmp_path / "model", tmp_path / "texts"
    corpus.mkdir()
    build(model_type, folder)
    run = stages(tmp_path / "run", folder, f"{LAST} corpus=text corpus.path={texts(corpus)}").all()
    run.verify()
    acts, model = theloom.open(run.activations), AutoModel.from_pretrained(folder).eval()
    names = [h for h in acts.hooks if "ssm." in h]
    first = names[0].split(".")[1]
    prefix = f"blocks.{first}.ssm.hook_"
    assert {h.removeprefix(prefix) for h in names if h.startswith(prefix)} == VALUES[model_type]
    with h5py.File(run.activations) as file:
        ids, offsets = file["tokens/input_ids"][:].astype("i8"), file["documents/offset"][:]
    lengths = set()
    for number, (begin, end) in enumerate(pairwise(offsets.tolist())):
        lengths.add(end - begin)
        with torch.inference_mode():
            kept = OWN.get(model_type, of_cache)(model, torch.from_numpy(ids[begin:end])[None])
        for name in names:
            _, block, _, value = name.split(".")
            expected = kept(int(block), value.removeprefix("hook_"))[0]
            torch.testing.assert_close(acts[name][number], expected, rtol=1e-4, atol=1e-5)
    assert lengths >= {1, 13}


@pytest.mark.parametrize(
    "model_type",
    [
        *("mamba", "falcon_mamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h"),
        *("granitemoehybrid", "kimi_linear", "lfm2_moe", "lfm3", "olmo_hybrid", "qwen3_next"),
        *("qwen3_5_text", "bailing_hybrid"),
    ],
)
def test_states_and_mixers_of_a_pass_are_the_models_own(model_type):
    described = find_blocks(sweep.build(model_type).base_model)
    names = ["blocks.*.ssm.*", "blocks.*.mixer.*"]
    points = build_catalog(described).select(names)
    ids, values, outputs = torch.arange(3, 14)[None], {}, {}
    with torch.inference_mode(), Taps(described, points, values.__setitem__) as taps:
        taps.run(input_ids=ids, use_cache=False)
    values = {name: value.clone() for name, value in values.items()}
    mixers = {
        p.block: next(m for m in described.blocks[p.block].modules() if is_mixer(m)) for p in points
    }
    handles = [
        m.register_forward_hook(lambda m, _, out, b=b: outputs.__setitem__(b, out))
        for b, m in mixers.items()
    ]
    layers = cached(described.model, ids)
    for handle in handles:
        handle.remove()
    for name, value in values.items():
        if "ssm." in name:
            assert torch.equal(value[:, -1], held(layers, name))
        elif name.endswith("hook_out"):
            out = outputs[int(name.split(".")[1])]
            assert torch.equal(value, out if isinstance(out, torch.Tensor) else out[0])
    assert any("ssm." in name for name in values)


def is_mixer(module):
    name = type(module).__name__
    scans = re.search(r"Mixer|Mamba\w*Layer$", name) and hasattr(module, "A_log")
    return scans or re.search(r"Delta(Net|Attention)$|ShortConv", name)


def test_states_are_chosen_by_name_alone():
    catalog = build_catalog(find_blocks(sweep.build("mamba").base_model))
    assert not any("ssm." in p.name for p in catalog.select([]))
    assert not any("ssm." in p.name for p in catalog.select(["blocks.0.*"]))
    assert len(catalog.select(["blocks.*.ssm.hook_state"])) == 3


@pytest.mark.parametrize(
    ("model_type", "rows", "reason"),
    [
        ("mamba", "", "set rows.keep=last"),
        ("mamba", "rows.keep=first", "set rows.keep=last"),
        ("mamba", "rows.pool=mean", "set rows.keep=last"),
        ("llama", "rows.keep=last", "no mixer whose state transformers keeps"),
        ("lfm2", "rows.keep=last", "a convolution alone, whose state is ssm.hook_conv_state"),
        ("inkling_text", "rows.keep=last", "it has several such mixers"),
    ],
)
def test_what_is_no_state_of_a_document_is_refused(tmp_path, model_type, rows, reason):
    folder = build(model_type, tmp_path / "model")
    filters = "memory.activation_cache_filter=[blocks.0.ssm.hook_state]"
    run = stages(tmp_path / "run", folder, f"{filters} {rows} corpus.context_length=40")
    with pytest.raises(HookError, match=reason) as refusal:
        run.prepare()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlstm", r"saw \(1, 4\) of \(1, 11\) .* set corpus.context_length to at most 4"),
        ("rwkv", "RwkvSelfAttention does not take over its state from one chunk of a document"),
        ("recurrent_gemma", "does not take over its state from one chunk of a document"),
    ],
)
def test_a_state_of_a_part_of_a_document_is_refused(model_type, reason):
    described = find_blocks(sweep.build(model_type).base_model)
    if model_type == "xlstm":
        described.model.config.max_inference_chunksize = 4
    points = build_catalog(described).select(["blocks.0.ssm.hook_state"])
    chunk = 16 if model_type == "xlstm" else 4
    taps, refused = Taps(described, points, lambda *_: None), pytest.raises(HookError, match=reason)
    with taps, refused as refusal:
        prefill(taps, torch.arange(3, 14)[None], chunk)
    assert "\n" not in str(refusal.value)


def test_states_of_a_model_in_memory_are_refused():
    model = sweep.build("mamba")
    with pytest.raises(HookError, match="extract it with the pipeline"):
        extract_hidden_states(model, torch.arange(3, 8)[None], hooks=["blocks.0.ssm.hook_state"])
