"""Plans: what fits, what is made smaller for it, what is refused, and what the user is told."""

import dataclasses

import numpy as np
import pytest
from support import ROOT
from theloom.config import compose, frozen
from theloom.corpus.batching import Lengths, plan_batches
from theloom.devices.host import DeviceMemory
from theloom.errors import MemoryPlanError
from theloom.planning import estimate, plan
from theloom.planning.estimates import run_models
from theloom.planning.estimates.estimate_file import Estimate
from theloom.planning.plan import Correction, Plan

GB = 10**9


@pytest.fixture(scope="module")
def mistral() -> Estimate:
    (run,) = compose.runs(ROOT / "config", "7b").values()
    settings = frozen.to_config(run.config)
    return estimate.estimate(settings, run_models.estimator_of(settings), "cuda")


def fits(planned: plan.Planned, free: int) -> bool:
    return planned.components.total <= free


def has_room(estimated: Estimate, free: int) -> bool:
    try:
        plan.choose(estimated, "bf16", "cuda", DeviceMemory(24 * GB, free))
    except MemoryPlanError:
        return False
    return True


def test_the_requested_plan_is_taken_if_it_fits(mistral):
    planned = plan.choose(mistral, "bf16", "cuda", DeviceMemory(80 * GB, 79 * GB), threshold=0.85)
    assert planned.plan == Plan(
        plan.MAX_BATCH_TOKENS["cuda"], 4096, 4096
    )  # chunks of 1024 would take more
    assert planned.changes == ()
    assert planned.components.weights == mistral.weights["bf16"]
    assert planned.components.context > 0


def test_less_free_memory_makes_smaller_batches_with_headroom(mistral, caplog):
    planned = plan.choose(mistral, "bf16", "cuda", DeviceMemory(20 * GB, 19 * GB), threshold=0.85)
    assert planned.plan.batch_tokens < plan.MAX_BATCH_TOKENS["cuda"]
    assert planned.components.total <= 19 * GB - 0.15 * 20 * GB
    assert planned.changes == ()  # the config leaves the batch to the plan
    assert not caplog.records


