"""Predicted training steps and savings against the CPU allocator itself, by torch's profiler, as in
test_trace.py.

What remains between the two is the state of the random generator, which checkpointing keeps for
each block (5056 bytes, not an operation's), and on so small a model is up to 0.1%.
"""

import gc
from dataclasses import replace

import pytest
import torch
from theloom.errors import ModelError
from theloom.hooks import blocks
from theloom.hooks.points import residual_points, select_points
from theloom.memory import savings, trace, training
from theloom.memory.sizes import Workload
from theloom.memory.storages import LiveStorages
from theloom.memory.training import PHASES, Recipe, TrainingMemory
from theloom.model.fake import fake_model
from theloom.model.without_bytes.shapes_only import shapes_only
from theloom.precision import torch_dtype
from torch.profiler import ProfilerActivity, profile, record_function
from traced_models import model_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

MODELS = ("llama-gqa", "gpt2", "qwen3")
WORKFLOWS = ("inference", "training")
WINDOWS, TOKENS = 2, 192


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make tiny steps ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh_model(name: str, precision: str):
    return AutoModelForCausalLM.from_config(model_config(name), dtype=torch_dtype(precision))


def weights_bytes(model) -> int:
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def follow_allocator(work) -> dict[str, tuple[int, int]]:
    """The most bytes that the CPU allocator had given out in each phase of some work, and those at
    its end.
    """

    def ended(phase: str) -> None:
        with record_function(f"end of {phase}"):
            pass

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work(ended)
    live = most = 0
    found = {}
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
        elif event.name().startswith("end of "):
            found[event.name().removeprefix("end of ")] = most, live
            most = 0
    return found


def measured_step(model, recipe: Recipe) -> tuple[dict[str, int], int]:
    """Peaks of the second step's phases, and what is alive after its forward; with weights and
    states.
    """
    ids = torch.randint(512, (WINDOWS, TOKENS))
    optimizer = training.prepare(model, recipe)
    training.step(model, optimizer, ids, recipe)
    found = follow_allocator(
        lambda ended: training.step(model, optimizer, ids, recipe, ended=ended)
    )
    before = weights_bytes(model) + sum(
        t.nbytes for state in optimizer.state.values() for t in state.values()
    )
    return {phase: before + most for phase, (most, _) in found.items()}, before + found["forward"][
        1
    ]


SCHEMES = {
    "plain": Recipe(),
    "checkpointing": Recipe(checkpointing=True),
    "reentrant": Recipe(checkpointing=True, use_reentrant=True),
    "for-loop optimiser": Recipe(foreach=False),
}
CASES = [
    (name, dtype, scheme)
    for name in MODELS
    for dtype in ("fp32", "bf16")
    for scheme in ("plain", "checkpointing")
]
CASES += [
    ("llama-gqa", "fp32", "for-loop optimiser"),
    ("llama-gqa", "bf16", "reentrant"),
    ("llama-gqa", "autocast bf16", "plain"),
    ("gpt2", "autocast bf16", "checkpointing"),
]


def predicted(name: str, precision: str, scheme: str) -> TrainingMemory:
    recipe = SCHEMES[scheme]
    autocast, _, dtype = precision.rpartition(" ")
    return training.training_step(
        model_config(name),
        dtype,
        WINDOWS,
        TOKENS,
        checkpointing=recipe.checkpointing,
        autocast=bool(autocast),
        use_reentrant=recipe.use_reentrant,
        foreach=recipe.foreach,
    )


@pytest.mark.parametrize(("name", "precision", "scheme"), CASES)
def test_step_has_the_peaks_of_the_cpu_allocator(name: str, precision: str, scheme: str) -> None:
    autocast, _, dtype = precision.rpartition(" ")
    recipe = replace(SCHEMES[scheme], autocast=dtype if autocast else None)
    peaks, alive_after_forward = measured_step(
        fresh_model(name, "fp32" if autocast else dtype), recipe
    )
    memory = predicted(name, precision, scheme)
    far = {phase: sum(memory.phases[phase].values()) / peaks[phase] - 1 for phase in PHASES}
    far["after forward"] = sum(memory.after_forward.values()) / alive_after_forward - 1
    assert all(abs(error) <= 1e-3 for error in far.values()), far
    assert memory.where == max(peaks, key=lambda phase: peaks[phase])


