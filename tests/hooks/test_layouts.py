"""Blocks that are no modules (XLM, Flaubert), and blocks of two streams (Reformer), against plain
transformers.
"""

import copy
import json
import random
from itertools import pairwise

import pytest
import sweep
import theloom
import torch
from support import allocator_peak, stages
from theloom.config.model_dims import numbers
from theloom.engine.layerwise.skeleton import Shell
from theloom.errors import HookError, MemoryPlanError, ModelError
from theloom.extraction import (
    extract_hidden_states,
    extract_inference_optimized,
    extract_with_checkpointing,
)
from theloom.hooks.blocks import find_blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.block_calls import Frame, inspect_calls
from theloom.model.device_map import over_leased
from theloom.model.fake import fake_model
from theloom.model.weight_format import WeightFormat
from transformers import (
    FlaubertConfig,
    FlaubertModel,
    ReformerConfig,
    ReformerModel,
    ReformerModelWithLMHead,
    XLMConfig,
    XLMModel,
    XLMWithLMHeadModel,
)

XLM = {"vocab_size": 160, "emb_dim": 64, "n_layers": 3, "n_heads": 4}
REFORMER = {
    "vocab_size": 160,
    "hidden_size": 64,
    "axial_pos_shape": [12, 16],
    "axial_pos_embds_dim": [32, 32],
    "feed_forward_size": 96,
    "num_attention_heads": 4,
    "attention_head_size": 16,
    "attn_layers": ["local", "lsh", "local"],
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 32,
    "hash_seed": 3,
}
MODELS = {
    "xlm causal": lambda: XLMWithLMHeadModel(XLMConfig(**XLM, causal=True)),
    "flaubert": lambda: FlaubertModel(FlaubertConfig(**XLM)),
    "reformer causal": lambda: ReformerModelWithLMHead(ReformerConfig(**REFORMER, is_decoder=True)),
    "reformer": lambda: ReformerModel(ReformerConfig(**REFORMER)),
}
VALUES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out")


def built(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def a_run(folder, model, overrides=""):
    """A run over documents on both sides of every length at which a model does otherwise, some of
    which hold the token of its padding.
    """
    model.save_pretrained(folder / "model")
    sweep._write_tokenizer(folder / "tokenizer")
    chance = random.Random(0)
    with (folder / "texts.jsonl").open("w") as out:
        for length in (40, 1, 16, 17, 90, 2, 33, 31, 64, 70):
            words = [str(chance.randint(0, 8)) for _ in range(length)]
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return stages(
        folder / "run",
        folder / "model",
        f"corpus=text corpus.path={folder}/texts.jsonl model.tokenizer={folder}/tokenizer "
        f"extraction.batch_tokens=256 extraction.shards=1 corpus.context_length=96 {overrides}",
    )


def attentions(model):
    """The attention of every block, by the names that transformers gives them."""
    base = model.base_model
    if hasattr(base, "attentions"):
        return [*base.attentions]
    return [layer.attention for layer in base.encoder.layers]


def expected_of(model, ids):
    """What a model that has seen no other document says of one, and adds to its stream."""
    fresh, added = copy.deepcopy(model), []
    for module in attentions(fresh):
        module.register_forward_hook(lambda _, __, output: added.append(output[0]))
    with torch.inference_mode():
        states = fresh(input_ids=ids, output_hidden_states=True).hidden_states
    return states, added


@pytest.mark.parametrize(
    ("name", "blocks"), [("xlm causal", 3), ("flaubert", 2), ("reformer causal", 3)]
)
def test_rows_are_the_model_s_own_hidden_states(tmp_path, name, blocks):
    """Also where the blocks behind are not loaded."""
    model = built(name)
    entries = ",".join(f"blocks.{n}.{v}" for n in range(blocks) for v in VALUES)
    run = a_run(tmp_path, model, f"memory.activation_cache_filter=[{entries}]").all()
    run.verify()
    acts = theloom.open(run.activations)
    assert len(acts.hooks) == 3 * blocks
    for begin, end in pairwise(acts.window_offset.tolist()):
        ids = torch.from_numpy(acts.input_ids.numpy(slice(begin, end)).astype("i8"))[None]
        check(model, ids, {name: values[begin:end] for name, values in rows_of(acts).items()})


def rows_of(acts):
    return {name: acts[name] for name in acts.hooks}


def check(model, ids, found):
    """The rows of a document against the model's own values."""
    states, added = expected_of(model, ids)
    for name, rows in found.items():
        block, value = int(name.split(".")[1]), name.split(".")[2]
        of = {"hook_resid_pre": states[block], "hook_resid_post": states[block + 1]}
        state = {**of, "hook_attn_out": added[block]}[value][0, : ids.shape[1]]
        assert (rows - state).abs().max() <= 1e-5 * state.abs().max(), name


@pytest.mark.parametrize("name", ["xlm causal", "flaubert", "reformer"])
def test_your_own_code_gets_the_same_side_by_side(name):
    model, chance = built(name), random.Random(1)
    documents = [[chance.randint(0, 8) for _ in range(n)] for n in (40, 7, 40, 64)]
    found = extract_hidden_states(model, documents, hooks=[f"blocks.*.{v}" for v in VALUES])
    for number, document in enumerate(documents):
        rows = {n: v[number, : len(document)] for n, v in found.hidden_states.items()}
        check(model, torch.tensor([document]), rows)


def test_norms_and_positions_of_reformer():
    """Positions are sums of two axes; the norm of an attention that hashes lies within it."""
    model, ids = built("reformer causal"), torch.arange(50)[None]
    hooks = ["hook_embed", "hook_pos_embed", "blocks.*.hook_resid_pre", "blocks.*.ln1.*"]
    found = extract_hidden_states(model, ids, hooks=hooks).hidden_states
    first = found["blocks.0.hook_resid_pre"]
    assert torch.equal(found["hook_embed"] + found["hook_pos_embed"], first)
    for block in range(3):
        x = found[f"blocks.{block}.hook_resid_pre"]
        x = x - x.mean(-1, keepdim=True)
        normalized = found[f"blocks.{block}.ln1.hook_normalized"]
        assert torch.allclose(normalized * found[f"blocks.{block}.ln1.hook_scale"], x, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("xlm causal", 8), ("reformer", 2)])
