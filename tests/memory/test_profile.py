"""Memory debugging: the recorded peak against the CPU allocator's, and that recording changes
nothing else.
"""

import json
import logging
import pickle
import re
import time
from contextlib import nullcontext
from types import SimpleNamespace

import h5py
import pytest
import theloom
import torch
from support import ROOT, a_config, allocator_peak, build_tiny, residuals_of, stages
from theloom.config import compose, frozen
from theloom.corpus import batching
from theloom.corpus.batching import Batch
from theloom.engine.resident import ResidentRunner
from theloom.errors import ConfigError
from theloom.memory.profile import ShardProfile
from theloom.model import loading
from theloom.model.files import prepare_files
from theloom.store import commit_log, writer
from transformers import AutoModel

CHUNK = 64
# Sizes of which the peak is in no kernel's own buffers: those of attention are estimated for 512
# keys at least.
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "intermediate_size": 704,
    "max_position_embeddings": 4096,
}
GPT2_WIDE = {
    "n_embd": 256,
    "n_head": 8,
    "n_positions": 4096,
    "n_inner": 704,
    "max_position_embeddings": 4096,
}
SHAPES = {"one pass": ((2, 1024), 1024), "streamed": ((1, 1152), 256)}


def loaded_tiny(folder, model_type="llama", precision="fp32", device="cpu", **numbers):
    build_tiny(model_type, folder, **numbers)
    requested = a_config(folder, f"memory.precision_mode={precision} extraction.device={device}")
    return loading.load_model(requested, prepare_files(requested.model))


def recorded(loaded, ids, output, store="fp32"):
    """What is written of one batch, and the values that came of it."""
    values = []
    shard_profile = ShardProfile(loaded, output, {0})
    runner = ResidentRunner(loaded, residuals_of(loaded.architecture), CHUNK, store)
    with shard_profile.batch(0, ids) as captured:
        runner.run(ids, lambda *chunk: values.append(chunk), captured)
    return json.loads((output.parent.parent / f"memory/{output.stem}.json").read_text()), values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(("precision", "store"), [("fp32", "fp32"), ("bf16", "fp32")])
def test_the_peak_is_that_of_the_allocator_in_a_batch_that_is_not_recorded(
    tmp_path, shape, model_type, precision, store
):
    numbers = {"gpt2": GPT2_WIDE, "llama": WIDE}[model_type]
    loaded = loaded_tiny(tmp_path / "model", model_type, precision, **numbers)
    size, chunk_size = SHAPES[shape]
    ids = torch.randint(128, size, generator=torch.Generator().manual_seed(0))
    runner = ResidentRunner(loaded, residuals_of(loaded.architecture), chunk_size, store)
    with ShardProfile(loaded, tmp_path / "shards/s.h5", {0}).batch(0, ids) as captured:
        runner.run(ids, lambda *_: None, captured)
    found = json.loads((tmp_path / "memory/s.json").read_text())
    assert found["peak_bytes"] == pytest.approx(
        allocator_peak(lambda: runner.run(ids, lambda *_: None)), rel=1e-3
    )
    assert found["peak_bytes"] == sum(found["by_category"].values())
    assert found["peak_bytes"] == sum(made["bytes"] for made in found["alive_at_peak"])
    assert found["peak_bytes"] == max(found["peak_by_module"].values())
    assert ("kv_cache" in found["by_category"]) == (shape == "streamed")


def test_modules_are_named_as_the_model_names_them_in_the_order_in_which_they_run(tmp_path):
    loaded = loaded_tiny(tmp_path / "model")
    found, _ = recorded(loaded, torch.zeros(1, 200, dtype=torch.int64), tmp_path / "shards/s.h5")
    names = list(found["peak_by_module"])
    assert names[:4] == ["(the model itself)", "embed_tokens", "rotary_emb", "layers.0"]
    assert set(names[1:]) == {name for name, _ in loaded.architecture.model.named_modules()} - {
        "",
        "layers",
        "norm",
    }
    assert (
        names.index("layers.1.mlp")
        < names.index("layers.2.self_attn")
        < names.index("layers.2.mlp")
    )
    for inner, outer in (("layers.2.mlp.up_proj", "layers.2.mlp"), ("layers.2.mlp", "layers.2")):
        assert 0 < found["peak_by_module"][inner] <= found["peak_by_module"][outer]
    assert {made["module"] for made in found["alive_at_peak"]} <= {*names, "(outside the model)"}
    sizes = [made["bytes"] for made in found["alive_at_peak"]]
    assert sizes == sorted(sizes, reverse=True)
    # what a KV cache of 200 tokens takes: keys and values, 3 blocks, 2 heads of 16 numbers in FP32
    assert found["by_category"]["kv_cache"] == pytest.approx(2 * 3 * 2 * 16 * 4 * 200, rel=0.35)
    assert found["weight_bytes"] == sum(
        p.nbytes for p in loaded.architecture.model.parameters()
    ) + sum(b.nbytes for b in loaded.architecture.model.buffers())


