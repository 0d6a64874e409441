"""`theloom hooks`: the list is what forward passes of the model with its weights give."""

import json

import pytest
import torch
from support import build_tiny, values_of
from theloom.cli import main
from theloom.hooks import blocks
from transformers import AutoModel


def printed(capsys, *words: str) -> str:
    assert main.main(["hooks", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_names_and_shapes_are_those_of_a_forward_pass(model_type, tmp_path, capsys):
    folder = build_tiny(model_type, tmp_path / model_type)
    tokens = 7
    report = json.loads(printed(capsys, str(folder), "--json", "--tokens", str(tokens)))
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    values = values_of(blocks.find_blocks(model), torch.arange(tokens)[None])
    assert sorted(h["name"] for h in report["hooks"]) == sorted(values)
    for hook in report["hooks"]:
        value = values[hook["name"]]
        assert hook["bytes_per_token"] == value.numel() * 4 / tokens, hook
    assert ("hook_pos_embed" in report["unsupported"]) == (model_type != "gpt2")


def test_blocks_with_rows_of_one_shape_share_a_line(capsys):
    shown = printed(capsys, "7b", "--filter", "blocks.*.hook_resid_post", "--dtype", "bf16")
    cells = [line.split() for line in shown.splitlines()]
    assert ["blocks.*.hook_resid_post", "32", "4096", "8,192"] in cells
    assert "all of them: 32 hook points, 262,144 bytes per token" in shown
    shown = printed(capsys, "7b", "--filter", "blocks.1?.hook_mlp_out,blocks.2.hook_mlp_out")
    assert "blocks.2,10-19.hook_mlp_out" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["7b", "--filter", "blocks.0.hook_nothing"], "hook_nothing"),
        (["9000b"], "is neither a profile"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert main.main(["hooks", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
