"""The engine against plain transformers: every architecture, uneven lengths, chunks, precisions,
and a job killed.
"""

import dataclasses
import functools
import json
import logging
import os
import random
import shutil
import time

import h5py
import numpy as np
import pytest
import theloom
import torch
from support import (
    TINY,
    a_config,
    build_tiny,
    extract_with_small_commits,
    forked,
    plain_residuals,
    residuals_of,
    stages,
)
from theloom.config.schema import ArchitectureConfig
from theloom.corpus import batching
from theloom.dataset.merge import merge_shards
from theloom.devices import gpu, host
from theloom.devices.host import DeviceMemory
from theloom.engine import model_record
from theloom.engine.resident import ResidentRunner
from theloom.errors import HookError, MemoryPlanError, ModelError, StoreError
from theloom.model import files, loading
from theloom.model.checks import self_check
from theloom.model.forward import forward_residuals
from theloom.pipeline import load_model
from theloom.planning.plan import MAX_BATCH_TOKENS
from theloom.precision import TOLERANCE, torch_dtype
from theloom.store import writer

LENGTHS = [1, 2, 5, 6, 31, 30, 7, 64, 12, 1]


def rows_of_engine(folder, ids, chunk_size, batch_tokens, precision="fp32"):
    """Every residual of every window, by the engine: (window, hook) to (position, hidden size)."""
    config = a_config(folder, f"memory.precision_mode={precision}")
    loaded = loading.load_model(config, files.prepare_files(config.model))
    runner = ResidentRunner(loaded, residuals_of(loaded.architecture), chunk_size, precision)
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    found = {}
    for batch in batching.plan_batches(np.diff(offsets), batch_tokens, chunk_size):

        def keep(hook, start, values, batch=batch):
            for row, (window, length) in enumerate(zip(batch.windows, batch.lengths, strict=True)):
                found.setdefault((window, hook), []).append(
                    values[row, : max(0, length - start)].clone()
                )

        runner.run(batching.padded(batch, np.concatenate(ids), offsets), keep)
    return {key: torch.cat(chunks) for key, chunks in found.items()}


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize(("chunk_size", "batch_tokens"), [(7, 20), (100, 150)])
def test_rows_equal_plain_transformers(tmp_path, model_type, chunk_size, batch_tokens):
    folder = build_tiny(model_type, tmp_path)
    generator = np.random.default_rng(1)
    ids = [generator.integers(3, 128, n).astype("<i4") for n in LENGTHS]
    found = rows_of_engine(folder, ids, chunk_size, batch_tokens)
    assert len(found) == len(LENGTHS) * 6
    for window, tokens in enumerate(ids):
        for hook, expected in plain_residuals(folder, tokens.tolist()).items():
            rows = found[window, hook]
            assert rows.shape == expected.shape
            error = float((rows - expected).abs().max() / expected.abs().max())
            assert error <= 1e-5, (model_type, window, hook, error)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_rows_are_the_model_s_own(tmp_path, precision):
    folder = build_tiny("llama", tmp_path)
    ids = [np.arange(3, 20, dtype="<i4")]
    found = rows_of_engine(folder, ids, 100, 100, precision)
    for hook, expected in plain_residuals(folder, ids[0].tolist(), torch_dtype(precision)).items():
        assert found[0, hook].dtype == torch_dtype(precision)
        assert torch.equal(found[0, hook], expected)


def test_documents_of_a_model_that_cannot_be_streamed_go_in_one_pass(tmp_path, quick_llama, caplog):
    """RecurrentGemma keeps state on its modules, which a KV cache does not carry."""
    folder = build_tiny(
        "recurrent_gemma", tmp_path / "m", vocab_size=49152, lru_width=64, attention_window_size=8
    )
    for file in quick_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    requested = "extraction.shards=1 corpus.max_tokens=60 corpus.context_length=24 "
    requested += "memory.streaming_chunk_size=16"
    run = stages(tmp_path / "run", folder, requested).all()
    assert "cannot be streamed" in caplog.text
    acts = theloom.open(run.activations)
    assert np.diff(acts.window_offset).max() == 24
    assert acts.attributes["chunk_size"] == "[24]"
    run.verify()