@pytest.mark.parametrize("store", ["fp32", "bf16"])
def test_values_are_those_of_a_batch_that_is_not_recorded(tmp_path, store):
    loaded = loaded_tiny(tmp_path / "model", precision="bf16")
    ids = torch.randint(128, (3, 50), generator=torch.Generator().manual_seed(0))
    plain = []
    ResidentRunner(loaded, residuals_of(loaded.architecture), CHUNK, store).run(
        ids, lambda *chunk: plain.append(chunk)
    )
    _, values = recorded(loaded, ids, tmp_path / "shards/s.h5", store)
    assert len(values) == len(plain) == 6
    for (name, start, value), expected in zip(values, plain, strict=True):
        assert (name, start) == expected[:2]
        assert torch.equal(value, expected[2])


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_the_batches_recorded_are_the_longest_window_and_the_widest_step_of_those_that_remain(
    first,
):
    batches = [
        Batch((0,), (900,)),
        Batch((1,), (300,)),
        Batch((2,), (90,)),
        Batch((3, 4, 5), (40, 40, 30)),
    ]
    found = batching.largest(batches, first, 100)
    assert found == [{0, 3}, {1, 3}, {2, 3}, {3}, set()][first]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, tiny_llama):
    return stages(tmp_path_factory.mktemp("plain"), tiny_llama, "name=r").all()


@pytest.fixture(scope="module")
def profiled_run(tmp_path_factory, tiny_llama):
    return stages(
        tmp_path_factory.mktemp("profiled"), tiny_llama, "name=r memory.profile_shard=1"
    ).all()


def test_a_profiled_shard_holds_the_same_rows_and_says_nothing_of_its_profile(
    plain_run, profiled_run
):
    plain, found = theloom.open(plain_run.activations), theloom.open(profiled_run.activations)
    assert plain.hooks == found.hooks
    for hook in plain.hooks:
        assert plain[hook].numpy(...).tobytes() == found[hook].numpy(...).tobytes()
    assert plain.window_hash.tobytes() == found.window_hash.tobytes()
    assert plain.attributes["run_fingerprint"] == found.attributes["run_fingerprint"]
    assert plain.attributes["config"] == found.attributes["config"]


def test_only_the_shard_requested_is_recorded_and_nothing_without_the_key(plain_run, profiled_run):
    assert not (plain_run.folder / "memory").exists()
    files = sorted(p.name for p in (profiled_run.folder / "memory").iterdir())
    assert files == ["00001-of-00002.json", "00001-of-00002.txt"]


def test_a_shard_that_goes_layer_by_layer_is_recorded_too(tmp_path, tiny_llama, caplog):
    requested = "name=r extraction.execution=layerwise"
    plain = stages(tmp_path / "plain", tiny_llama, requested).all()
    with caplog.at_level(logging.WARNING):
        run = stages(tmp_path / "run", tiny_llama, f"{requested} memory.profile_shard=1").all()
    assert (
        caplog.text.count("is recorded, which slows it down") <= 2
    )  # the largest batches, not each block
    for hook in theloom.open(plain.activations).hooks:
        rows = [theloom.open(r.activations)[hook].numpy(...).tobytes() for r in (plain, run)]
        assert rows[0] == rows[1]
    assert sorted(p.name for p in (run.folder / "memory").iterdir()) == [
        "00001-of-00002.json",
        "00001-of-00002.txt",
    ]
    found = json.loads((run.folder / "memory/00001-of-00002.json").read_text())
    assert re.match(r"layers\.\d\.", found["peak_in"])
    block = sum(p.nbytes for p in model_of(tiny_llama).layers[0].parameters())
    assert block <= found["weight_bytes"] <= 1.1 * block  # one block, and the norm and buffers
    with h5py.File(run.folder / "model.h5") as file:
        predicted = int(file["memory/predicted"].attrs["working_set"])
    assert found["peak_bytes"] == pytest.approx(predicted, rel=0.03)


def model_of(folder):
    return AutoModel.from_pretrained(folder, dtype=torch.float32)


