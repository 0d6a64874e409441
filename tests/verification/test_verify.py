"""Verification detects changed bytes, rows of another model, and nonfinite values."""

import shutil

import h5py
import numpy as np
import pytest
import theloom
import torch
from simulated_runs import build, prepare
from support import build_tiny, plain_residuals, stages
from theloom.dataset import inspect
from theloom.errors import VerificationError
from theloom.model import files, loading
from theloom.store import file_format
from theloom.verification import choice, comparison, recompute, verify
from torch.nn import functional


@pytest.fixture
def run(tmp_path, tiny_llama):
    return stages(tmp_path, tiny_llama, "extraction.shards=2 corpus.max_tokens=1500").all()


def change(run, shard, hook, row, value):
    with h5py.File(run.shards[shard], "a") as file:
        file[f"hooks/{hook}/activations"][row, 3] = value


def unchecked(acts, **_):
    """`check_hashes`, as if no bit had changed."""
    return [], np.zeros(len(acts.hooks), int)


def test_a_sound_run_is_verified_on_eight_documents_the_longest_among_them(run):
    run.verify()
    acts = theloom.open(run.activations)
    with file_format.open_h5(run.folder / "verification.h5", "verification") as file:
        tokens, windows = file["recomputed/tokens"][:], file["recomputed/window"][:]
        assert len(windows) == min(8, len(acts.documents))
        assert len(set(acts.window_document[windows])) == len(windows)
        assert tokens[0] == np.diff(acts.window_offset).max()
        assert (tokens > 64).sum() >= 1  # longer than the chunk size
        assert (file["recomputed/max_abs_error"][:] <= 1e-5 * file["recomputed/max_abs"][:]).all()
        assert file["nonfinite"][:].sum() == 0
        assert file.attrs["windows_hashed"] == len(acts.window_document)


def test_a_changed_bit_is_detected_by_its_hash(run):
    raw = bytearray(run.shards[1].read_bytes())
    with h5py.File(run.shards[1]) as file:
        place = file["hooks/blocks.1.hook_resid_post/activations"].id.get_offset()
    raw[place + 1000] ^= 1
    run.shards[1].write_bytes(raw)
    with pytest.raises(
        VerificationError, match="rows of 1 windows are not those that were written"
    ):
        run.verify()


def test_rows_that_the_model_does_not_give_are_detected(run, monkeypatch):
    acts = theloom.open(run.activations)
    longest = int(np.diff(acts.window_offset).argmax())
    row = int(acts.window_offset[longest])
    shard = 0 if row < len(theloom.open(run.shards[0])) else 1
    first = len(theloom.open(run.shards[0])) if shard else 0
    change(run, shard, "blocks.2.hook_resid_post", row - first, 1.0)
    monkeypatch.setattr(verify, "check_hashes", unchecked)
    with pytest.raises(
        VerificationError, match=r"blocks\.2\.hook_resid_post differs from the model"
    ):
        run.verify()


def test_nonfinite_values_are_counted(run):
    change(run, 0, "blocks.0.hook_resid_post", 2, np.inf)
    change(run, 1, "blocks.0.hook_resid_post", 0, np.nan)
    wrong, nonfinite = inspect.check_hashes(theloom.open(run.activations))
    assert len(wrong) == 2
    assert nonfinite.tolist() == [0, 1 + 1, 0, 0, 0, 0]


def test_the_oracle_is_plain_transformers(run, tiny_llama):
    config = run.config("verify")
    loaded = loading.load_model(config, files.prepare_files(config.model))
    ids = torch.arange(3, 40)[None]
    residuals, expected = (
        recompute.oracle(loaded, {"input_ids": ids}),
        plain_residuals(tiny_llama, ids[0].tolist()),
    )
    assert set(residuals) == {*expected, "ln_final.hook_out"}
    for hook, rows in expected.items():
        assert torch.equal(residuals[hook][0], rows)


def test_documents_are_chosen_by_seed(run):
    acts = theloom.open(run.activations)
    assert choice.choose_windows(acts, 5, seed=1) == choice.choose_windows(acts, 5, seed=1)
    assert choice.choose_windows(acts, 5, seed=1)[0] == int(np.diff(acts.window_offset).argmax())


LARGE = {"bf16": 100.0, "fp32": 32768.0}  # values near them are 0.5 and 0.004 apart


@pytest.fixture(params=LARGE)
def cancelling(request, tmp_path, tiny_llama):
    """A precision, and a model whose last block subtracts the large value that the one before it
    adds to every element.
    """
    from transformers import AutoModelForCausalLM

    folder = build_tiny("llama", tmp_path / "model", vocab_size=49152, mlp_bias=True)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    large = LARGE[request.param]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block, bias in zip(model.model.layers, (0.0, large, -large), strict=True):
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(block.mlp, name).bias.fill_(bias if name == "down_proj" else 0.0)
    model.save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("execution", ["resident", "layerwise"])
def test_rounding_errors_of_the_model_itself_pass(
    tmp_path, cancelling, monkeypatch, caplog, execution
):
    """Large values are far apart: another order of summation moves the rest by as much."""
    (precision, model), hook = cancelling, "blocks.2.hook_resid_post"
    usual, apart, wrong = {"bf16": (0.04, 0.5, 40), "fp32": (1e-5, 0.004, 0.3)}[precision]
    requested = (
        f"corpus.max_tokens=600 extraction.shards=1 extraction.execution={execution} "
        f"memory.precision_mode={precision} memory.activation_cache_filter=[{hook}]"
    )
    run = stages(tmp_path / "run", model, requested).all()
    acts = theloom.open(run.shards[0])
    row = int(acts.window_offset[np.diff(acts.window_offset).argmax()])
    plain = acts[hook][row][3]
    monkeypatch.setattr(verify, "check_hashes", unchecked)

    def verified_with(off):
        change(run, 0, hook, row, float(plain) + off)
        run.verify()
        with file_format.open_h5(run.folder / "verification.h5", "verification") as file:
            error, largest = (
                file["recomputed/max_abs_error"][:].max(),
                file["recomputed/max_abs"][:].max(),
            )
            return error / largest, file["recomputed/tolerance"][0]

    error, allowed = verified_with(0)
    assert error < allowed
    error, allowed = verified_with(apart)
    assert usual < error < allowed < 1
    assert f"{hook}: more than {usual:.2g}; the model itself is" in caplog.text
    with pytest.raises(
        VerificationError, match=r"blocks\.2\.hook_resid_post differs from the model by"
    ):
        verified_with(wrong)
    monkeypatch.setattr(comparison, "MAX_SUSPECT_BYTES", 1000)
    with pytest.raises(VerificationError, match=f"more than {usual} "):
        verified_with(apart)
    assert "of values differ: not compared to FP" in caplog.text


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_rows_whose_products_were_in_tf32_are_not_verified(tmp_path, monkeypatch, tf32):
    """The tolerance is that of the device's own FP32, however the rows were made."""
    linear, run = functional.linear, prepare(tmp_path / "run", build(tmp_path), "")

    def rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        kept = ((t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (x, weight))
        return linear(*kept, bias)

    rows = run.again(tmp_path / "rows").run
    with monkeypatch.context() as patch:
        if tf32:
            patch.setattr(functional, "linear", rounded)
        rows.extract()
    rows.merge()
    if tf32:
        with pytest.raises(VerificationError, match="hook_resid_post differs"):
            rows.verify()
    else:
        rows.verify()