def test_missing_weights_are_refused_and_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = build_tiny("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = a_config(folder)
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        loading.load_model(config, files.prepare_files(config.model))


def edited(folder, **numbers):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | numbers))
    return a_config(folder)


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path):
    config = edited(build_tiny("llama", tmp_path), intermediate_size=128)
    with pytest.raises(
        ModelError,
        match=r"has 9 weights of another shape .*\(layers\.0\.mlp\.down_proj\.weight: \(64, 96\)",
    ):
        loading.load_model(config, files.prepare_files(config.model))


def test_weights_of_a_head_are_said_and_others_refused_in_a_line(tmp_path, caplog):
    config = a_config(build_tiny("llama", tmp_path))
    with caplog.at_level(logging.INFO):
        loading.load_model(config, files.prepare_files(config.model))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["not read, as no hook point needs them: lm_head.weight"]
    config = edited(tmp_path, num_hidden_layers=2)
    with pytest.raises(
        ModelError,
        match=r"9 weights that have no place in LlamaModel.*model\.layers\.2\.input_layernorm",
    ):
        loading.load_model(config, files.prepare_files(config.model))
    assert "LOAD REPORT" not in caplog.text


def test_a_profile_s_numbers_must_be_those_of_the_model(tmp_path):
    found = files.read_config(a_config(build_tiny("llama", tmp_path)).model)
    right = ArchitectureConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=128,
    )
    files.check_architecture(right, found, "m")
    files.check_architecture(None, found, "m")
    with pytest.raises(
        ModelError, match=r"num_hidden_layers: the profile says 4, the config of m says 3"
    ):
        files.check_architecture(dataclasses.replace(right, num_hidden_layers=4), found, "m")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_llama):
    return stages(tmp_path_factory.mktemp("run"), quick_llama, "extraction.shards=2").all()


def test_stored_rows_equal_plain_transformers_for_every_document(finished, quick_llama):
    acts = theloom.open(finished.activations)
    assert len(acts) == 2000
    assert max(len(acts.document(d)) for d in acts.documents) > 256  # beyond the context: windows
    for window, (begin, end) in enumerate(
        zip(acts.window_offset[:-1], acts.window_offset[1:], strict=True)
    ):
        rows = slice(int(begin), int(end))
        expected = plain_residuals(quick_llama, acts.input_ids.numpy(rows).tolist())
        assert acts.position.numpy(rows).tolist() == list(range(end - begin))
        for hook in acts.hooks:
            error = float(
                (acts[hook][rows] - expected[hook]).abs().max() / expected[hook].abs().max()
            )
            assert error <= 1e-5, (window, hook, error)


def test_the_files_say_where_they_came_from(finished):
    attributes = theloom.open(finished.activations).attributes
    for name in (
        "model_source",
        "model_fingerprint",
        "model_precision",
        "model_attention",
        "corpus_hash",
        "tokenizer",
        "batch_tokens",
        "chunk_size",
        "arithmetic",
    ):
        assert attributes[name]
    assert "precision_mode" in attributes["config"]
    assert "torch" in attributes["package_versions"]


def test_no_file_holds_the_user_s_home(tmp_path, monkeypatch, quick_llama):
    home = tmp_path / "home" / "someone"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "model").symlink_to(quick_llama)
    (home / "texts.txt").write_text("some text of a private folder")
    run = stages(
        tmp_path / "run", home / "model", f"corpus=text corpus.path={home}/texts.txt"
    ).all()
    run.verify()
    for file in [*run.folder.glob("*.h5"), *run.shards]:
        assert str(home).encode() not in file.read_bytes(), file