def test_the_table_says_what_the_json_says(profiled_run):
    text = (profiled_run.folder / "memory/00001-of-00002.txt").read_text()
    found = json.loads((profiled_run.folder / "memory/00001-of-00002.json").read_text())
    assert text.startswith(f"memory peak of batch {found['batch']}: ")
    numbers = [int(n.replace(",", "")) for n in re.findall(r"^ +([\d,]+)  ", text, re.MULTILINE)]
    expected = [*found["by_category"].values(), *(m["bytes"] for m in found["alive_at_peak"])]
    assert numbers == expected + list(found["peak_by_module"].values())
    assert f"{found['peak_by_module']['layers.2.mlp']:,}  layers.2.mlp\n" in text


def test_an_unfinished_shard_is_gone_on_with_and_its_first_remaining_batch_recorded(
    tmp_path, tiny_llama, monkeypatch, caplog, plain_run
):
    """The job that is killed does not record; the one that goes on with its file does."""
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    run = stages(tmp_path, tiny_llama, "name=r")
    run.prepare()
    forward, calls = ResidentRunner.run, []
    partial = run.folder / "shards/00001-of-00002.h5.partial"

    def committed() -> int:
        with h5py.File(partial) as file:
            return commit_log.committed(file["commit_log"][:])

    def dies(self, *args):
        if run.shards:  # the first is finished
            calls.append(args)
        if len(calls) == 2:
            while committed() < 1:  # by another thread
                time.sleep(0.01)
            raise ZeroDivisionError
        forward(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(ResidentRunner, "run", dies)
        with pytest.raises(ZeroDivisionError):
            run.extract()
    again = stages(tmp_path, tiny_llama, "name=r memory.profile_shard=1")
    with caplog.at_level(logging.INFO):
        again.extract()
    assert "resuming 00001-of-00002.h5.partial after 1 of " in caplog.text
    warned = [m for m in caplog.messages if m.startswith("memory.profile_shard: ")]
    assert warned[0] == "memory.profile_shard: batch 2 is recorded, which slows it down"
    assert len(warned) <= 2
    assert re.search(
        r"memory peak of batch \d+: .* beyond the weights, in .*; see .*memory/00001-of",
        caplog.text,
    )
    again.merge()
    assert theloom.open(again.activations).window_hash.tobytes() == (
        theloom.open(plain_run.activations).window_hash.tobytes()
    )


class OutOfMemoryError(RuntimeError):
    """As torch's own, which needs a GPU."""


def test_a_batch_that_fails_leaves_its_profile_and_the_model_as_it_was(tmp_path, caplog):
    loaded = loaded_tiny(tmp_path / "model")
    modules = list(loaded.architecture.model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    act = loaded.architecture.model.layers[1].mlp.act_fn

    def fails(*_):
        raise OutOfMemoryError

    broken = act.register_forward_hook(fails)
    with pytest.raises(OutOfMemoryError):
        recorded(loaded, torch.zeros(2, 30, dtype=torch.int64), tmp_path / "shards/s.h5")
    broken.remove()
    found = json.loads((tmp_path / "memory/s.json").read_text())
    assert found["failed"] == "OutOfMemoryError in layers.1.mlp.act_fn"
    assert "layers.2" not in found["peak_by_module"]
    assert (
        "the batch failed: OutOfMemoryError in layers.1.mlp.act_fn"
        in (tmp_path / "memory/s.txt").read_text()
    )
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


def test_of_two_batches_the_files_are_of_the_higher_peak_unless_one_fails(tmp_path):
    shard_profile = ShardProfile(
        loaded_tiny(tmp_path / "model"), tmp_path / "shards/s.h5", {0, 1, 2, 3}
    )
    runner = ResidentRunner(
        shard_profile._loaded, residuals_of(shard_profile._loaded.architecture), CHUNK, "fp32"
    )
    kept = []
    for number, windows in enumerate((2, 3, 1)):
        ids = torch.zeros(windows, 40, dtype=torch.int64)
        with shard_profile.batch(number, ids) as captured:
            runner.run(ids, lambda *_: None, captured)
        kept.append(json.loads((tmp_path / "memory/s.json").read_text())["batch"])
    assert kept == [1, 2, 2]
    with (
        pytest.raises(ZeroDivisionError),
        shard_profile.batch(3, torch.zeros(1, 1, dtype=torch.int64)),
    ):
        raise ZeroDivisionError
    assert (
        json.loads((tmp_path / "memory/s.json").read_text())["failed"]
        == "ZeroDivisionError in (outside the model)"
    )


def test_a_profile_that_cannot_be_written_does_not_end_the_job(tmp_path, caplog):
    (tmp_path / "memory").write_text("in the way")
    loaded, ids = loaded_tiny(tmp_path / "model"), torch.zeros(1, 5, dtype=torch.int64)
    with ShardProfile(loaded, tmp_path / "shards/s.h5", {0}).batch(0, ids):
        pass
    assert "the memory profile could not be written" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_the_allocators_history_is_dumped_and_switched_off_on_a_gpu_even_if_the_batch_fails(
    tmp_path, monkeypatch, fails
):
    """The order of the calls into torch, with those of CUDA replaced."""
    said = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: said.append(enabled)
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", said.append)
    loaded = loaded_tiny(tmp_path / "model")
    on_gpu = SimpleNamespace(architecture=loaded.architecture, device=torch.device("cuda"))
    ids = torch.zeros(1, 5, dtype=torch.int64)
    outcome = pytest.raises(OutOfMemoryError) if fails else nullcontext()
    with outcome, ShardProfile(on_gpu, tmp_path / "shards/s.h5", {0}).batch(0, ids):
        if fails:
            raise OutOfMemoryError
    assert said == ["all", str(tmp_path / "memory/s.pickle"), None]


@pytest.mark.gpu(real="the allocator's history")
def test_on_a_gpu_the_peak_is_the_allocators_and_its_history_is_kept(tmp_path):
    loaded = loaded_tiny(tmp_path / "model", precision="bf16", device="cuda")
    ids = torch.randint(128, (64, 256), generator=torch.Generator().manual_seed(0))
    runner = ResidentRunner(loaded, residuals_of(loaded.architecture), 256, "bf16")
    runner.run(ids, lambda *_: None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.run(ids, lambda *_: None)
    peak = torch.cuda.max_memory_allocated() - before
    with ShardProfile(loaded, tmp_path / "shards/s.h5", {0}).batch(0, ids) as captured:
        runner.run(ids, lambda *_: None, captured)
    found = json.loads((tmp_path / "memory/s.json").read_text())
    assert found["peak_bytes"] == pytest.approx(peak, rel=0.01)
    with (tmp_path / "memory/s.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    assert any(event["action"] == "alloc" for trace in snapshot["device_traces"] for event in trace)


@pytest.mark.parametrize("number", [-1, 2, 7])
def test_a_shard_that_the_run_does_not_have_is_refused_in_one_line(number):
    with pytest.raises(
        ConfigError, match=rf"^memory\.profile_shard: {number} is no shard; .* are 0 to 1$"
    ):
        compose.runs(ROOT / "config", "smollm2-135m", f"memory.profile_shard={number}")


def test_the_key_is_frozen_for_the_extraction_alone_and_only_where_it_is_set(tmp_path):
    (plain,) = compose.runs(ROOT / "config", "smollm2-135m", "name=r").values()
    (requested,) = compose.runs(
        ROOT / "config", "smollm2-135m", "name=r memory.profile_shard=1"
    ).values()
    assert {s for s in frozen.STAGES if plain.stage(s) != requested.stage(s)} == {"extract"}
    for stage in frozen.STAGES:
        assert "profile_shard" not in json.dumps(plain.stage(stage))
    digests = []
    for number, run in enumerate((plain, requested)):
        frozen.freeze(run.stage("extract"), tmp_path / f"{number}.json")
        digests.append(frozen.frozen_digest(tmp_path / f"{number}.json"))
    assert digests[0] == digests[1]
    assert frozen.load_frozen(tmp_path / "0.json").memory.profile_shard is None
    assert frozen.load_frozen(tmp_path / "1.json").memory.profile_shard == 1
    assert (
        frozen.to_plain(frozen.load_frozen(tmp_path / "1.json")) == plain.stage("extract")["config"]
    )


def test_the_digest_of_a_config_is_of_all_but_the_run_s_name(tmp_path):
    """So that a shard is resumed under another name, and with a key where it was begun without."""
    digests = set()
    for words in ("name=a", "name=b", "name=b memory.profile_shard=1", "name=b store.dtype=fp16"):
        (run,) = compose.runs(ROOT / "config", "smollm2-135m", words).values()
        frozen.freeze(run.stage("extract"), tmp_path / "c.json")
        digests.add((words.endswith("fp16"), frozen.frozen_digest(tmp_path / "c.json")))
    assert len(digests) == len({digest for _, digest in digests}) == 2
