"""Values that are NaN or infinite: where they stop a run, where they are kept, and what is said."""

import dataclasses
import logging
import math

import h5py
import numpy as np
import pytest
import shards
import theloom
import torch
from safetensors.torch import load_file, save_file
from support import build_tiny, stages, with_bytes
from theloom.errors import StoreError
from theloom.hooks.points import HookPoint
from theloom.store.writer import ShardWriter

TEXT = "corpus=text corpus.path={path} extraction.shards=1"


@pytest.fixture
def model(tmp_path):
    return with_bytes(build_tiny("llama", tmp_path / "model", vocab_size=320))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for name, text in (("a", "plain words"), ("b", "good until Z comes"), ("c", "Z")):
        (path / f"{name}.txt").write_text(text)
    return TEXT.format(path=path)


def poison(model, value):
    """Gives the embedding of the letter Z a value."""
    weights = load_file(model / "model.safetensors")
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(model)("Z").input_ids
    weights["model.embed_tokens.weight"][token, 7] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_value_that_is_not_finite_ends_the_job(tmp_path, model, corpus, value):
    poison(model, value)
    run = stages(tmp_path / "run", model, corpus)
    run.prepare()
    place = f"{value} at token 11 of b.txt"
    with pytest.raises(StoreError, match=rf"blocks\.0\.hook_resid_pre is not finite: {place}"):
        run.extract()
    assert not run.shards


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kept_they_are_stored_counted_named_and_verified(tmp_path, model, corpus, value, caplog):
    caplog.set_level(logging.WARNING)
    poison(model, value)
    run = stages(tmp_path / "run", model, f"{corpus} store.allow_nonfinite=true").all()
    assert f"first: {value} at token 11 of b.txt" in caplog.text
    acts = theloom.open(run.activations)
    rows = acts.document("b.txt")["blocks.0.hook_resid_pre"]
    assert rows[:11].isfinite().all()
    assert not rows[11].isfinite().all()
    run.verify()
    with h5py.File(run.folder / "verification.h5") as file:
        assert file["nonfinite"][:].min() > 0
        assert np.isfinite(file["recomputed/max_abs_error"][:]).all()


def test_a_partial_shard_goes_on_once_they_are_allowed(tmp_path, model, corpus):
    poison(model, math.nan)
    run = stages(tmp_path / "run", model, corpus)
    run.prepare()
    with pytest.raises(StoreError):
        run.extract()
    with pytest.raises(StoreError, match=r"is not finite: nan at token 11 of b\.txt"):
        run.extract()  # what is on disk is found again
    stages(tmp_path / "run", model, f"{corpus} store.allow_nonfinite=true").extract()
    assert len(run.shards) == 1


def test_weights_that_are_nan_are_said_to_be(tmp_path, model, corpus, caplog):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run = stages(tmp_path / "run", model, corpus)
    run.prepare()
    assert "blocks.1.hook_resid_post is not finite for random tokens" in caplog.text
    with pytest.raises(
        StoreError, match=r"blocks\.1\.hook_resid_post is not finite: nan at token 0"
    ):
        run.extract()


def test_infinities_that_fp16_makes_and_the_run_allows_are_verified(tmp_path, model, corpus):
    poison(model, 1e5)
    settings = f"{corpus} store.dtype=fp16 store.max_overflow=0.5"
    run = stages(tmp_path / "run", model, settings).all()
    acts = theloom.open(run.activations)
    assert acts.document("c.txt")["blocks.0.hook_resid_pre"].isinf().sum() == 1
    run.verify()


def test_a_stored_number_where_the_model_gives_none_is_an_error():
    from theloom.verification.comparison import _max_abs_error

    truth = torch.tensor([1.0, math.nan, -math.inf, math.inf])
    assert _max_abs_error(truth.clone(), truth) == (0.0, 1.0)
    for place, value in ((0, math.nan), (1, 0.0), (2, 5.0), (3, -math.inf)):
        stored = truth.clone()
        stored[place] = value
        assert _max_abs_error(stored, truth)[0] == math.inf


def test_masked_scores_are_no_loss(tmp_path):
    scores = HookPoint("blocks.0.attn.hook_attn_scores", 0, "attn.hook_attn_scores", (2,))
    described = dataclasses.replace(shards.spec("fp32"), points=[scores])
    with ShardWriter(tmp_path / "s.h5", described) as writer:
        for count, window in enumerate((2, 0, 1)):
            first, end = described.tokens.window_offset[window : window + 2]
            rows = torch.zeros(int(end - first), 2, described.keys)
            rows[..., 1:] = -math.inf
            writer.write(window, scores.name, 0, rows)
            writer.batch_done(count + 1, last=count == 2)
        writer.finish()
