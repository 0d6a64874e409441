"""Routers of mixtures of experts through the stages: what `output_router_logits` gives, and the
experts that each token goes to.
"""

import shutil

import pytest
import theloom
import torch
from layerwise_support import LATENT
from support import build_tiny, stages, with_bytes
from theloom.errors import HookError
from theloom.hooks.points import HookCatalog, check_integers, point
from theloom.pipeline import load_model
from transformers import AutoModelForCausalLM

FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
NAMED = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DENSE_FIRST = {**ROUTED, "first_k_dense_replace": 1, "num_key_value_heads": 4}
MIXTURES = {
    "deepseek_v2": {**LATENT, **DENSE_FIRST, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**LATENT, **DENSE_FIRST, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 0,
    },
    "glm4_moe": {**DENSE_FIRST, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "gpt_oss": {**FOUR, "head_dim": 16},
    "granitemoe": FOUR,
    "mixtral": FOUR,
    "olmoe": {**NAMED, "pad_token_id": None, "eos_token_id": None},
    "phimoe": FOUR,
    "qwen2_moe": {
        **NAMED,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {},
}
# whose experts are those of the largest logits: no bias, no groups
BY_LOGITS = ("gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in {"one": "x", "two": "The quick brown fox jumps"}.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def small(texts, execution):
    hooks = "blocks.*.mlp.hook_router_*,blocks.*.mlp.hook_expert_indices"
    return (
        f"corpus=text corpus.path={texts} corpus.context_length=48 "
        "extraction.batch_tokens=1 extraction.shards=1 "
        f"extraction.execution={execution} memory.activation_cache_filter=[{hooks}]"
    )


@pytest.mark.parametrize("kind", MIXTURES)
def test_rows_are_what_the_model_says_of_its_router(tmp_path, texts, kind):
    numbers = {"num_hidden_layers": 2, "vocab_size": 260, **MIXTURES[kind]}
    folder = with_bytes(build_tiny(kind, tmp_path / "model", **numbers))
    resident = stages(tmp_path / "resident", folder, small(texts, "resident")).all()
    layerwise = stages(tmp_path / "layerwise", folder, small(texts, "layerwise"))
    for name in ("estimate.h5", "tokens.h5"):  # which are the same
        shutil.copy(resident.folder / name, layerwise.folder)
    files = [layerwise.folder / f"{name}.h5" for name in ("estimate", "tokens", "model")]
    load_model.record(layerwise.config("model"), *files)
    layerwise.extract()
    layerwise.merge()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for run in (resident, layerwise):
        acts = theloom.open(run.activations)
        names = [name for name in acts.hooks if name.endswith("router_logits")]
        for number in range(len(acts.documents)):
            document = acts.document(number)
            ids = torch.from_numpy(document.input_ids.astype("<i8"))[None]
            with torch.no_grad():
                said = model(ids, output_router_logits=True, use_cache=False).router_logits
            said = [logits.reshape(ids.shape[1], -1) for logits in said]
            assert len(names) == len(said) > 0
            for name, logits in zip(names, said, strict=True):
                assert torch.equal(document[name], logits.float()), (kind, name)
                experts = document[name.replace("router_logits", "expert_indices")]
                scores = document[name.replace("router_logits", "router_scores")]
                assert experts.shape == scores.shape == (ids.shape[1], 2)
                assert torch.equal(experts, experts.round())
                assert ((experts >= 0) & (experts < 4)).all()
                assert (scores > 0).all()
                if kind in BY_LOGITS:
                    chosen = logits.topk(2).indices.float()
                    assert torch.equal(experts.sort().values, chosen.sort().values)
    resident.verify()
    shutil.rmtree(tmp_path)


def test_a_model_without_a_router_says_why(tmp_path, tiny_llama):
    hooks = "memory.activation_cache_filter=[blocks.1.mlp.hook_router_logits]"
    run = stages(tmp_path, tiny_llama, hooks)
    with pytest.raises(HookError, match=r"this block has no mixture of experts") as error:
        run.prepare()
    assert "\n" not in str(error.value)


def test_numbers_of_experts_are_exact_or_refused():
    def of(experts):
        points = [
            point("mlp.hook_router_logits", 0, 1, [experts]),
            point("mlp.hook_expert_indices", 0, 1, [2]),
        ]
        return points, HookCatalog(points, {})

    check_integers(*of(257), "bf16")
    check_integers(*of(512), "fp32")
    check_integers(of(512)[0][:1], of(512)[1], "bf16")
    with pytest.raises(HookError, match=r"its 512 experts are not told apart in bf16"):
        check_integers(*of(512), "bf16")


def test_numbers_of_experts_are_not_averaged(tmp_path, texts):
    folder = with_bytes(build_tiny("mixtral", tmp_path / "model", vocab_size=260, **FOUR))
    requested = small(texts, "resident")
    run = stages(tmp_path / "run", folder, f"{requested} rows.pool=mean")
    with pytest.raises(HookError, match="are numbers of experts"):
        run.prepare()
