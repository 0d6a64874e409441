"""The trace against the CPU allocator itself: the same forward, with the same taps, measured by
torch's profiler.
"""

from functools import cache

import pytest
import torch
from generation import generation
from support import allocator_peak
from theloom.hooks import blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.memory.storages import LiveStorages, Storage
from theloom.model import fake as fake_models
from theloom.model.fake import fake_model
from theloom.model.weight_format import WeightFormat
from theloom.model.without_bytes.shapes_only import shapes_only
from theloom.precision import torch_dtype
from torch._subclasses.fake_tensor import FakeTensorMode
from traced_models import MODELS, model_config
from transformers import AutoModel, DynamicCache

FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FILTERS = {
    "none": None,
    "some": ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"],
    "all": ["blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"],
}
WORKLOADS = {"one pass": Workload(2, 512, 512), "streamed": Workload(2, 640, 192)}
# A processor without instructions for BF16 takes ten times as long for its products
BF16_WORKLOADS = {"one pass": Workload(1, 200, 200), "streamed": Workload(1, 208, 64)}
INSIDE = [
    "blocks.*.attn.hook_pattern",
    "blocks.1.*.hook_normalized",
    "blocks.*.attn.hook_v",
    "blocks.*.hook_mlp_out",
]
SHORT_WORKLOADS = {
    "one pass": Workload(1, 256, 256),
    "streamed": Workload(2, 160, 48),
    "in two": Workload(1, 90, 64),
}


def real_peak(described, workload, points, warm_up) -> int:
    ids = torch.randint(512, (workload.windows, workload.tokens))
    return allocator_peak(lambda: trace.run(described, ids, workload, points, held=True), warm_up)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_trace_gives_the_peak_of_the_cpu_allocator(name: str, precision: str) -> None:
    workloads = WORKLOADS if precision == "fp32" else BF16_WORKLOADS
    far = errors(name, precision, FILTERS, workloads)
    assert all(-1e-3 - share <= error <= 1e-3 for error, share in far.values()), far


@pytest.mark.parametrize("name", MODELS)
def test_it_does_so_for_hook_points_inside_the_blocks(name: str) -> None:
    far = errors(name, "fp32", {"inside": INSIDE}, SHORT_WORKLOADS)
    assert all(abs(error) <= 1e-3 for error, _ in far.values()), far


@pytest.mark.parametrize(
    ("name", "quantization"), [("gpt2", None), ("gemma2", None), ("qwen3_moe", "int8")]
)
def test_every_storage_is_that_of_torch_s_own_mode(name, quantization, monkeypatch):
    """Operations that were looked up have the results that are computed anew each time."""

    def computed() -> FakeTensorMode:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.cache_enabled = False
        return mode

    def found() -> tuple[list[tuple[int, int]], tuple[Storage, ...]]:
        fake = fake_model(model_config(name), "bf16", quantization)
        workload = SHORT_WORKLOADS["in two"]
        peak, live = trace.trace(fake, workload, fake.residuals, True, "fp32")
        return live.events, peak.storages

    looked_up = [found(), found()]
    monkeypatch.setattr(fake_models, "WithoutBytes", computed)
    assert looked_up == [found()] * 2


