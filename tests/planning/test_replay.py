"""The allocator replayed over traces, against the allocator of simulated GPUs as a whole run calls
it.
"""

import h5py
import pytest
import simulated_runs
import torch
from simulated_runs import build, machine, prepare
from theloom.memory.cuda_allocator import LARGE_SEGMENT
from theloom.planning import replay

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 1024}
LENGTHS = (900, 500, 480, 300, 20)
ONE_PASS = "memory.streaming_chunk_size=1024 extraction.batch_tokens=2048"
CHUNKS = "memory.streaming_chunk_size=256 extraction.batch_tokens=512"
LAYERWISE = "extraction.execution=layerwise"


@pytest.fixture
def segments(request):
    """Whether torch's allocator has expandable segments."""
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{request.param}")
    yield request.param
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


@pytest.mark.parametrize(
    ("model_type", "options", "segments"),
    [
        ("llama", ONE_PASS, False),
        ("llama", CHUNKS, True),
        ("llama", f"{ONE_PASS} rows.keep=last(2)", False),
        ("llama", f"{LAYERWISE} {CHUNKS}", False),
        ("gpt_neox", f"{LAYERWISE} {CHUNKS}", True),
    ],
    indirect=["segments"],
)
def test_a_run_holds_what_was_predicted(tmp_path, monkeypatch, model_type, options, segments):
    monkeypatch.setattr(simulated_runs, "LENGTHS", LENGTHS)
    monkeypatch.setattr(replay, "cublas_workspace", lambda _: 0)  # the simulation has none
    model = build(tmp_path, model_type, **SIZES)
    run = prepare(tmp_path / "run", model, options, gpus=1).again(tmp_path / "rows").run
    with machine(1) as world:
        run.extract()
    with h5py.File(run.folder / "model.h5") as file:
        found = dict(file["memory/replayed"].attrs)
    assert bool(found["expandable_segments"]) is segments
    held = world.devices[0].peak_reserved
    assert held <= found["reserved"] <= 1.05 * held + LARGE_SEGMENT
