"""The trace of an encoder, and of a decoder behind it, against the CPU allocator itself."""

import copy

import pytest
import torch
from support import allocator_peak
from theloom.config.model_dims import mark_side
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.checkpoint.classes import model_class
from theloom.model.fake import fake_model
from theloom.precision import torch_dtype
from transformers import AutoConfig, AutoModel

BART = {"d_model": 256, "encoder_layers": 3, "decoder_layers": 2, "vocab_size": 512}
BART |= {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 704}
T5 = {"d_model": 256, "d_kv": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 8}
CONFIGS = {
    "t5": {**T5, "d_ff": 704, "vocab_size": 512},
    "bart": {**BART, "decoder_ffn_dim": 704, "max_position_embeddings": 512},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_trace_gives_the_peak_of_a_half(kind: str, side: str, precision: str) -> None:
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    mark_side(config, side)
    real = model_class(config)._from_config(copy.deepcopy(config), dtype=torch_dtype(precision))
    described, fake = blocks.find_blocks(real.eval()), fake_model(config, precision)
    names = ["hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    names += ["hook_cross_attn_out"] if side == "decoder" else []
    chosen = build_catalog(described).select([f"{side}.blocks.*.{name}" for name in names])
    assert [p.name for p in fake.catalog.points] == [
        p.name for p in build_catalog(described).points
    ]
    workload = Workload(2, 256, 256)
    ids = torch.randint(512, (workload.windows, workload.tokens))
    for number, points in enumerate(([], chosen)):
        predicted = trace.trace(fake, workload, points, held=True)[0].total
        measured = allocator_peak(
            lambda points=points: trace.run(described, ids, workload, points, held=True),
            warm_up=not number,  # the same kernels
        )
        assert abs(predicted / measured - 1) <= 1e-3, (len(points), predicted, measured)


def test_an_encoder_has_no_weight_of_its_decoder() -> None:
    config = AutoConfig.for_model("t5", **CONFIGS["t5"])
    whole = AutoModel.from_config(copy.deepcopy(config))
    mark_side(config, "encoder")
    alone = sum(fake_model(config, "fp32").weights)
    parts = [*whole.encoder.parameters(), *whole.encoder.buffers()]
    assert alone == sum({p.data_ptr(): p.nbytes for p in parts}.values())
