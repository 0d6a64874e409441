"""Tensors of a checkpoint by block: several files, fused keys, and files that lack some."""

import json

import pytest
import torch
from layerwise_support import (
    assert_equal,
    build,
    layerwise_rows,
    load,
    resident_rows,
    shell_of,
    some_batches,
)
from safetensors.torch import load_file, save_file
from theloom.engine.layerwise import block_loader, weights_index
from theloom.errors import ModelError
from transformers import AutoModelForCausalLM


def test_a_model_in_several_files_is_read_layer_by_layer(tmp_path):
    folder = build("llama", tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        tmp_path / "split", max_shard_size="60KB"
    )
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    points = load(folder).catalog.select(["blocks.*.hook_resid_post"])
    expected = resident_rows(load(tmp_path / "split"), points, some_batches(), 7)
    assert_equal(layerwise_rows(tmp_path / "split", points, some_batches(), 7), expected)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_apart_on_disk_and_fused_in_the_model(tmp_path, model_type):
    folder = build(model_type, tmp_path)
    keys = weights_index.index(folder)
    assert any("experts.0." in key for key in keys)
    with shell_of(folder) as (shell, _):
        assert shell.checkpoint.is_converted(2)
        assert not shell.checkpoint.is_converted(weights_index.OUTSIDE)


def test_every_tensor_of_a_block_is_the_one_that_transformers_loads(tmp_path):
    folder = build("mixtral", tmp_path)
    resident = load(folder).architecture.blocks
    with shell_of(folder) as (shell, source):
        for number in source.sweep(range(3)):
            expected = resident[number].state_dict()
            found = shell.blocks[number].state_dict()
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


def test_a_missing_weight_is_refused_by_name(tmp_path):
    folder = build("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lacking = r"lack 1 weights.*layers\.1\.mlp\.up_proj"
    with shell_of(folder) as (shell, source), pytest.raises(ModelError, match=lacking):
        list(source.sweep(range(3)))
    assert all(p.is_meta for p in shell.blocks[1].parameters())


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    folder = build("llama", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short"):
        weights_index.index(folder)
    file.unlink()  # where both are there, transformers takes the file
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "not-there.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"not-there\.safetensors"):
        weights_index.index(folder)


def test_an_error_of_the_reading_thread_ends_the_sweep(tmp_path, monkeypatch):
    def fails(self, stored, buffer):
        raise OSError("the disk is gone")

    with shell_of(build("llama", tmp_path)) as (_, source):
        monkeypatch.setattr(block_loader.BlockSource, "_fill", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            list(source.sweep(range(3)))


def test_blocks_are_read_once_each_and_two_buffers_are_reused(tmp_path):
    with shell_of(build("llama", tmp_path)) as (shell, source):
        before, places = source.bytes_read, set()
        for number in source.sweep(range(3)):
            places.add(shell.blocks[number].mlp.up_proj.weight.data_ptr())
        assert source.bytes_read - before == sum(shell.checkpoint.nbytes(n) for n in range(3))
        assert len(places) == 2
        assert source.waited > 0
