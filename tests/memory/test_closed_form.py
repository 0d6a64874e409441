"""The closed form against the trace, on Llama-like models of many shapes."""

import pytest
from theloom.config import model_dims
from theloom.memory import closed_form, trace
from theloom.memory.sizes import Workload
from theloom.model.fake import fake_model
from theloom.model.weight_format import WeightFormat
from transformers import AutoConfig

SHAPES = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "llama-narrow-mlp": ("llama", {"num_key_value_heads": 8, "intermediate_size": 256}),
    "llama-wide-heads": ("llama", {"num_key_value_heads": 4, "head_dim": 128}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 64}),
    "olmo2": ("olmo2", {"num_key_value_heads": 8}),
}
WEIGHT_FORMATS = [
    WeightFormat("fp32"),
    WeightFormat("bf16"),
    WeightFormat("fp16", "int8"),
    WeightFormat("bf16", "int8"),
    WeightFormat("bf16", "int4"),
    WeightFormat("fp32", "int4"),
]
MADE = [
    "hook_embed",
    "blocks.*.attn.hook_?",
    "blocks.*.hook_rot_?",
    "blocks.*.mlp.*",
    "blocks.*.hook_*_out",
]
LAST, TWO, ALL = (
    ["blocks.-1.hook_resid_post"],
    ["blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"],
    [],
)
CASES = [
    (Workload(1, 1, 512), LAST, False),
    (Workload(3, 512, 512), LAST, False),
    (Workload(3, 512, 512), ALL, True),
    (Workload(1, 4096, 512), TWO, True),
    (Workload(2, 1100, 256), ALL, True),
    (Workload(2, 1100, 256), LAST, False),
    (Workload(1, 750, 512), LAST, False),
    (Workload(1, 750, 512), MADE, False),
    (Workload(2, 512, 512), MADE, False),
]


def model_config(name: str):
    model_type, numbers = SHAPES[name]
    sizes = {
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "intermediate_size": 1408,
    }
    return AutoConfig.for_model(
        model_type, **sizes | {"vocab_size": 1000, "max_position_embeddings": 8192} | numbers
    )


def residuals(points) -> set[int]:
    return {p.block + (p.value == "hook_resid_post") for p in points}


# what quantisation changes is in the linear layers, whatever the shape of attention
CASES_OF_FORMATS = [
    (name, kind)
    for name in SHAPES
    for kind in WEIGHT_FORMATS
    if kind.quantization is None or name in ("llama-gqa", "llama-narrow-mlp", "qwen3")
]


@pytest.mark.parametrize(("name", "kind"), CASES_OF_FORMATS, ids=str)
def test_closed_form_equals_the_trace(name: str, kind: WeightFormat) -> None:
    size = model_dims.numbers(model_config(name))
    fake = fake_model(model_config(name), kind.precision, kind.quantization)
    assert closed_form.weights(size, kind) == pytest.approx(sum(fake.weights), rel=1e-3)
    catalog, far = fake.catalog, {}
    for workload, filters, held in CASES:
        points = catalog.select(filters) if filters else fake.residuals
        traced, _ = trace.trace(
            fake, workload, points, held=held, store=kind.precision, device="cuda"
        )
        blocks = 1 + max(p.block for p in points)
        formula = closed_form.forward(
            size, kind, workload, blocks, residuals(points) if held else ()
        )
        far[workload, len(points), held] = formula.total / traced.total - 1
    assert all(abs(error) <= 1e-3 for error in far.values()), {
        k: v for k, v in far.items() if abs(v) > 1e-3
    }
