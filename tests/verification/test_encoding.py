"""Verification of rows with a scale: what rounding explains passes, an error of one code does not,
and the file says what the encoding costs.
"""

import h5py
import numpy as np
import pytest
import theloom
import torch
from model_folders import llama
from model_folders import run as small_run
from theloom.errors import VerificationError
from theloom.pipeline import console
from theloom.report import page
from theloom.store import file_format
from theloom.verification import in_parts, recorded, verify
from theloom.verification.encoding import Cost, cost

TEXTS = [f"{n} " + "the lazy dog jumps. " * n for n in (1, 9, 2, 4, 3, 1)]
HOOK = "blocks.1.hook_resid_post"
KEYS = (
    "memory.activation_cache_filter=[blocks.0.hook_resid_pre,blocks.1.hook_resid_post] "
    "extraction.shards=2 verify.documents=4 store.dtype="
)
TYPES = ["fp8_e4m3", "int8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    model = llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)
    return {
        stored: small_run(tmp_path_factory.mktemp(stored), model, KEYS + stored, TEXTS).all()
        for stored in ("auto", *TYPES)
    }


@pytest.mark.parametrize("stored", TYPES)
def test_a_sound_run_is_verified_and_says_what_its_rows_cost(runs, stored):
    run = runs[stored]
    run.verify()
    acts, exact = theloom.open(run.activations), theloom.open(runs["auto"].activations)
    with file_format.open_h5(run.folder / "verification.h5", "verification") as file:
        assert (file["recomputed/max_abs_error"][:] <= 1e-5 * file["recomputed/max_abs"][:]).all()
        windows = file["recomputed/window"][:].tolist()
        found = {name: file[f"encoding/{name}"][:] for name in Cost._fields}
    for number, hook in enumerate(acts.hooks):
        for place, window in enumerate(windows):
            rows = slice(*(int(r) for r in acts.window_offset[window : window + 2]))
            one, other = acts[hook][rows].double(), exact[hook][rows].double()
            errors = (one - other).norm(dim=1) / other.norm(dim=1)
            cosines = torch.cosine_similarity(one, other, dim=1)
            expected = errors.mean(), errors.max(), cosines.mean(), cosines.min()
            for name, value in zip(Cost._fields, expected, strict=True):
                assert found[name][place, number] == pytest.approx(float(value), rel=1e-3)
    of_all = recorded.read(run.folder / "verification.h5").cost
    assert of_all.max_error == found["max_error"].max()
    assert of_all.min_cosine == found["min_cosine"].min()
    assert of_all.error < (0.03 if stored == "fp8_e4m3" else 0.01)
    words = f"{stored} rows: relative error {of_all.error:.2%}, at most"
    assert words in console.summary(run.folder)
    assert words in page._verification(run.folder / "verification.h5", stored).value


@pytest.mark.parametrize("stored", TYPES)
def test_an_error_of_one_code_is_detected(runs, monkeypatch, stored):
    run = runs[stored]
    acts = theloom.open(run.activations)
    longest = int(np.diff(acts.window_offset).argmax())
    row, shard = int(acts.window_offset[longest]), 0
    for number, file in enumerate(run.shards):
        rows = len(theloom.open(file))
        if row < rows:
            shard = number
            break
        row -= rows
    monkeypatch.setattr(verify, "check_hashes", lambda acts, **_: ([], np.zeros(2, int)))
    sound = run.shards[shard].read_bytes()
    with h5py.File(run.shards[shard], "r+") as file:
        codes = file[f"hooks/{HOOK}/activations"]
        sizes = codes[row] & 0x7F if stored == "fp8_e4m3" else np.abs(codes[row])
        most = int(sizes.argmax())
        toward_zero = 1 if stored == "fp8_e4m3" else np.sign(codes[row, most])
        codes[row, most] -= toward_zero
    try:
        with pytest.raises(VerificationError, match=rf"{HOOK} differs from the model"):
            run.verify()
    finally:
        run.shards[shard].write_bytes(sound)


def test_several_jobs_write_what_one_writes(runs, tmp_path):
    run = runs["int8"]
    run.verify()
    counts, errors = tmp_path / "rows.h5", [tmp_path / "0.h5", tmp_path / "1.h5"]
    in_parts.check_rows(run.activations, 0, 1, counts)
    inputs = (run.config("verify"), run.activations, run.folder / "model.h5")
    for number, file in enumerate(errors):
        in_parts.recompute_documents(*inputs, number, 2, file)
    output = tmp_path / "gathered.h5"
    in_parts.gather(run.activations, run.folder / "model.h5", [counts], errors, output)
    with h5py.File(output) as one, h5py.File(run.folder / "verification.h5") as other:
        assert {*one} == {*other} >= {"encoding"}
        for group in ("encoding", "recomputed"):
            for name in other[group]:
                assert np.array_equal(one[group][name][:], other[group][name][:]), name


def test_costs_of_rows_of_zeros_and_of_values_that_are_not_finite():
    rows = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, float("-inf")]])
    assert cost(rows, rows) == Cost(0.0, 0.0, 1.0, 1.0)
    other = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.5, float("-inf")]])
    assert cost(other, rows).max_error == pytest.approx(0.1)
    assert cost(rows[:0], rows[:0]) == Cost(0.0, 0.0, 1.0, 1.0)
