"""Several GPUs for one model: how many, and which blocks where. accelerate checks the maps on
transformers' models.
"""

import numpy as np
import pytest
import torch
from accelerate.utils import check_device_map
from support import ROOT
from theloom.config import compose, frozen, model_dims
from theloom.corpus import batching
from theloom.devices import gpu_lease
from theloom.devices.host import DeviceMemory
from theloom.devices.workspace import cublas_workspace
from theloom.engine.selection import Selection
from theloom.errors import MemoryPlanError
from theloom.hooks import blocks
from theloom.memory.estimators import ClosedForm
from theloom.model import device_map
from theloom.model.weight_format import WeightFormat
from theloom.pipeline import resources
from theloom.planning import estimate, multi_gpu, plan
from theloom.store.ring_buffer import bytes_ahead, ring_bytes
from theloom.store.shard_file import ShardTokens
from transformers import AutoConfig, AutoModel


def on_meta(model_type: str, **numbers) -> blocks.Architecture:
    with torch.device("meta"):
        return blocks.find_blocks(
            AutoModel.from_config(AutoConfig.for_model(model_type, **numbers))
        )


def equal(free: int, gpus: int) -> tuple[list[int], list[tuple[int, int]]]:
    """So many bytes for weights on each of some GPUs, beside what their libraries take."""
    return [free + cublas_workspace((8, 0))] * gpus, [(8, 0)] * gpus


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
MODELS = {
    "llama": SMALL | {"num_hidden_layers": 10},
    "gpt2": {"n_layer": 7, "n_embd": 64, "n_head": 4, "vocab_size": 100},
    "gpt_neox": SMALL | {"num_hidden_layers": 6},
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("gpus", [2, 3])
def test_every_weight_has_one_gpu_and_blocks_keep_their_order(model_type, gpus):
    described = on_meta(model_type, **MODELS[model_type])
    found = device_map.cut_to(described, WeightFormat("fp32"), *equal(10**6, gpus))
    check_device_map(described.model, found)
    names = {id(module): name for name, module in described.model.named_modules()}
    of_blocks = [found[names[id(block)]] for block in described.blocks]
    assert of_blocks == sorted(of_blocks)
    assert set(of_blocks) == set(range(gpus))
    embeddings = names[id(described.model.get_input_embeddings())]
    assert found[embeddings] == 0
    last_norm = [name for name in found if name.endswith(("norm", "ln_f"))]
    assert [found[name] for name in last_norm] == [gpus - 1]


def test_gpus_take_blocks_in_proportion_to_what_they_have_free():
    described = on_meta("llama", **MODELS["llama"] | {"vocab_size": 2})
    block = device_map._bytes(described.blocks[0], WeightFormat("fp32"))
    ampere, hopper = (8, 0), (9, 0)
    free = [4 * block + cublas_workspace(ampere), 16 * block + cublas_workspace(hopper)]
    # libraries take more of a Hopper GPU: as the first one it has room for no block
    for first, expected in ((ampere, [2, 8]), (hopper, [0, 10])):
        found = device_map.cut_to(described, WeightFormat("fp32"), free, [first, hopper])
        counts = [[v for k, v in found.items() if "layers" in k].count(gpu) for gpu in (0, 1)]
        assert counts == expected


def test_a_model_that_does_not_fit_is_rejected_with_what_to_do():
    described = on_meta("llama", **MODELS["llama"])
    with pytest.raises(
        MemoryPlanError, match=r"do not fit 2 GPUs .* ask for more with resources.gpu"
    ):
        device_map.cut_to(described, WeightFormat("fp32"), *equal(100_000, 2))


def settings(profile: str, overrides: str):
    (run,) = compose.runs(ROOT / "config", profile, overrides).values()
    return frozen.to_config(run.config)


@pytest.mark.parametrize(
    ("profile", "gpu", "gpus"),
    [("7b", 80, 1), ("7b", 12, 2), ("30b", 80, 1), ("30b", 40, 2), ("70b", 80, 3)],
)
def test_as_few_gpus_are_requested_as_hold_the_model(profile, gpu, gpus):
    requested = settings(profile, f"resources.gpu_memory_gb={gpu} memory.quantization=null")
    found = resources.of(requested)
    assert found.gpu == gpus
    assert found.min_free_gpu_mb * 1e6 <= 0.85 * gpu * 1e9
    weights = 2 * requested.model.architecture.parameters
    assert gpus * 0.85 * gpu * 1e9 >= weights - 2 * 2 * 152064 * 8192  # the LM head is not loaded


def test_the_fullest_gpu_has_its_share_of_weights_and_what_goes_to_the_next():
    requested = settings("70b", "memory.quantization=null")
    size = model_dims.dims_of_profile(requested.model.architecture)
    whole = estimate.estimate(requested, ClosedForm(size), "cuda")
    part = multi_gpu.of_one(whole, multi_gpu.share(80, 3))
    assert part.weights["bf16"] == pytest.approx(whole.weights["bf16"] * 27 / 80, rel=1e-6)
    for one, all_of_it in zip(part.passes["bf16"], whole.passes["bf16"], strict=True):
        residuals = 3 * 8192 * 2 * min(one.tokens, one.chunk_size)  # of a batch for each GPU
        kept = one.parts.temporaries - all_of_it.parts.temporaries
        assert residuals <= kept < part.weights["bf16"] / 50
        assert one.parts.kv_cache == int(all_of_it.parts.kv_cache * 27 / 80)


def test_what_libraries_take_follows_from_the_gpu_s_capability():
    requested = settings("7b", "memory.quantization=null")
    size = model_dims.dims_of_profile(requested.model.architecture)
    whole = estimate.estimate(requested, ClosedForm(size), "cuda")
    ampere, hopper = (multi_gpu.least(whole, "bf16", c) for c in ((8, 0), (9, 0)))
    assert hopper - ampere == (32 << 20) - (8 << 20) - (128 << 10)
    assert multi_gpu.least(whole, "bf16") == hopper  # not known: the most of all
    named = [
        resources.of(settings("7b", f"memory.quantization=null resources.gpu_model={model}"))
        for model in ("a100", "h100")
    ]
    assert named[1].min_free_gpu_mb - named[0].min_free_gpu_mb == pytest.approx(25, abs=1)


def test_several_gpus_take_host_memory_for_the_rows_of_all_their_batches():
    rows, ring, most = 1_000_000, 512 << 20, 8 << 30
    size = model_dims.dims_of_profile(settings("7b", "").model.architecture)
    whole, longer = (
        estimate.estimate(
            settings("7b", f"memory.streaming_chunk_size={chunk}"), ClosedForm(size), "cuda"
        )
        for chunk in (1024, 4096)
    )
    assert multi_gpu.ring_growth(whole, rows, 1) == 0
    assert multi_gpu.ring_growth(whole, rows, 3) == 3 * 2048 * rows - ring
    assert multi_gpu.ring_growth(longer, rows // 10, 3) == 3 * 4096 * (rows // 10) - ring
    assert multi_gpu.ring_growth(whole, 10 * rows, 3) == most - ring
    assert multi_gpu.ring_growth(whole, 10, 3) == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_the_ring_of_several_gpus_has_the_bytes_that_the_job_asked_for(pooled):
    size = model_dims.dims_of_profile(settings("7b", "").model.architecture)
    kept = "rows.pool=mean" if pooled else ""
    hooks = "memory.activation_cache_filter=[blocks.2*.hook_resid_post]"
    requested = settings("7b", f"{hooks} memory.streaming_chunk_size=512 {kept}")
    whole = estimate.estimate(requested, ClosedForm(size), "cuda")
    points = ClosedForm(size).catalog().select(requested.memory.activation_cache_filter)
    copied = estimate.copied_precision(requested, "bf16")
    offsets, tokens = np.arange(0, 8 * 512 + 1, 512), np.zeros(8 * 512, "i4")
    windows = np.arange(8, dtype="i4")
    rows = {"row_token": offsets[1:] - 1, "kept": np.ones(8 * 512, bool)} if pooled else {}
    of_shard = ShardTokens(
        0, tokens, tokens, tokens, offsets, np.array([b"x"] * 8), offsets, windows, **rows
    )
    batches = batching.plan_batches(np.diff(offsets), 2048, 512)
    step = Selection(of_shard, "mean", "bf16").step_bytes(batches, points, 512)
    ring = ring_bytes("cuda", 0, bytes_ahead(step, 4))
    assert copied == ("fp32" if pooled else "bf16")
    growth = multi_gpu.ring_growth(whole, whole.row_bytes[copied], 4)
    taken = ring - ring_bytes("cuda", 0)
    assert 0 < taken <= growth <= taken + 4 * 2048 * 16  # on disk a row has its token as well


@pytest.mark.parametrize(("asked", "given"), [(None, 2048), (16384, 2048), (100, 100)])
def test_batches_of_several_gpus_are_small_enough_to_keep_all_busy(monkeypatch, asked, given):
    requested = settings("7b", f"extraction.batch_tokens={asked or 'null'}")
    size = model_dims.dims_of_profile(requested.model.architecture)
    whole = estimate.estimate(requested, ClosedForm(size), "cuda")
    assert multi_gpu.on_leased(whole) == whole
    monkeypatch.setattr(gpu_lease, "_held", ("a", "b"))
    part = multi_gpu.on_leased(whole)
    assert part.batch_tokens == given
    room = DeviceMemory(total=80 * 10**9, free=80 * 10**9)
    assert plan.choose(part, "bf16", "cuda", room).plan.batch_tokens == given
