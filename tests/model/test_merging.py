"""Weights merged here are those of PEFT's `merge_and_unload`, for each kind of adapter."""

import pytest
import torch
from adapter_support import merge_with_peft, save_adapter
from peft import (
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RoadConfig,
    TrainableTokensConfig,
    WaveFTConfig,
)
from support import build_tiny
from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model.adapters.files import MERGED, find_adapters
from theloom.model.adapters.merging import check_adapters, read_adapters
from transformers import AutoConfig, AutoModel

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "bias": LoraConfig(r=4, target_modules=TARGETS, bias="all"),
    "dora": LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"], use_dora=True),
    "lora": LoraConfig(
        r=4,
        target_modules=TARGETS,
        use_rslora=True,
        rank_pattern={"q_proj": 8, "model.layers.1.self_attn.v_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    "regex": LoraConfig(r=4, target_modules=r"model\.layers\.[01]\.self_attn\.q_proj"),
    "saved": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3, 5]),
    "C3A": C3AConfig(block_size=16, target_modules=TARGETS),
    "DELORA": DeloraConfig(r=4, target_modules=TARGETS),
    "FOURIERFT": FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "HRA": HRAConfig(r=4, target_modules=TARGETS),
    "IA3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LOHA": LoHaConfig(r=4, target_modules=TARGETS),
    "LOKR": LoKrConfig(r=4, target_modules=TARGETS),
    "MISS": MissConfig(r=4, target_modules=TARGETS),
    "OFT": OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "ROAD": RoadConfig(group_size=16, target_modules=TARGETS),
    "TRAINABLE_TOKENS": TrainableTokensConfig(
        token_indices=[1, 2], target_modules=["embed_tokens"]
    ),
    "WAVEFT": WaveFTConfig(n_frequency=20, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return build_tiny("llama", folder, attention_bias=True, num_hidden_layers=2)


def of(base, *adapters):
    return find_adapters(ModelConfig(source=str(base), adapter=[str(a) for a in adapters]))


def test_every_kind_that_is_merged_is_tested():
    assert set(MERGED) == {"LORA", *(name for name in KINDS if name.isupper())}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_peft_merges(tmp_path, base, kind):
    folder = save_adapter(base, tmp_path / "adapter", KINDS[kind])
    expected = merge_with_peft(base, [folder]).model.state_dict()
    plain = AutoModel.from_pretrained(base)
    before = {name: t.clone() for name, t in plain.state_dict().items()}
    with torch.device("meta"):
        by_parts = AutoModel.from_config(AutoConfig.from_pretrained(base))
    adapters = read_adapters(by_parts, of(base, folder))
    assert all(torch.equal(t, before[name]) for name, t in plain.state_dict().items())
    for module, real in zip(by_parts.modules(), plain.modules(), strict=True):
        module._parameters.update(
            {
                n: torch.nn.Parameter(p.detach().clone())
                for n, p in real._parameters.items()
                if p is not None
            }
        )
    for block in by_parts.layers:
        adapters.merge(set(block.modules()))
    adapters.merge(set(by_parts.modules()) - {m for b in by_parts.layers for m in b.modules()})
    whole = read_adapters(plain, of(base, folder))
    whole.merge()
    for model in (plain, by_parts):
        merged = model.state_dict()
        assert merged.keys() == expected.keys()
        assert [name for name, t in merged.items() if not torch.equal(t, expected[name])] == []
    assert any(not torch.equal(t, before[name]) for name, t in expected.items())
    assert whole.ignored == [["lm_head"] if kind == "saved" else []]


def test_adapters_are_merged_again_into_a_block_that_is_read_again(tmp_path, base):
    first = save_adapter(base, tmp_path / "first", KINDS["dora"])
    second = save_adapter(base, tmp_path / "second", KINDS["saved"], seed=1)
    expected = merge_with_peft(base, [first, second]).model.state_dict()
    model = AutoModel.from_pretrained(base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapters = read_adapters(model, of(base, first, second))
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.data = before[name].clone()
        adapters.merge()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_experts_that_an_adapter_targets_by_parameter_are_merged(tmp_path):
    base = build_tiny("qwen3_moe", tmp_path / "base", num_hidden_layers=2)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    folder = save_adapter(base, tmp_path / "adapter", config)
    expected = merge_with_peft(base, [folder]).model.state_dict()
    model = AutoModel.from_pretrained(base)
    read_adapters(model, of(base, folder)).merge()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_an_adapter_of_another_shape_or_model_is_refused(tmp_path, base):
    other = build_tiny("llama", tmp_path / "other", hidden_size=32, num_hidden_layers=3)
    wide = save_adapter(other, tmp_path / "wide", KINDS["lora"])
    with pytest.raises(ModelError, match=r"it is of another model"):
        check_adapters(AutoConfig.from_pretrained(base), of(base, wide))
    gpt2 = build_tiny("gpt2", tmp_path / "gpt2")
    strange = save_adapter(gpt2, tmp_path / "strange", LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ModelError, match="does not fit LlamaModel") as error:
        check_adapters(AutoConfig.from_pretrained(base), of(base, strange))
    assert "\n" not in str(error.value)
