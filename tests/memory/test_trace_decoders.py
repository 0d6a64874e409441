"""The trace of a decoder behind an encoder of audio against the CPU allocator itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders_support import build
from support import allocator_peak
from theloom.config.schema import Modality, ModelConfig, Side
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.checkpoint.classes import model_class
from theloom.model.fake import fake_model
from theloom.model.files import hf_config
from theloom.precision import torch_dtype

_LAYERS = {"d_model": 256, "encoder_layers": 3, "decoder_layers": 2}
_LAYERS |= {f"{half}_attention_heads": 8 for half in ("encoder", "decoder")}
_LAYERS |= {f"{half}_ffn_dim": 704 for half in ("encoder", "decoder")}
_MOONSHINE = {"hidden_size": 256, "intermediate_size": 704, "max_position_embeddings": 512}
_MOONSHINE |= {"encoder_num_hidden_layers": 3, "decoder_num_hidden_layers": 2}
_MOONSHINE |= {f"{half}_num_attention_heads": 8 for half in ("encoder", "decoder")}
_MOONSHINE |= {f"{half}_num_key_value_heads": 8 for half in ("encoder", "decoder")}
SIZES: dict[str, dict[str, Any]] = {
    "whisper": {**_LAYERS, "max_target_positions": 512},
    "moonshine": _MOONSHINE,
    "speech_to_text": {**_LAYERS, "max_target_positions": 512},
    "canary": {},
}


# in 16 bits, of which processors without them take long, one kind shows what all have
@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "fp32") for kind in SIZES), ("whisper", "bf16")]
)
def test_trace_gives_the_peak_of_a_decoder(kind: str, precision: str, tmp_path: Path) -> None:
    folder = build(kind, tmp_path / kind, **SIZES[kind])
    found = ModelConfig(source=str(folder), modality=Modality["audio"], side=Side["decoder"])
    config = hf_config(found)
    real = model_class(config)._from_config(copy.deepcopy(config), dtype=torch_dtype(precision))
    described, fake = blocks.find_blocks(real.eval()), fake_model(config, precision)
    names = ("hook_resid_post", "hook_attn_out", "hook_cross_attn_out", "hook_mlp_out")
    catalog = build_catalog(described)
    chosen = catalog.select([f"decoder.blocks.*.{name}" for name in names])
    assert [p.name for p in fake.catalog.points] == [p.name for p in catalog.points]
    # in BF16 products of few rows take a scratchpad of 60 KB within themselves, as of any model
    for rows in (60, 300) if precision == "fp32" else (300,):
        workload = Workload(2, rows, rows)
        ids = torch.randint(300, (workload.windows, workload.tokens))
        last = catalog.select(["decoder.blocks.1.hook_resid_post"])
        for number, points in enumerate((last, chosen)):
            predicted = trace.trace(fake, workload, points, held=True)[0].total
            measured = allocator_peak(
                lambda points=points, ids=ids, workload=workload: trace.run(
                    described, ids, workload, points, held=True
                ),
                warm_up=not number,  # the same kernels
            )
            assert abs(predicted / measured - 1) <= 1e-3, (rows, len(points), predicted, measured)
