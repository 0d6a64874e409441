"""The trace of models of images and audio against the CPU allocator itself."""

import copy
from pathlib import Path

import pytest
import torch
from support import allocator_peak
from theloom.config.model_dims import mark_side
from theloom.config.schema import Modality, ModelConfig
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.checkpoint.classes import model_class
from theloom.model.fake import fake_model
from theloom.model.files import hf_config
from theloom.model.towers.row_counts import RowCounts
from theloom.precision import torch_dtype
from theloom.rows import modality
from towers_support import TOWERS, build
from transformers import AutoConfig, PretrainedConfig

SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}
SIZES |= {"intermediate_size": 704}
IMAGE = {**SIZES, "image_size": 96, "patch_size": 8}
SOUND = {**SIZES, "conv_dim": [32, 32], "conv_kernel": [10, 8], "conv_stride": [10, 8]}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
WHISPER = {"d_model": 256, "encoder_layers": 3, "encoder_attention_heads": 8}
WHISPER |= {"encoder_ffn_dim": 704, "decoder_layers": 1, "decoder_attention_heads": 8}
CONFIGS = {
    "vit": ("images", IMAGE),
    "dinov2": ("images", IMAGE),
    "dinov3_vit": ("images", IMAGE),
    "siglip_vision_model": ("images", IMAGE),
    "clip_vision_model": ("images", IMAGE),
    "wav2vec2": ("audio", SOUND),
    "hubert": ("audio", SOUND),
    "whisper": ("audio", {**WHISPER, "max_source_positions": 200}),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_trace_gives_the_peak_of_a_tower(kind: str, precision: str) -> None:
    reads, values = CONFIGS[kind]
    config = AutoConfig.for_model(kind, **values)
    modality.mark(config, reads)
    check_peaks(config, kind, precision)


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "qwen2_5_vl_vision", "parakeet_encoder"])
def test_trace_gives_the_peak_with_masks_and_grids(kind: str, tmp_path: Path) -> None:
    reads = TOWERS[kind].reads
    found = ModelConfig(source=str(build(kind, tmp_path / kind)), modality=Modality[reads])
    check_peaks(hf_config(found), kind, "fp32", rows=60)


def check_peaks(config: PretrainedConfig, kind: str, precision: str, rows: int = 0) -> None:
    """The predicted peaks of last states and of some hook points are the allocator's."""
    side = "encoder." if kind == "whisper" else ""
    mark_side(config, side.rstrip("."))
    real = model_class(config)._from_config(copy.deepcopy(config), dtype=torch_dtype(precision))
    described, fake = blocks.find_blocks(real.eval()), fake_model(config, precision)
    values = ("hook_resid_post", "hook_attn_out", "hook_mlp_out")
    catalog = build_catalog(described)
    there = {p.value for p in catalog.points}
    chosen = catalog.select([f"{side}blocks.*.{value}" for value in values if value in there])
    # a pooling head behind the final norm never runs; some towers have no norm there
    norm = [p.name for p in catalog.points if p.name == f"{side}ln_final.hook_out"]
    last = catalog.select(norm or [f"{side}blocks.2.hook_resid_post"])
    assert [p.name for p in fake.catalog.points] == [p.name for p in catalog.points]
    rows = rows or RowCounts(fake).of_its_own_size
    workload = Workload(2, rows, rows)
    ids = torch.zeros(workload.windows, workload.tokens, dtype=torch.int64)
    for number, points in enumerate((last, chosen)):
        predicted = trace.trace(fake, workload, points, held=True)[0].total
        measured = allocator_peak(
            lambda points=points: trace.run(described, ids, workload, points, held=True),
            warm_up=not number,  # the same kernels
        )
        assert abs(predicted / measured - 1) <= 1e-3, (len(points), predicted, measured)