def test_blocks_behind_the_deepest_are_not_needed(name, count):
    fake = fake_model(built(name).config, "fp32")
    left = fake.unneeded(fake.catalog.select(["blocks.0.hook_resid_post"]))
    assert len([m for m in left if m.endswith((".1", ".2"))]) == count, left
    assert not [m for m in left if m.endswith(".0")]


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_has_their_hook_points_and_their_peak(name):
    model = built(name)
    real = model.base_model
    described, fake = find_blocks(real), fake_model(real.config, "fp32")
    catalog = build_catalog(described)
    assert [p.name for p in fake.catalog.points] == [p.name for p in catalog.points]
    ids = torch.randint(160, (2, 90))
    for filters in (["blocks.1.hook_resid_post"], [f"blocks.*.{v}" for v in ("hook*", "attn.*")]):
        points = catalog.select(filters)
        workload = Workload(2, 90, 90)
        predicted = trace.trace(fake, workload, points, held=True)[0].total
        described.pass_state.restore()
        measured = allocator_peak(
            lambda points=points, workload=workload: trace.run(
                described, ids, workload, points, held=True
            )
        )
        assert abs(predicted / measured - 1) <= 1e-3, (filters, predicted, measured)


def test_a_trace_does_not_depend_on_the_one_before_it():
    """Reformer keeps the number of buckets that the length of its first pass asks for."""
    peaks = []
    config = ReformerConfig(**{**REFORMER, "lsh_attn_chunk_length": 4, "num_hashes": 4})
    for before in ([], [Workload(1, 40, 40)]):
        fake = fake_model(config, "fp32")
        points = fake.catalog.select(["blocks.2.hook_resid_post"])
        every = [trace.trace(fake, w, points)[0].total for w in (*before, Workload(1, 190, 190))]
        peaks.append(every[-1])
    assert peaks[0] == peaks[1]


def test_rows_by_chance_are_refused_and_short_documents_are_not(tmp_path):
    config = ReformerConfig(**{**REFORMER, "hash_seed": None})
    (model := ReformerModel(config).eval()).save_pretrained(tmp_path)
    reason = "LSHSelfAttention .* more than 32 by random .*; set hash_seed"
    with pytest.raises(HookError, match=reason):
        a_run(tmp_path, model).prepare()
    with pytest.raises(HookError, match=reason):
        extract_hidden_states(model, torch.arange(40)[None])
    ids = torch.arange(32)[None]
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = extract_hidden_states(model, ids).hidden_states
    for block in range(3):
        assert torch.equal(found[f"blocks.{block}.hook_resid_post"], states[block + 1])


def test_positions_end_with_the_last_whole_chunk():
    config = ReformerConfig(**{**REFORMER, "axial_pos_shape": [12, 15]})
    limit, model = numbers(config).context_length, ReformerModel(config).eval()
    assert limit == 160  # of 180 positions
    with torch.inference_mode():
        model(input_ids=torch.ones(1, limit, dtype=torch.int64))
        with pytest.raises(ValueError, match="axial_pos_shape"):
            model(input_ids=torch.ones(1, limit + 1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["xlm causal", "reformer causal"])
def test_what_runs_blocks_by_themselves_is_refused(tmp_path, name):
    model = built(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layer by layer: .* set extraction.execution=resident"):
        Shell(tmp_path, model.config, "fp32", torch.device("cpu"))
    frame = Frame(fake_model(model.config, "fp32").architecture, torch.device("cpu"))
    with pytest.raises(ModelError, match="layer by layer: the residual stream is not what goes"):
        inspect_calls(frame)
    with pytest.raises(ModelError, match="cannot be run again in the backward pass"):
        extract_with_checkpointing(model, torch.arange(8)[None])
    with pytest.raises(MemoryPlanError, match=r"cannot be cut to several GPUs .* resources.gpu=1"):
        over_leased(model.config, WeightFormat("fp32"))


def test_another_precision_is_that_of_every_part():
    model = XLMModel(XLMConfig(**XLM)).eval()
    ids = torch.arange(3, 20)[None]
    low = copy.deepcopy(model).bfloat16()
    with torch.inference_mode():
        states = low(input_ids=ids, output_hidden_states=True).hidden_states
    found = extract_inference_optimized(model, ids, layers=[0, 2], precision="bf16").hidden_states
    for block in (0, 2):
        assert torch.equal(found[f"blocks.{block}.hook_resid_post"], states[block + 1])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
