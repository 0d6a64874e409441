"""Layerwise against resident execution: the same bits, for every supported architecture."""

import pytest
import torch
from layerwise_support import assert_equal, build, layerwise_rows, load, resident_rows, some_batches
from support import a_config
from theloom.engine import progress
from theloom.engine.layerwise import block_loader
from theloom.model import files

ARCHITECTURES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_hook_points_equal_resident_mode_bit_for_bit_in_chunks_too(tmp_path, model_type):
    folder = build(model_type, tmp_path)
    loaded = load(folder)
    points = loaded.catalog.points
    assert len(points) > 40
    expected = resident_rows(loaded, points, some_batches(), chunk_size=7)
    assert_equal(layerwise_rows(folder, points, some_batches(), chunk_size=7), expected)


def test_smollm2_equals_resident_mode_bit_for_bit_at_all_hook_points(smollm2_part):
    loaded = load(smollm2_part.folder)
    points = loaded.catalog.points
    generator = torch.Generator().manual_seed(2)
    batches = [
        torch.randint(49152, shape, generator=generator) for shape in [(1, 70), (2, 32), (3, 5)]
    ]
    expected = resident_rows(loaded, points, batches, chunk_size=32)
    assert len(points) == 4 + 6 * 20
    assert_equal(layerwise_rows(smollm2_part.folder, points, batches, chunk_size=32), expected)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_equals_resident_mode(tmp_path, model_type, precision):
    folder = build(model_type, tmp_path)
    loaded = load(folder, precision)
    points = loaded.catalog.select(
        ["blocks.*.hook_resid_post", "hook_embed", "ln_final.hook_normalized"]
    )
    batches = some_batches()
    expected = resident_rows(loaded, points, batches, chunk_size=7)
    assert_equal(layerwise_rows(folder, points, batches, 7, precision), expected)


def test_a_model_without_attention_equals_resident_mode(tmp_path):
    folder = build("mamba2", tmp_path)
    loaded = load(folder)
    points = [p for p in loaded.catalog.points if not p.of_document]
    batches = some_batches()[2:]
    assert_equal(
        layerwise_rows(folder, points, batches, 7), resident_rows(loaded, points, batches, 7)
    )


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("groups", [2, 64])
def test_windows_of_a_batch_in_groups_give_the_same_rows_but_for_rounding(
    tmp_path, groups, spilled
):
    folder = build("llama", tmp_path / "model")
    loaded = load(folder)
    points, batches = loaded.catalog.points, some_batches()
    found = layerwise_rows(
        folder, points, batches, 7, spilled=tmp_path / "shard" if spilled else None, groups=groups
    )
    expected = resident_rows(loaded, points, batches, 7)
    assert found.keys() == expected.keys()
    for key, chunks in expected.items():
        for start, values in chunks.items():
            torch.testing.assert_close(found[key][start], values, rtol=1e-4, atol=1e-5)


def test_residuals_on_disk_give_the_same_rows(tmp_path):
    folder = build("llama", tmp_path / "model")
    loaded = load(folder)
    points, batches = loaded.catalog.points, some_batches()
    found = layerwise_rows(folder, points, batches, 7, spilled=tmp_path / "shard")
    assert_equal(found, resident_rows(loaded, points, batches, 7))


@pytest.mark.parametrize(
    ("names", "last"),
    [(["blocks.1.hook_resid_post"], 1), (["hook_embed"], -1), (["blocks.0.*"], 0)],
)
def test_blocks_beyond_the_deepest_hook_point_are_not_read(tmp_path, monkeypatch, names, last):
    folder = build("llama", tmp_path)
    loaded = load(folder)
    points = loaded.catalog.select(names)
    read, attach = [], block_loader.BlockSource._read

    def record(self, block, slot):
        read.append(block)
        return attach(self, block, slot)

    monkeypatch.setattr(block_loader.BlockSource, "_read", record)
    found = layerwise_rows(folder, points, some_batches(), 7)
    assert read == list(range(last + 1))
    assert_equal(found, resident_rows(loaded, points, some_batches(), 7))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_rows_of_resident_mode_there(tmp_path, precision):
    from theloom.model import loading

    folder = build("gemma3_text", tmp_path)
    config = a_config(folder, f"memory.precision_mode={precision} extraction.device=cuda")
    loaded = loading.load_model(config, files.prepare_files(config.model))
    points = loaded.catalog.points
    expected = resident_rows(loaded, points, some_batches(), chunk_size=7)
    found = layerwise_rows(folder, points, some_batches(), 7, precision, device="cuda")
    assert_equal(found, expected)


def test_progress_is_logged_by_block_and_batch(tmp_path, caplog, monkeypatch):
    folder = build("llama", tmp_path)
    points = load(folder).catalog.select(["blocks.*.hook_resid_post"])
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with caplog.at_level("INFO"):
        layerwise_rows(folder, points, some_batches(), 7)
    assert "block 1 of 3, batch 1 of 5" in caplog.text
    assert "block 3 of 3, batch 5 of 5" in caplog.text