def test_what_was_found_of_a_model_is_kept_for_one_like_it(monkeypatch):
    """For stages that run in one process: of another model, device or number of threads it is
    found anew, and it is each time what a first trace finds."""
    kept = {}
    monkeypatch.setattr(fake_models, "_FOUND", kept)
    one, other = model_config("gpt2"), model_config("gpt2")
    other.n_layer = 2

    def found(clear: bool) -> list[object]:
        answers = []
        for config in (one, other, one):
            traced = Traced(config)
            points = traced.catalog().select(["blocks.1.*.hook_normalized"])
            for device in ("cpu", "cuda"):
                if clear:
                    kept.clear()
                workload, kind = Workload(1, 90, 64), WeightFormat("bf16", "int8")
                answers.append(traced.forward(kind, workload, points, device=device))
                answers.append(traced.unneeded(points))
        return answers

    first = found(clear=True)
    assert first[:4] == first[8:] != first[4:8]
    kept.clear()
    assert found(clear=False) == first
    assert len(kept) == 2 * 4  # two passes, the catalog, and the modules that are left out
    torch.set_num_threads(2)
    found(clear=False)
    assert len(kept) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("windows", "tokens", "keys", "width", "causal"),
    [
        (1, 24, 24, 16, True),
        (2, 64, 65, 33, False),
        (1, 192, 640, 64, True),
        (1, 800, 801, 16, False),
    ],
)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fused_attention_takes_what_its_kernel_takes(
    precision: str, threads: int, windows: int, tokens: int, keys: int, width: int, causal: bool
) -> None:
    """Also where the processor multiplies tiles, and the kernel copies keys and values."""
    before, dtype, heads = torch.get_num_threads(), torch_dtype(precision), 9
    query = torch.randn(windows, heads, tokens, width).to(dtype)
    key = torch.randn(windows, heads, keys, width).to(dtype)
    arguments = (query, key, key, 0.0, causal)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            found = allocator_peak(lambda: FUSED_ATTENTION(*arguments))
        result = query.nbytes + 4 * windows * heads * tokens  # the rows' sums are FP32
        assert found == result + trace.CPU_KERNELS[FUSED_ATTENTION](*arguments)
    finally:
        torch.set_num_threads(before)


def errors(
    name: str, precision: str, filters_by_name, workloads
) -> dict[tuple[str, str], tuple[float, float]]:
    """By how much the trace is off the real peak, and what products take within themselves, as
    shares of the peak.
    """
    described = blocks.find_blocks(
        AutoModel.from_config(model_config(name), dtype=torch_dtype(precision)).eval()
    )
    fake = fake_model(model_config(name), precision)
    far = {}
    warm_up = True  # once for each shape: the filters read what the model makes anyway
    for requested, filters in filters_by_name.items():
        chosen = [] if filters is None else build_catalog(described).select(filters)
        for shape, workload in workloads.items():
            predicted = trace.trace(fake, workload, chosen, held=True)[0].total
            measured = real_peak(described, workload, chosen, warm_up)
            within = within_products(
                described, workload.windows * min(workload.tokens, workload.chunk_size)
            )
            far[requested, shape] = (predicted / measured - 1, within / measured)
        warm_up = False
    return far


def within_products(described, tokens: int) -> int:
    """Bytes that oneDNN takes for a product of 16 bits on some processors, some 0.1 to 0.2 MB for
    each thread.

    The trace leaves them out: they depend on the processor, and not on the model's size.
    """
    linears = [m for m in described.model.modules() if isinstance(m, torch.nn.Linear)]
    sizes = {(m.in_features, m.out_features) for m in linears if m.weight.dtype != torch.float32}
    return max(
        (_within_product(*size, linears[0].weight.dtype, tokens) for size in sizes), default=0
    )


@cache
def _within_product(width: int, outputs: int, dtype: torch.dtype, tokens: int) -> int:
    values, weight = (
        torch.zeros(tokens, width, dtype=dtype),
        torch.zeros(outputs, width, dtype=dtype),
    )
    with torch.inference_mode():
        return (
            allocator_peak(lambda: torch.nn.functional.linear(values, weight))
            - tokens * outputs * dtype.itemsize
        )


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 20])
def test_generation_has_the_peak_of_every_step_traced(new_tokens: int) -> None:
    fake = fake_model(model_config("llama-gqa"), "bf16", lm_head=True)
    model = fake.architecture.model
    live = LiveStorages()
    with fake.mode, shapes_only(), torch.inference_mode():
        steps = [
            torch.zeros(2, tokens, dtype=torch.int64) for tokens in [16] + [1] * (new_tokens - 1)
        ]
        live.ignore([*steps, *model.parameters(), *model.buffers()])
        with live:
            cache = DynamicCache(config=model.config)
            for ids in steps:
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            del cache
    assert generation(fake, 2, 16, new_tokens).peak().total == live.peak().total