@pytest.fixture
def _without_onednn():
    """Its products in 16 bits have buffers of their own, on processors that multiply these."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.usefixtures("_without_onednn")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [24, 100, 200, 800])
def test_backward_of_attention_has_its_buffers_for_each_thread(tokens: int, precision: str) -> None:
    torch.set_num_threads(2)  # `conftest` takes it back
    inputs = [
        torch.randn(1, 2, tokens, 32, dtype=torch_dtype(precision), requires_grad=True)
        for _ in range(3)
    ]
    output = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    gradient = torch.ones_like(output)

    def work(ended=lambda phase: None) -> None:
        torch.autograd.grad(output, inputs, gradient, retain_graph=True)
        ended("backward")

    work()
    with LiveStorages(inside=training.CPU_KERNELS) as live:
        work()
    row_sums = 4 * 256  # those of the second thread, which the profiler does not follow
    assert 0 <= live.peak().total - follow_allocator(work)["backward"][0] <= row_sums


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast bf16"])
def test_gradients_and_states_have_the_bytes_of_their_scheme(precision: str) -> None:
    model = fresh_model("llama-gqa", "fp32")
    elements, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    each = 2 if precision == "bf16" else 4
    step = predicted("llama-gqa", precision, "plain").phases["optimizer"]
    assert step["gradients"] == elements * each
    assert (
        step["optimizer_states"] == 2 * elements * each + 4 * tensors
    )  # AdamW counts each tensor's steps in FP32
    assert step["weights"] == elements * each + sum(b.nbytes for b in model.buffers())
    assert step["temporaries"] == pytest.approx(
        elements * each, abs=8
    )  # foreach: a square root of the whole


def test_real_and_fake_models_give_the_same_bytes() -> None:
    ids = torch.randint(512, (WINDOWS, TOKENS))
    model = fresh_model("qwen3", "fp32")
    before = [p.detach().clone() for p in model.parameters()]
    assert training.measure(model, ids, Recipe()) == predicted("qwen3", "fp32", "plain")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_checkpointing_keeps_the_input_of_each_block_and_what_is_outside_the_blocks() -> None:
    plain, less = (predicted("llama-gqa", "fp32", scheme) for scheme in ("plain", "checkpointing"))
    residual = WINDOWS * TOKENS * 256 * 4
    saved = less.after_forward["saved_activations"]
    inputs_and_final_norm = (
        3 * residual + 3 * residual
    )  # the norm keeps its input, the normalised, and its output
    assert inputs_and_final_norm <= saved <= 1.05 * inputs_and_final_norm
    assert saved < plain.after_forward["saved_activations"] / 4
    assert less.peak < plain.peak


def test_dropout_of_attention_is_fused_on_cuda() -> None:
    config = model_config("gpt2")
    cpu, cuda = (
        training.training_step(config, "bf16", 1, 256, device=device).peak
        for device in ("cpu", "cuda")
    )
    one_matrix_of_each_block = 3 * 8 * 256 * 256 * 2
    assert cuda < cpu - one_matrix_of_each_block


def test_autocast_to_fp32_is_refused() -> None:
    with pytest.raises(ModelError, match="16 bits"):
        training.training_step(model_config("llama-gqa"), "fp32", 1, 8, autocast=True)


# Forward and backward without an optimiser on an RTX 3080 Ti (torch 2.2, transformers 4.42) and an
# L40S (torch 2.4, transformers 4.46): max_memory_allocated in MB, of pull requests 31172 and 33298
# of huggingface/transformers. The loss is logits.sum(), and the output of a step is alive during
# the next: with its KV cache, which the classes of that time took from the activations without a
# copy. GPT-2's had a mask of 1024 × 1024 for each block.
PUBLISHED = {
    "gpt2-large": (
        "gpt2",
        {"n_embd": 1280, "n_layer": 36, "n_head": 20},
        (4, 1024),
        36 * 1024**2,
        14568.2,
    ),
    "opt-350m": (
        "opt",
        {
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        }
        | {"ffn_dim": 4096, "do_layer_norm_before": False},
        (8, 1024),
        0,
        8821.18,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_and_backward_have_the_published_peak_on_cuda(name: str) -> None:
    model_type, numbers, (windows, tokens), masks, published = PUBLISHED[name]
    config = AutoConfig.for_model(model_type, **numbers)
    fake = fake_model(config, "fp16", lm_head=True)
    model = fake.architecture.model.train().requires_grad_(True)
    with fake.mode, shapes_only(), training._fused_dropout():
        ids = torch.zeros(windows, tokens, dtype=torch.int64)
        live = training._Step(ids.numel(), config.vocab_size, "cuda")
        live.ignore([ids, *model.parameters(), *model.buffers()])
        with live:
            for _ in range(2):
                first = len(live.events)
                model.zero_grad()
                output = model(input_ids=ids, use_cache=False)
                output.logits.sum().backward()
    cache = 2 * config.num_hidden_layers * windows * tokens * config.hidden_size * 2
    workspace = 8519680  # cuBLAS
    total = sum(fake.weights) + live.peak(first).total + cache + masks + workspace
    assert total / 1e6 == pytest.approx(published, rel=0.01)


@pytest.fixture(scope="module")
def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = savings.optimisations(
        model_config("llama-gqa"), WINDOWS, 1024, 256, ["blocks.1.hook_resid_post"]
    )
    torch.set_num_threads(threads)
    return found


def only(rows, name: str, workflow: str):
    return next(r for r in rows if (r.optimisation, r.workflow) == (name, workflow))


def test_table_has_each_optimisation_in_both_workflows(rows) -> None:
    assert {(r.optimisation, r.workflow) for r in rows} == {
        (n, w) for n in savings.CLAIMS for w in WORKFLOWS
    }
    refused = {(r.optimisation, r.workflow) for r in rows if not r.applies}
    assert refused == {
        ("gradient checkpointing", "inference"),
        ("torch.inference_mode()", "training"),
    }
    assert all(r.before == r.after and r.percent == 0 for r in rows if not r.applies)
    assert all(r.claim and r.compared and r.before.total > r.before.activations > 0 for r in rows)
    assert all(r.percent > 0 for r in rows if r.applies)
    assert only(rows, "mixed precision", "inference").percent == pytest.approx(50, abs=0.5)


def test_streaming_can_cost_more_than_one_pass() -> None:
    wide = savings.optimisations(
        model_config("llama-mha"), 2, 512, 256, ["blocks.-1.hook_resid_post"]
    )
    narrow = only(wide, "streaming extraction", "inference")
    assert narrow.after.activations > narrow.before.activations
    assert narrow.percent < 0


def test_rows_of_inference_are_those_of_the_cpu_allocator(rows) -> None:
    described = blocks.find_blocks(
        AutoModel.from_config(model_config("llama-gqa"), dtype=torch.bfloat16).eval()
    )
    points = select_points(["blocks.1.hook_resid_post"], residual_points(3, 256))
    every = residual_points(3, 256)
    ids = torch.randint(512, (WINDOWS, 1024))
    one, chunks = Workload(WINDOWS, 1024, 1024), Workload(WINDOWS, 1024, 256)
    work = {
        "graph": lambda: savings.forward_peak(described, ids, points, grad=True),
        "no graph": lambda: trace.run(described, ids, one, points, held=True),
        "every": lambda: trace.run(described, ids, one, every, held=True),
        "one pass": lambda: trace.run(described, ids, one, points, store="bf16"),
        "chunks": lambda: trace.run(described, ids, chunks, points, store="bf16"),
    }
    found = {}
    for name, run in work.items():
        run()
        found[name] = follow_allocator(lambda ended, run=run: (run(), ended("run")))["run"][0]
    expected = {
        "torch.inference_mode()": ("graph", "no graph"),
        "selective caching": ("every", "no graph"),
        "streaming extraction": ("one pass", "chunks"),
    }
    for name, (before, after) in expected.items():
        row = only(rows, name, "inference")
        assert row.before.activations == pytest.approx(found[before], rel=1e-3), name
        assert row.after.activations == pytest.approx(found[after], rel=1e-3), name
