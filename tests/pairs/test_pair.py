"""Pairs: rows of several models beside each other, and the proof that they are the same tokens."""

import shutil

import numpy as np
import pytest
import theloom
import torch
from support import build_tiny, stages
from theloom.errors import ConfigError, HookError, StoreError
from theloom.pairs.similarity import similarity
from theloom.report import layers
from torch.utils.data import DataLoader
from transformers import AutoModel

HOOK = "blocks.1.hook_resid_post"
TEXT = "corpus.max_tokens=700"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def base(folder, tiny_llama):
    return stages(folder / "base", tiny_llama, f"{TEXT} extraction.shards=3").all()


@pytest.fixture(scope="module")
def tuned(folder, tiny_llama):
    """A fine-tune: another model of the same shape, in shards of another number."""
    model = folder / "tuned-model"
    shutil.copytree(tiny_llama, model)
    changed = AutoModel.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    changed.save_pretrained(model)
    overrides = f"{TEXT} extraction.shards=2 store.merge=physical"
    return stages(folder / "tuned", model, overrides).all()


@pytest.fixture(scope="module")
def narrow(folder, tiny_llama):
    model = build_tiny("llama", folder / "narrow-model", vocab_size=49152, hidden_size=32)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, model)
    return stages(folder / "narrow", model, TEXT).all()


@pytest.fixture(scope="module")
def pair(base, tuned):
    return theloom.open_pair(base.activations, tuned.activations)


def test_row_by_row_the_models_own(pair, base, tuned):
    own = [theloom.open(run.activations)[HOOK][:] for run in (base, tuned)]
    assert pair.names == ["base", "tuned"]
    assert len(pair) == 700
    assert not torch.equal(*own)
    assert torch.equal(pair[HOOK][:], torch.stack(own, 1))
    assert torch.equal(pair[HOOK][[5, 3]], torch.stack(own, 1)[[5, 3]])
    assert torch.equal(pair[HOOK][7], torch.stack(own, 1)[7])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_shuffle_the_models_together(pair, workers):
    batches = pair.dataset([HOOK, "row", "input_ids"], 64, shuffle=True, block_rows=8, seed=3)
    seen = []
    for batch in DataLoader(batches, batch_size=None, num_workers=workers):
        rows = batch["row"]
        assert torch.equal(batch[HOOK], pair[HOOK][rows])
        assert np.array_equal(batch["input_ids"], pair.first.input_ids.numpy(rows))
        seen += rows.tolist()
    assert sorted(seen) == list(range(700))
    assert seen != sorted(seen)


def test_passes_without_end_are_scaled_and_in_another_order_each(pair):
    batches = pair.batches([HOOK, "row"], 350, shuffle=True, epochs=None, dtype="bf16", scale=2.0)
    passes = [next(batches) for _ in range(4)]
    for batch in passes:
        assert torch.equal(batch[HOOK], (2 * pair[HOOK][batch["row"]].float()).bfloat16())
    orders = [torch.cat([passes[n]["row"], passes[n + 1]["row"]]) for n in (0, 2)]
    assert orders[0].sort().values.tolist() == list(range(700))
    assert not torch.equal(*orders)


def test_models_of_other_widths_come_by_name(base, narrow):
    pair = theloom.open_pair(base.activations, narrow.activations)
    with pytest.raises(HookError, match=r"do not fit in one tensor; take them by name"):
        pair.batches(HOOK, 64)
    hooks = {"base": HOOK, "narrow": "blocks.2.hook_resid_post", "row": "row"}
    for batch in pair.batches(hooks, 64, shuffle=True):
        for name in pair.names:
            assert torch.equal(batch[name], pair.models[name][hooks[name]][batch["row"]])
    with pytest.raises(HookError, match="no model 'other' in the pair; it has base, narrow"):
        pair.batches({"other": HOOK}, 64)


def test_three_files_and_a_selection_of_rows(pair, base, tuned):
    three = theloom.open_pair(*[base.activations] * 2, tuned.activations)
    assert three.names == ["0", "1", "2"]
    assert three[HOOK].shape == (700, 3, 64)
    last = pair.select("last")
    selected = [theloom.open(r.activations).select("last") for r in (base, tuned)]
    assert torch.equal(last[HOOK][:], torch.stack([acts[HOOK][:] for acts in selected], 1))
    assert torch.equal(last.select("last")[HOOK][:], last[HOOK][:])
    again = theloom.open_pair(*selected, names=["a", "b"])
    assert torch.equal(again[HOOK][:], last[HOOK][:])


def test_similarity_is_that_of_torch(pair):
    rows = np.arange(0, 700, 7)
    found = similarity(pair, HOOK, rows, "base", "tuned")
    a, b = pair[HOOK][rows].double().unbind(1)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b).mean()))
    assert found.norm_ratio == pytest.approx(float((b.norm(dim=1) / a.norm(dim=1)).mean()))
    assert found.rows == 100
    assert similarity(pair, HOOK, rows, "base", "base").cosine == pytest.approx(1)


def test_the_report_compares_runs_of_the_same_tokens(base, tuned, narrow):
    first, *rest = [r.folder for r in (base, tuned, narrow)]
    (found,) = layers.measure([first, *rest])
    assert found.run == "tuned"
    assert len(found.hooks) == 6
    drawn = layers.draw([found], "base", ["tuned"])
    assert len(drawn.table.rows) == 6
    assert 0 < drawn.table.rows[-1][2] < 1
    assert "no other run" in layers.draw([], "base", []).table.rows[0][0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("corpus.max_tokens=699", r"document '.*' has \d+ tokens in the first and \d+ in the sec"),
        ("corpus.max_tokens=300", r"document '.*' has \d+ tokens in the first and \d+ in the sec"),
        (f"{TEXT} corpus.context_length=50", r"a window at token \d+ in the first and not so"),
        (f"{TEXT} rows.keep=last", r"the first and"),
        (f"{TEXT} rows.pool=mean", r"rows.pool is none in the first and mean in the second"),
    ],
)
def test_rows_of_other_tokens_are_refused(base, tiny_llama, tmp_path, overrides, words):
    other = stages(tmp_path, tiny_llama, overrides).all()
    with pytest.raises(StoreError, match=words):
        theloom.open_pair(base.activations, other.activations)


def test_another_token_is_named(tiny_llama, tmp_path):
    def of(name, ids):
        tokens = "\n".join(f'{{"input_ids": {list(document)}}}' for document in ids)
        (tmp_path / f"{name}.jsonl").write_text(tokens)
        corpus = f"corpus=text corpus.path={tmp_path / name}.jsonl corpus.input_ids=input_ids"
        return stages(tmp_path / name, tiny_llama, corpus).all().activations

    a = of("a", [[1, 2, 3], [4]])
    b = of("b", [[1, 2, 9], [4]])
    words = "token 2 of document '.*' is 3 in the first and 9 in the second"
    with pytest.raises(StoreError, match=words) as refused:
        theloom.open_pair(a, b)
    assert "\n" not in str(refused.value)
    assert len(theloom.open_pair(a, a)) == 4


def test_users_mistakes_end_in_one_line(base):
    with pytest.raises(ConfigError, match="1 file; give two or more"):
        theloom.open_pair(base.activations)
    with pytest.raises(ConfigError, match="give each a name of its own"):
        theloom.open_pair(base.activations, base.activations, names=["a", "a"])
