"""Runs whose rows have a scale each, beside the same run without: every way to read them gives the
round trip of the exact rows, bit for bit.
"""

import re

import h5py
import hdf5plugin  # noqa: F401  registers HDF5's zstd filter
import numpy as np
import pytest
import theloom
import torch
from model_folders import llama
from model_folders import run as small_run
from safetensors.torch import load_file
from support import ROOT
from theloom import exports
from theloom.config.auto import store_precision
from theloom.dataset import inspect
from theloom.dataset.merge import merge_shards
from theloom.errors import HookError, VerificationError
from theloom.hooks.points import HookCatalog, HookPoint, check_integers
from theloom.planning.estimates import estimate_file
from theloom.store.encoding import scaled

PAGE = (ROOT / "workflow/docs/file-format.md").read_text(encoding="utf-8")
TEXTS = [f"{n} " + "the lazy dog jumps. " * n for n in (1, 9, 2, 4, 3)]
HOOK, SCORES = "blocks.1.hook_resid_post", "blocks.1.attn.hook_attn_scores"
KEYS = (
    f"memory.activation_cache_filter=[{HOOK},blocks.0.attn.hook_pattern,{SCORES}] "
    "extraction.attention=eager extraction.shards=2 corpus.context_length=64 verify.documents=3 "
    "memory.precision_mode=bf16 store.allow_nonfinite=true store.dtype="
)
TYPES = ["fp8_e4m3", "int8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    """The same run by `store.dtype`."""
    return {
        stored: small_run(tmp_path_factory.mktemp(stored), model, KEYS + stored, TEXTS).all()
        for stored in ("auto", *TYPES)
    }


@pytest.fixture(scope="module", params=TYPES)
def pair(request, runs):
    """Rows that are read, and by hook point what they should be."""
    exact = theloom.open(runs["auto"].activations)
    assert exact.stored_as == "bf16"
    truth = {hook: scaled.round_trip(exact[hook][:], request.param) for hook in exact.hooks}
    return theloom.open(runs[request.param].activations), truth


def same(one, other) -> bool:
    return bool(torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9)))


def test_rows_are_the_round_trip_of_the_exact_ones_by_any_index(pair):
    acts, truth = pair
    assert (acts.precision, acts.dtype) == ("fp32", torch.float32)
    assert acts.stored_as in TYPES
    assert any(~rows.isfinite().all() for rows in truth.values()), "masked scores are -inf"
    mask = np.arange(len(acts)) % 3 == 0
    for hook, expected in truth.items():
        rows = acts[hook]
        for index in (slice(None), slice(5, 90), slice(None, None, -7), [3, 1, 3], [], mask):
            own = np.asarray(index, int) if isinstance(index, list) else index
            assert same(rows[index], torch.from_numpy(expected.numpy()[own].copy())), (hook, index)
        assert same(rows[-1], expected[-1])
        assert same(rows[2:9, 0], expected[2:9, 0])
        assert rows.nbytes == len(acts) * (expected[0].numel() + 4)
    document = acts.document(1)
    assert same(document[HOOK], truth[HOOK][document.rows])
    last = truth[HOOK][acts.document_offset[1:] - 1]
    assert same(acts.select("last")[HOOK][:], last)
    assert np.array_equal(np.asarray(acts[HOOK]), truth[HOOK].numpy())


def test_batches_pairs_and_exports_have_these_rows(pair, runs, tmp_path):
    acts, truth = pair
    batch = next(acts.batches([HOOK, "row"], 32, shuffle=True, seed=1))
    assert same(batch[HOOK], truth[HOOK][batch["row"]])
    low = next(acts.batches(HOOK, 16, dtype="bf16"))
    assert torch.equal(low, truth[HOOK][:16].bfloat16())
    both = theloom.open_pair(acts, acts, names=["a", "b"])
    assert same(next(both.batches(HOOK, 8))[:, 1], truth[HOOK][:8])
    exact = theloom.open(runs["auto"].activations)
    with pytest.raises(HookError, match="do not fit in one tensor"):
        next(theloom.open_pair(acts, exact, names=["a", "b"]).batches(HOOK, 8))
    folder = tmp_path / "npy"
    exports.export(acts, "npy", folder, hooks=[HOOK])
    (file,) = folder.glob(f"**/*{HOOK}*.npy")
    assert np.array_equal(np.load(file), truth[HOOK].numpy())
    exports.export(acts, "safetensors", tmp_path / "safetensors", hooks=[HOOK])
    (file,) = (tmp_path / "safetensors").glob("*.safetensors")
    assert same(load_file(file)[HOOK], truth[HOOK])
    table = acts.to_xarray([HOOK], slice(3, 9))
    assert table.attrs["precision"] == acts.stored_as
    assert np.array_equal(table[HOOK].values, truth[HOOK][3:9].numpy())


@pytest.mark.parametrize("mode", ["virtual", "physical"])
@pytest.mark.parametrize("stored", TYPES)
def test_the_page_s_recipe_reads_a_merged_file_with_h5py_alone(runs, tmp_path, stored, mode):
    run = runs[stored]
    merged = run.folder / f"{mode}.h5"
    merge_shards(run.shards, mode, merged)
    code = next(c for c in re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL) if "_scale" in c)
    names: dict = {}
    exec(code, names)
    truth = theloom.open(runs["auto"].activations)
    with h5py.File(merged) as file:
        if mode == "virtual":
            assert file["sources/byte_offset"].shape == (2, 3 + 2 * len(truth.hooks))
        for hook in truth.hooks:
            expected = scaled.round_trip(truth[hook][:], stored)
            values = names["rows_of"](file, hook, slice(None))
            assert np.array_equal(values, expected.numpy(), equal_nan=True), hook


@pytest.mark.parametrize("mode", ["virtual", "physical"])
def test_a_packed_run_reads_as_a_plain_one(runs, model, tmp_path, mode):
    packed = small_run(
        tmp_path / "zstd", model, f"{KEYS}int8 store.compression=zstd store.merge={mode}", TEXTS
    ).all()
    plain, acts = theloom.open(runs["int8"].activations), theloom.open(packed.activations)
    assert np.array_equal(plain.window_hash, acts.window_hash)
    assert inspect.check_hashes(acts)[0] == []
    for hook in plain.hooks:
        assert same(acts[hook][:], plain[hook][:])
        assert same(acts[hook][[7, 2]], plain[hook][[7, 2]])
    with h5py.File(packed.activations) as file:
        stored = file[f"hooks/{HOOK}/activations"]
        assert stored.attrs["encoding"] == "int8"
        values = stored[:] * file[f"hooks/{HOOK}/activations_scale"][:][:, None]
        assert np.array_equal(values, plain[HOOK][:].numpy())


def test_statistics_hashes_and_counts_are_of_the_stored_values(pair):
    acts, truth = pair
    wrong, nonfinite = inspect.check_hashes(acts, threads=2)
    assert (wrong, nonfinite.tolist()) == ([], [0, 0, 0])
    found, rows = acts.statistics[HOOK], truth[HOOK].double()
    assert found.mean == pytest.approx(rows.mean(0).numpy(), rel=1e-5, abs=1e-6)
    assert found.norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-5)
    assert acts.stored_as in repr(acts)
    assert inspect.file_schema(acts)["precision"] == acts.stored_as


def test_a_changed_bit_of_a_scale_is_found(runs, tmp_path):
    run = runs["int8"]
    shard = run.shards[1]
    sound = shard.read_bytes()
    with h5py.File(shard, "r+") as file:
        file[f"hooks/{HOOK}/activations_scale"][4] *= 1.5
    try:
        with pytest.raises(VerificationError, match="rows of 1 windows are not those"):
            run.verify()
    finally:
        shard.write_bytes(sound)


@pytest.mark.parametrize("stored", TYPES)
def test_the_estimate_counts_each_byte_of_rows_and_scales(runs, stored):
    run = runs[stored]
    found = estimate_file.read(run.folder / "estimate.h5")
    acts = theloom.open(run.activations)
    written = 0
    for shard in run.shards:
        with h5py.File(shard) as file:
            written += sum(
                d.id.get_storage_size() for group in file["hooks"].values() for d in group.values()
            )
    # attention's rows are as wide as the longest window, which the estimate takes as the limit
    longest = int(np.diff(acts.window_tokens).max())
    assert longest == 64
    assert written == len(acts) * found.row_bytes[store_precision(run.config("extract"), "bf16")]
    low = found.row_bytes["bf16"]
    assert found.row_bytes[stored] == low // 2 + 3 * 4


@pytest.mark.parametrize("words", ["rows.pool=mean", "rows.keep=last rows.pool=none"])
def test_pooled_and_kept_rows_get_a_scale_too(model, tmp_path, words):
    keys = (
        f"memory.activation_cache_filter=[{HOOK}] extraction.shards=1 corpus.context_length=50 "
        f"verify.documents=2 {words} store.dtype="
    )
    exact, found = (
        small_run(tmp_path / stored, model, keys + stored, TEXTS).all()
        for stored in ("auto", "int8")
    )
    rows = theloom.open(found.activations)[HOOK][:]
    assert len(rows) == len(TEXTS)
    assert same(rows, scaled.round_trip(theloom.open(exact.activations)[HOOK][:], "int8"))
    found.verify()


def test_numbers_of_experts_are_refused_in_one_line():
    experts = HookPoint("blocks.0.mlp.hook_expert_indices", 0, "mlp.hook_expert_indices", (2,))
    logits = HookPoint("blocks.0.mlp.hook_router_logits", 0, "mlp.hook_router_logits", (4,))
    with pytest.raises(HookError, match="not exact in int8, where each row has a scale; set "):
        check_integers([experts], HookCatalog([experts, logits], {}), "int8")
