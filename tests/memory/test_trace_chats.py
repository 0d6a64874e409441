"""The trace of conversations with images against the CPU allocator itself."""

import copy

import pytest
from chats_support import CONFIGS, WINDOWED, build, messages_of, plain_inputs, write_chats
from support import allocator_peak
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model.checkpoint.classes import model_class
from theloom.model.weight_format import WeightFormat
from theloom.precision import torch_dtype
from theloom.rows import modality
from transformers import AutoConfig


@pytest.mark.parametrize("kind", [*CONFIGS, *WINDOWED])
def test_trace_gives_the_peak_of_images_in_a_chat(kind: str, tmp_path) -> None:
    corpus = write_chats(tmp_path / "corpus")
    sizes = {"hidden_size": 256, "num_attention_heads": 32, "intermediate_size": 704}
    folder = build(kind, tmp_path / "model", **sizes)
    config = AutoConfig.from_pretrained(folder)
    modality.mark(config, modality.CHAT)
    inputs = plain_inputs(kind, folder, corpus, messages_of(corpus)[2])
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    workload = Workload(1, ids.shape[1], ids.shape[1])
    for precision in ("fp32", "bf16"):
        weights = WeightFormat(precision)
        real = model_class(config)._from_config(copy.deepcopy(config), dtype=torch_dtype(precision))
        described, traced = blocks.find_blocks(real.eval()), Traced(config)
        catalog = build_catalog(described)
        points = catalog.select(["blocks.*.hook_resid_post", "blocks.*.hook_mlp_out"])
        predicted = traced.forward(weights, workload, points, True, "cpu", inputs).total
        measured = allocator_peak(
            lambda described=described, points=points: trace.run(
                described, ids, workload, points, held=True, inputs=inputs
            )
        )
        assert abs(predicted / measured - 1) <= 1e-3, (precision, predicted, measured)
        text = traced.forward(weights, workload, points, True, "cpu").total
        assert predicted > text