@pytest.fixture(scope="module")
def half_run(tmp_path_factory, quick_llama):
    """A run of each precision, which is not merged yet, made once."""

    @functools.cache
    def made(precision):
        requested = f"memory.precision_mode={precision} corpus.max_tokens=500"
        run = stages(tmp_path_factory.mktemp("half"), quick_llama, requested)
        run.prepare()
        run.extract()
        return run

    return made


@pytest.mark.parametrize("merge", ["virtual", "physical"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_stored_bit_for_bit(half_run, quick_llama, merge, precision):
    run = half_run(precision)
    merge_shards(run.shards, merge, run.activations)
    acts = theloom.open(run.activations)
    assert acts.dtype == torch_dtype(precision)
    rows = slice(*(int(r) for r in acts.window_offset[:2]))
    alone = rows_of_engine(quick_llama, [acts.input_ids.numpy(rows)], 64, 64, precision)
    stored = acts["blocks.0.hook_resid_pre"][
        rows
    ]  # the embedding: no sum whose order a batch could change
    assert torch.equal(stored, alone[0, "blocks.0.hook_resid_pre"])
    with h5py.File(run.activations) as file:  # plain h5py reads numbers
        numbers = file["hooks/blocks.0.hook_resid_pre/activations"][rows].astype("f4")
    assert np.array_equal(numbers, stored.float().numpy())
    run.verify()


def test_more_shards_than_documents_leave_empty_ones(tmp_path, quick_llama):
    run = stages(tmp_path, quick_llama, "extraction.shards=5 corpus.max_tokens=300").all()
    acts = theloom.open(run.activations)
    assert len(acts) == 300
    assert len(run.shards) == 5
    run.verify()


def test_one_token_in_one_document(tmp_path, quick_llama):
    run = stages(tmp_path, quick_llama, "corpus.max_tokens=1").all()
    run.verify()
    assert len(theloom.open(run.activations)) == 1


def test_a_hook_the_model_lacks_ends_before_loading(tmp_path, quick_llama, monkeypatch):
    run = stages(tmp_path, quick_llama, "memory.activation_cache_filter=[blocks.3.hook_resid_post]")
    with pytest.raises(HookError, match=r"blocks\.2\.hook_resid_post"):
        run.prepare()


def test_a_run_larger_than_the_disk_ends_at_the_estimate(tmp_path, quick_llama):
    run = stages(tmp_path, quick_llama, "corpus.max_tokens=10000000000000")
    with pytest.raises(MemoryPlanError, match=r"writes .* GB and .* has .* GB free"):
        run.prepare()


def test_a_run_larger_than_the_memory_ends_before_loading(tmp_path, quick_llama, monkeypatch):
    run = stages(tmp_path, quick_llama)
    monkeypatch.setattr(host, "memory", lambda: DeviceMemory(10**9, 10**6, "a small cgroup"))
    monkeypatch.setattr(load_model, "load_model", None)
    monkeypatch.setattr(model_record, "load_model", None)
    with pytest.raises(
        MemoryPlanError, match=r"cpu has 1.0 MB of 1.00 GB free, limited by a small cgroup"
    ):
        run.prepare()


@pytest.mark.parametrize("execution", ["resident", "layerwise"])
def test_a_fallback_of_the_precision_warns_once_a_job(
    tmp_path, quick_llama, monkeypatch, caplog, execution
):
    monkeypatch.setattr(gpu, "cpu_has_fp16", lambda: False)
    requested = "memory.precision_mode=fp16 corpus.max_tokens=300 extraction.shards=1 "
    run = stages(tmp_path, quick_llama, requested + f"extraction.execution={execution}")
    for stage in (run.prepare, run.extract, lambda: (run.merge(), run.verify())):
        caplog.clear()
        stage()
        warnings = [r for r in caplog.records if "precision_mode=fp16" in r.getMessage()]
        assert [r.levelname for r in warnings] == ["WARNING"]
    assert theloom.open(run.shards[0]).attributes["model_precision"] == "fp32"


def test_a_model_changed_since_it_was_recorded_is_refused(tmp_path, quick_llama):
    folder = shutil.copytree(quick_llama, tmp_path / "model")
    run = stages(tmp_path / "run", folder, "corpus.max_tokens=100")
    run.prepare()
    os.utime(folder / "model.safetensors")  # touched, but the same
    run.extract()
    build_tiny("llama", folder, vocab_size=49152, intermediate_size=64)
    for file in run.shards:
        file.unlink()
    with pytest.raises(ModelError, match="have changed since load_model"):
        run.extract()


def test_another_precision_than_recorded_is_refused(tmp_path, quick_llama):
    run = stages(tmp_path, quick_llama, "corpus.max_tokens=100")
    run.prepare()
    recorded = model_record.read(run.folder / "model.h5")
    other = stages(
        tmp_path, quick_llama, "corpus.max_tokens=100 memory.precision_mode=bf16"
    ).config("extract")
    with pytest.raises(StoreError, match=r"made in fp32.*gives bf16"):
        model_record.load_again(other, recorded)


def data_of(run):
    acts = theloom.open(run.activations)
    return {hook: acts[hook].numpy(...).tobytes() for hook in acts.hooks} | {
        "hash": acts.window_hash.tobytes()
    }


def rows_committed(partial):
    """Rows that the log of an unfinished shard vouches for; the file is readable at any moment."""
    if not partial.exists():
        return 0
    try:
        with h5py.File(partial) as file:
            return int(file["commit_log"]["rows"].max())
    except (OSError, KeyError):  # its metadata is being written, before any row
        return 0


def test_a_job_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(tmp_path, quick_llama):
    requested = "corpus.max_tokens=16000 extraction.shards=1 extraction.batch_tokens=128"
    whole = stages(tmp_path / "whole", quick_llama, requested).all()
    run = stages(tmp_path / "killed", quick_llama, requested)
    run.prepare()
    partial = run.folder / "shards/00000-of-00001.h5.partial"
    choose = random.Random(0)
    committed = [0]
    for number in range(8):
        job = forked(extract_with_small_commits, run.folder)
        # Once it has committed something new; else at any moment, also before the model is loaded.
        if number % 3:
            while job.is_alive() and rows_committed(partial) <= committed[-1]:
                time.sleep(0.02)
        job.join(choose.uniform(0, 0.05))
        job.kill()
        job.join()
        if run.shards:
            break
        if partial.exists():
            committed.append(rows_committed(partial))
            assert committed[-1] >= committed[-2]  # nothing that was committed is lost
    assert (
        len(set(committed)) >= 4
    )  # jobs died at several places, and the next one went on from there
    if not run.shards:
        run.extract()
    run.merge()
    assert data_of(run) == data_of(whole)
    run.verify()


def test_an_unfinished_shard_of_another_config_is_discarded_with_a_warning(
    tmp_path, quick_llama, caplog
):
    run = stages(tmp_path, quick_llama, "corpus.max_tokens=200 extraction.shards=1").all()
    run.activations.unlink()
    (shard,) = run.shards
    partial = shard.with_name(shard.name + ".partial")
    shard.rename(partial)
    again = stages(
        tmp_path,
        quick_llama,
        "corpus.max_tokens=200 extraction.shards=1 store.dtype=fp16",
    )
    again.prepare()
    with caplog.at_level(logging.WARNING):
        again.extract()
    assert "is of another config" in caplog.text
    partial.write_bytes(b"not HDF5")
    shard.unlink()
    with caplog.at_level(logging.WARNING):
        again.extract()
    assert "is not a shard that can be read" in caplog.text
    again.merge()
    again.verify()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_rows_of_plain_transformers_there(tmp_path, precision):
    folder = build_tiny("llama", tmp_path)
    config = a_config(folder, f"memory.precision_mode={precision} extraction.device=cuda")
    loaded = loading.load_model(config, files.prepare_files(config.model))
    self_check(loaded.architecture, loaded.tolerance)
    ids = torch.arange(3, 60)[None]
    rows = forward_residuals(loaded.architecture, ids, chunk_size=16)
    with torch.no_grad():
        states = loaded.architecture.model(
            ids.cuda(), output_hidden_states=True, use_cache=False
        ).hidden_states
    tolerance = TOLERANCE[precision]
    for block in (0, 1):
        expected = states[block + 1].float().cpu()
        error = float(
            (rows[f"blocks.{block}.hook_resid_post"] - expected).abs().max() / expected.abs().max()
        )
        assert error <= tolerance


def test_a_shard_that_was_begun_is_gone_on_with_as_it_was_planned(
    tmp_path, quick_llama, monkeypatch
):
    requested = (
        "extraction.batch_tokens=null extraction.shards=1 corpus.max_tokens=6000 "
        "corpus.context_length=200"
    )
    whole = stages(tmp_path / "whole", quick_llama, requested).all()
    run = stages(tmp_path / "run", quick_llama, requested)
    run.prepare()
    forward, calls = ResidentRunner.run, []

    def fails_at_the_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        forward(self, *args)

    monkeypatch.setattr(ResidentRunner, "run", fails_at_the_third)
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        run.extract()
    committed = rows_committed(run.folder / "shards/00000-of-00001.h5.partial")
    monkeypatch.setattr(ResidentRunner, "run", forward)
    monkeypatch.setitem(MAX_BATCH_TOKENS, "cpu", 128)  # what a job begun now would take
    run.extract()
    run.merge()
    found, expected = theloom.open(run.activations), theloom.open(whole.activations)
    assert found.attributes["batch_tokens"] == "[2048]"
    for hook in found.hooks:
        rows, same = found[hook][:].numpy(), expected[hook][:].numpy()
        # A batch that was not committed yet is larger than a job begun now would take, goes in
        # two passes, and products of fewer rows may round otherwise.
        np.testing.assert_allclose(rows, same, rtol=0, atol=1e-5)
        assert (rows == same).all(1).sum() >= committed
    run.verify()


def test_shards_whose_jobs_had_room_for_different_batches_are_one_data_set(
    tmp_path, quick_llama, monkeypatch
):
    run = stages(
        tmp_path,
        quick_llama,
        "extraction.batch_tokens=null corpus.max_tokens=4000 corpus.context_length=200",
    )
    run.prepare()
    run.extract(0)
    monkeypatch.setitem(MAX_BATCH_TOKENS, "cpu", 128)
    run.extract(1)
    run.merge()
    run.verify()
    assert theloom.open(run.activations).attributes["batch_tokens"] == "[2048, 128]"


def test_what_was_predicted_and_what_was_found_lie_side_by_side(tmp_path, quick_llama):
    run = stages(tmp_path, quick_llama, "corpus.max_tokens=500")
    run.prepare()
    with h5py.File(run.folder / "model.h5") as file:
        predicted, found = (
            dict(file[f"memory/{side}"].attrs) for side in ("predicted", "measured")
        )
        plan = dict(file["memory/plan"].attrs)
    for category in ("weights", "kv_cache", "captured", "temporaries"):
        assert found[category] == pytest.approx(predicted[category], rel=1e-3)
    tensors = sum(found[part] for part in ("kv_cache", "captured", "temporaries", "logits"))
    assert found["growth"] == tensors + found["files"] + found["heap"]
    assert plan["longest"] <= 500
    recorded, settings = model_record.read(run.folder / "model.h5"), run.config("extract")
    points = recorded.catalog.select(settings.memory.activation_cache_filter)
    real = loading.load_model(
        settings, files.prepare_files(settings.model), points
    ).architecture.model
    assert found["weights"] == sum(
        t.numel() * t.element_size() for t in [*real.parameters(), *real.buffers()]
    )