def test_a_smaller_chunk_is_taken_if_no_batch_fits_and_logged(caplog):
    (run,) = compose.runs(ROOT / "config", "7b").values()
    wide = run.config["model"]["architecture"] | {
        "num_hidden_layers": 2,
        "intermediate_size": 131072,
    }
    hooks = {
        "memory": run.config["memory"] | {"activation_cache_filter": ["blocks.1.hook_resid_post"]}
    }
    settings = frozen.to_config(
        run.config | {"model": run.config["model"] | {"architecture": wide}} | hooks
    )
    found = estimate.estimate(settings, run_models.estimator_of(settings), "cuda")
    fixed = found.weights["bf16"] + 6 * 10**8
    whole = plan.choose(found, "bf16", "cuda", DeviceMemory(80 * GB, fixed + 2 * GB))
    smaller = plan.choose(found, "bf16", "cuda", DeviceMemory(80 * GB, fixed + GB // 2))
    assert (whole.plan.chunk_size, smaller.plan.chunk_size) == (1024, 256)
    assert smaller.changes == ("long documents go in chunks of 256 tokens, not in chunks of 1024",)
    assert smaller.changes[0] in caplog.text


def test_one_pass_is_taken_where_the_cache_and_its_masks_take_more(mistral):
    planned = plan.choose(mistral, "bf16", "cuda", DeviceMemory(80 * GB, 15_600_000_000))
    assert not planned.plan.streamed
    assert mistral.find("bf16", 4096, 4096).total < mistral.find("bf16", 4096, 1024).total


@pytest.fixture(scope="module")
def long() -> Estimate:
    """The first quarter of a 7B over documents of 32,768 tokens, for which chunks take less than
    one pass.
    """
    requested = (
        "corpus.context_length=32768 memory.activation_cache_filter=[blocks.7.hook_resid_post]"
    )
    (run,) = compose.runs(ROOT / "config", "7b", requested).values()
    settings = frozen.to_config(run.config)
    return estimate.estimate(settings, run_models.estimator_of(settings), "cuda")


def test_long_windows_stream_in_one_batch_if_they_fit(long):
    roomy = plan.choose(long, "bf16", "cuda", DeviceMemory(200 * GB, 200 * GB)).plan
    assert (roomy.chunk_size, roomy.streamed_windows) == (1024, 16)
    tight = plan.choose(long, "bf16", "cuda", DeviceMemory(12 * GB, 12 * GB)).plan
    assert tight.streamed
    assert tight.streamed_windows < 16


def test_no_more_long_documents_are_planned_side_by_side_than_a_shard_has(long):
    free = DeviceMemory(200 * GB, 200 * GB)
    shards = tuple(
        np.array(lengths)
        for lengths in ([9000, 1024, 7, 2000], [1500, 4000, 1490, 1500], [5] * 40, [])
    )
    planned = plan.choose(long, "bf16", "cuda", free, windows=Lengths.of(shards))
    assert (planned.plan.longest, planned.plan.chunk_size, planned.plan.streamed_windows) == (
        9000,
        1024,
        3,
    )
    assert set(planned.plan.long_batches) == {(1, 9000), (3, 1500)}
    none = plan.choose(long, "bf16", "cuda", free, windows=Lengths.of(shards[2:])).plan
    assert (none.streamed, none.streamed_windows) == (False, 1)
    many = plan.choose(long, "bf16", "cuda", free, windows=Lengths.of((np.full(100, 9000),))).plan
    assert (many.streamed_windows, many.long_batches) == (16, ((16, 9000),))
    assert planned.components.total < plan.choose(long, "bf16", "cuda", free).components.total


@pytest.mark.parametrize("side_by_side", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(8))
def test_the_largest_long_batches_are_those_that_a_run_has(seed, side_by_side):
    choose = np.random.default_rng(seed)
    kinds = (
        choose.integers(1, 3000, 60),
        choose.choice([50, 700, 710, 2048], 300),
        choose.integers(600, 640, 90),
    )
    shards = [kind[: choose.integers(1, len(kind))] for kind in kinds]
    for chunk_size in (64, 512, 1000, 4000):
        batches = [
            b for lengths in shards for b in plan_batches(lengths, 2048, chunk_size, side_by_side)
        ]
        streamed = [(len(b.windows), b.width) for b in batches if b.width > chunk_size]
        found = Lengths.of(tuple(shards)).streamed(chunk_size, side_by_side)
        assert set(found) <= set(streamed)
        assert bool(found) == bool(streamed)
        for step in (0, 1, 100, 10_000):  # of memory: what a window's step takes, beside its cache
            size = [
                max((n * (tokens + step) for n, tokens in b), default=0) for b in (found, streamed)
            ]
            assert size[0] == size[1]


def test_a_cache_larger_than_the_device_goes_to_host_memory(long, caplog):
    on_device = dataclasses.replace(long, cache="device")
    free = next(
        f
        for f in range(4 * GB, 12 * GB, GB // 20)
        if not has_room(on_device, f) and has_room(long, f)
    )
    planned = plan.choose(long, "bf16", "cuda", DeviceMemory(24 * GB, free))
    assert planned.plan.offloaded
    assert fits(planned, free)
    assert "the KV cache of long documents lies in host memory" in caplog.text
    with pytest.raises(MemoryPlanError):
        plan.choose(on_device, "bf16", "cuda", DeviceMemory(24 * GB, free))
    requested = plan.choose(
        dataclasses.replace(long, cache="offloaded"), "bf16", "cuda", DeviceMemory(80 * GB, 80 * GB)
    )
    assert requested.plan.offloaded


def test_backing_off_halves_windows_then_chunks_and_ends_at_the_smallest():
    begun = Plan(2048, 512, 3000, streamed_windows=4)
    sizes = [
        (p.batch_tokens, p.chunk_size, p.streamed_windows) for p in map(begun.backed_off, range(8))
    ]
    assert sizes[:4] == [(2048, 512, 4), (1024, 512, 2), (512, 512, 1), (256, 256, 1)]
    assert sizes[5:] == [(64, 64, 1)] * 3
    assert begun.backed_off(9, streams=False) == Plan(512, 512, 3000)


def test_every_plan_that_is_chosen_fits_and_more_memory_never_gives_less(mistral):
    last = 0
    for free in range(16 * GB, 30 * GB, GB // 4):
        planned = plan.choose(mistral, "bf16", "cuda", DeviceMemory(free, free))
        assert fits(planned, free)
        assert planned.plan.batch_tokens >= last
        last = planned.plan.batch_tokens


def test_memory_above_the_threshold_is_used_with_a_warning_if_needed(mistral, caplog):
    planned = plan.choose(
        mistral, "bf16", "cuda", DeviceMemory(16 * GB, 15_500_000_000), threshold=0.85
    )
    assert fits(planned, 15_500_000_000)
    assert "more than memory_warning_threshold=0.85 will be in use" in caplog.text


def test_a_run_that_cannot_fit_is_rejected_with_changes_that_would_fit(mistral):
    with pytest.raises(MemoryPlanError) as refusal:
        plan.choose(
            mistral,
            "fp32",
            "cuda",
            DeviceMemory(24 * GB, 20 * GB),
            others="python (pid 7, vLLM) 3.0 GB",
        )
    message = str(refusal.value)
    assert "\n" not in message
    assert "cuda has 20.00 GB of 24.00 GB free" in message
    assert "weights 28.46 GB" in message
    assert "others on it: python (pid 7, vLLM) 3.0 GB" in message
    for change in (
        "memory.precision_mode=bf16 (saves 14.",
        "memory.quantization=8bit (saves 21.",
        "=4bit (saves 24.",
    ):
        assert change in message


def test_a_change_that_is_offered_would_fit(mistral):
    with pytest.raises(
        MemoryPlanError, match=r"it would fit with memory\.quantization=4bit \(saves [\d.]+ GB\)$"
    ):
        plan.choose(mistral, "bf16", "cuda", DeviceMemory(8 * GB, 7 * GB))
    assert fits(plan.choose(mistral, "int4", "cuda", DeviceMemory(8 * GB, 7 * GB)), 7 * GB)
    with pytest.raises(MemoryPlanError, match="no other precision would fit either"):
        plan.choose(mistral, "bf16", "cuda", DeviceMemory(3 * GB, 2 * GB))


def test_a_shorter_context_is_offered_if_the_cache_does_not_fit():
    (run,) = compose.runs(ROOT / "config", "13b", "corpus.context_length=65536").values()
    settings = frozen.to_config(run.config)
    found = estimate.estimate(settings, run_models.estimator_of(settings), "cuda")
    with pytest.raises(MemoryPlanError, match=r"corpus\.context_length=\d+ \(saves"):
        plan.choose(found, "bf16", "cuda", DeviceMemory(40 * GB, 30 * GB))


def test_documents_shorter_than_the_context_need_less(mistral):
    free = DeviceMemory(17 * GB, 17 * GB)
    short = plan.choose(mistral, "bf16", "cuda", free, windows=Lengths.of((np.array([300, 7]),)))
    assert short.plan.longest == 300
    assert not short.plan.streamed
    assert short.components.kv_cache == 0
    assert short.plan.batch_tokens >= plan.choose(mistral, "bf16", "cuda", free).plan.batch_tokens


def test_a_measurement_corrects_the_next_plan(mistral):
    free = DeviceMemory(18 * GB, 18 * GB)
    plain = plan.choose(mistral, "bf16", "cuda", free)
    corrected = plan.choose(mistral, "bf16", "cuda", free, correction=Correction(2.0, GB // 2))
    assert corrected.plan.batch_tokens < plain.plan.batch_tokens
    assert fits(corrected, free.free)


def test_the_batch_of_the_config_is_obeyed_and_its_change_logged():
    (run,) = compose.runs(ROOT / "config", "7b", "extraction.batch_tokens=32768").values()
    settings = frozen.to_config(run.config)
    found = estimate.estimate(settings, run_models.estimator_of(settings), "cuda")
    assert (
        plan.choose(found, "bf16", "cuda", DeviceMemory(80 * GB, 79 * GB)).plan.batch_tokens
        == 32768
    )
    smaller = plan.choose(found, "bf16", "cuda", DeviceMemory(17 * GB, 17 * GB))
    assert smaller.changes == (f"batches of {smaller.plan.batch_tokens} tokens, not 32768",)


@pytest.mark.parametrize(("batch_tokens", "chunk"), [(2048, 512), (100, 512), (1000, 300)])
def test_the_passes_of_a_plan_are_the_largest_that_batching_makes(batch_tokens, chunk):
    lengths = np.random.default_rng(0).integers(1, 2000, 500)
    requested = Plan(batch_tokens, chunk, int(lengths.max()))
    largest = max(
        len(b.windows) * min(b.width, chunk) for b in plan_batches(lengths, batch_tokens, chunk)
    )
    assert largest <= max(requested.batch_windows * requested.width, batch_tokens)


def test_the_workspace_of_the_gpu_at_hand_is_counted(mistral):
    memory = DeviceMemory(80 * GB, 79 * GB)
    workspace = {
        capability: plan.choose(
            mistral, "bf16", "cuda", memory, capability=capability
        ).components.workspace
        for capability in ((8, 0), (9, 0), None)
    }
    assert workspace == {(8, 0): 8320 << 10, (9, 0): 32 << 20, None: 32 << 20}
    assert plan.choose(mistral, "bf16", "mps", memory).components.context == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_keeps_no_more_rows_than_planned(seed):
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, 60, int(chance.integers(1, 200)))
    cut = Plan(int(chance.integers(16, 256)), 16, 60, 3).over(Lengths.of((lengths, lengths[:9])))
    batches = plan_batches(lengths, cut.batch_tokens, cut.chunk_size, cut.streamed_windows)
    for kept in (1, 3):
        rows = max(sum(min(n, kept) for n in batch.lengths) for batch in batches)
        assert min(rows, cut.step_tokens) <= cut.copied_rows(kept) <= cut.step_tokens
    assert cut.copied_rows(None) == cut.step_tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_copied_off_the_device_falls_with_the_rows_that_are_kept(device):
    hooks = "memory.activation_cache_filter=[blocks.0.hook_resid_post]"
    waiting = {}
    for keep in ("all", "last", "~special"):
        (run,) = compose.runs(ROOT / "config", "7b", f"{hooks} rows.keep={keep}").values()
        settings = frozen.to_config(run.config)
        found = estimate.estimate(settings, run_models.estimator_of(settings), device)
        long = Lengths.of((np.full(100, 1024),))
        planned = plan.choose(found, "bf16", device, DeviceMemory(200 * GB, 190 * GB), windows=long)
        waiting[keep] = planned.components.on_their_way, planned.plan.step_tokens
    whole, step = waiting["all"]
    assert waiting["~special"] == waiting["all"]  # which may keep every token
    floor = plan.bytes_on_device(device, 0)
    assert waiting["last"][0] - floor <= (whole - floor) / 1000
    assert step == waiting["last"][1]
