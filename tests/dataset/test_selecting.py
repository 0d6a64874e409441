"""Rows by expression, as a table, with labels, and as arrays."""

import json
import pickle

import numpy as np
import pytest
import torch
from support import build_tiny, stages, with_bytes
from theloom.dataset.activations import open_activations
from theloom.errors import ConfigError

HOOK = "blocks.1.hook_resid_post"
TEXTS = [("a", "the cat sat", 1), ("b", "on", 0), ("c", "a mat, a cat", 1), ("d", "no dogs", 0)]
LENGTHS = [len(text) for _, text, _ in TEXTS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A file of all rows, one of some tokens' and one of pooled rows, opened."""
    model = with_bytes(build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=256))
    corpus = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rows = [json.dumps({"id": i, "text": text, "label": y, "at": "0:2"}) for i, text, y in TEXTS]
    corpus.write_text("\n".join(rows))
    found = {}
    for name, chosen in {
        "all": "",
        "kept": "rows.keep='[1:-1]|first'",
        "mean": "rows.pool=mean",
    }.items():
        base = f"corpus=text corpus.path={corpus} corpus.id_column=id corpus.columns=[label,at]"
        base += f" extraction.shards=2 memory.activation_cache_filter=[{HOOK}]"
        folder = tmp_path_factory.mktemp(name)
        run = stages(folder, model, f"{base} {chosen}").all()
        found[name] = open_activations(run.activations)
    return found


def test_selected_rows_are_those_of_the_tokens_that_are_kept(runs):
    every = runs["all"][HOOK][:]
    ends = np.cumsum(LENGTHS)
    last = runs["all"].select("last")
    assert torch.equal(last[HOOK][:], every[ends - 1])
    rest = runs["all"].select("~last & ~[:1]").select('span("at")')
    assert torch.equal(rest[HOOK][:], every[[1, 12 + 2, 26 + 0]])
    assert torch.equal(next(rest.batches(HOOK, batch_size=8)), rest[HOOK][:])
    assert next(rest.batches("row", batch_size=8)).tolist() == [1, 14, 26]
    assert pickle.loads(pickle.dumps(last)).document("c")[HOOK].shape == (1, 64)


def test_a_file_of_some_rows_gives_the_same_as_the_file_of_all(runs):
    every, kept = runs["all"].select("[1:-1]|first"), runs["kept"]
    assert torch.equal(kept[HOOK][:], every[HOOK][:])
    for name in ("document", "token", "position", "input_id", "label"):
        assert np.array_equal(kept.rows[name], every.rows[name])
    assert torch.equal(kept.select("first")[HOOK][:], runs["all"].select("first")[HOOK][:])
    assert kept.to_dataframe()["tokens"].tolist() == LENGTHS
    assert len(kept.to_dataframe("tokens")) == len(kept)


def test_labels_and_means_go_with_their_rows(runs):
    for acts in (runs["all"].select("last"), runs["mean"]):
        x, y = acts.xy(HOOK, "label")
        assert y.tolist() == [1, 0, 1, 0]
        assert x.dtype == np.float32
        assert np.array_equal(x, acts[HOOK][:].numpy())
        means = acts.mean(HOOK, by="label")
        np.testing.assert_allclose(means[1], x[[0, 2]].astype("f8").mean(0), rtol=1e-6)
        np.testing.assert_allclose(acts.mean(HOOK), x.astype("f8").mean(0), rtol=1e-6, atol=1e-8)


def test_rows_of_a_hook_point_behave_like_an_array(runs):
    rows = runs["all"][HOOK]
    every = rows[:]
    assert repr(rows) == f"<rows of {HOOK}: shape (32, 64), torch.float32>"
    for index in ((slice(0, 10), 5), (3, 5), (..., 0), ([4, 2], slice(3)), (-1, ...)):
        assert torch.equal(rows[index], every[index]), index
    assert torch.equal(rows[[4, 2], [1, 0]], every[[4, 2], [1, 0]])
    assert torch.equal(torch.as_tensor(rows), every)
    assert np.array_equal(np.asarray(rows, "f8"), every.double().numpy())
    assert len([*rows]) == 32


@pytest.mark.parametrize(
    ("which", "call", "message"),
    [
        ("all", lambda a: a.select("asistant"), "unknown word"),
        ("all", lambda a: a.select("assistant"), "plain texts"),
        ("all", lambda a: a.select('match("x")'), "set rows.keep"),
        ("all", lambda a: a.select("span(span)"), "no column 'span'; corpus.columns has label, at"),
        ("mean", lambda a: a.select("last"), "pooled over tokens"),
        ("all", lambda a: a.xy(HOOK, "labels"), "no column 'labels'.*document.*label, at"),
        ("kept", lambda a: a.cache(0), "rows of some tokens"),
        ("all", lambda a: a.select("last").statistics, "acts.mean"),
    ],
)
def test_what_a_file_does_not_have_is_refused(runs, which, call, message):
    with pytest.raises(ConfigError, match=message):
        call(runs[which])
