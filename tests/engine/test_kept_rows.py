"""Rows that a run keeps or pools are those of plain transformers, however the model runs."""

import contextlib
import json
import os
import signal

import h5py
import hdf5plugin  # noqa: F401 - h5py reads zstd with it
import numpy as np
import pytest
import torch
from support import build_tiny, plain_residuals, stages, with_bytes
from theloom.engine.handoff import Handoff
from theloom.engine.layerwise import residual_store
from theloom.engine.selection import PooledStep
from theloom.errors import StoppedError, VerificationError
from theloom.store import writer
from transformers import AutoTokenizer

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
FILTER = f"memory.activation_cache_filter=[{','.join(HOOKS)}]"
TEXTS = [
    "the cat sat",
    "a",
    "on the mat there sat " * 4,
    "x" * 21,
    "cat and more",
    "no",
    "cats " * 9,
]
WINDOW = 40  # tokens of a window: two texts are longer
MODES = {
    "resident": "",
    "chunks": "memory.streaming_chunk_size=8 extraction.batch_tokens=24",
    "layerwise": "extraction.execution=layerwise",
    "layerwise chunks": "extraction.execution=layerwise memory.streaming_chunk_size=8",
    "merged copy": "store.merge=physical store.compression=zstd",
}
KEPT = dict(
    zip(MODES, ["last", "[2:-1]", 'match("c.t")&~last', "first|last", "~[:4]"], strict=True)
)
POOLED = dict(zip(MODES, ["mean", "max", "sum", "mean", "last"], strict=True))
POOLS = {
    "mean": lambda states: states.mean(axis=0),
    "sum": lambda states: states.sum(axis=0),
    "max": lambda states: states.max(axis=0),
    "last": lambda states: states[-1],
}
SHARDS = "extraction.shards=2"


def by_hand(text, keep):
    """The tokens that an expression keeps of a text of bytes, found without the parser."""
    n = len(text)
    return {
        "last": [n - 1],
        "first|last": sorted({0, n - 1}),
        "[2:-1]": [*range(2, max(2, n - 1))],
        "~[:4]": [*range(4, n)],
        'match("c.t")&~last': [
            i
            for i in range(n - 1)
            for s in range(max(0, i - 2), i + 1)
            if text[s : s + 1] == "c" and text[s + 2 : s + 3] == "t"
        ],
    }[keep]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_bytes(build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=256))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(TEXTS))
    )
    return f"corpus=text corpus.path={file} corpus.id_column=id corpus.context_length={WINDOW}"


@pytest.fixture(scope="module")
def plain(model):
    """By text and hook point, the states of its tokens: each window by itself."""
    found, tokenizer = [], AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        parts = [plain_residuals(model, ids[a : a + WINDOW]) for a in range(0, len(ids), WINDOW)]
        found.append({h: torch.cat([p[h] for p in parts]).double().numpy() for h in HOOKS})
    return found


def stored(run):
    """The rows by hook point, read by h5py alone."""
    with h5py.File(run.activations) as file:
        return {h: file[f"hooks/{h}/activations"][:].astype("f8") for h in HOOKS}


def close(found, expected, share):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


@pytest.mark.parametrize("mode", MODES)
def test_kept_rows_are_those_of_plain_transformers(model, corpus, plain, tmp_path, mode):
    keep = KEPT[mode]
    run = stages(tmp_path, model, f"{FILTER} {corpus} rows.keep='{keep}' {SHARDS} {MODES[mode]}")
    run.all()
    rows = stored(run)
    for hook in HOOKS:
        expected = [p[hook][by_hand(t, keep)] for t, p in zip(TEXTS, plain, strict=True)]
        close(rows[hook], np.concatenate(expected), 1e-5)
    run.verify()


@pytest.mark.parametrize("mode", MODES)
def test_pooled_rows_are_those_of_float64_sums(model, corpus, plain, tmp_path, mode):
    pool = POOLED[mode]
    pooled = f"rows.keep='~[:1]' rows.pool={pool}"
    run = stages(tmp_path, model, f"{FILTER} {corpus} {pooled} {SHARDS} {MODES[mode]}").all()
    rows = stored(run)
    for hook in HOOKS:
        expected = [POOLS[pool](p[hook][1:]) for p in plain if len(p[hook]) > 1]
        close(rows[hook], np.stack(expected), 1e-6)
    run.verify()


@pytest.mark.parametrize("execution", ["resident", "layerwise"])
def test_documents_of_several_windows_are_pooled_across_jobs_that_were_stopped(
    model, corpus, plain, tmp_path, monkeypatch, execution
):
    """Each job is stopped after a few batches, with the windows of a document on both sides."""
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    monkeypatch.setattr(residual_store, "BLOCKS_BETWEEN_CHECKPOINTS", 1)
    short = "extraction.batch_tokens=8 memory.streaming_chunk_size=64 extraction.shards=1"
    pooled = f"rows.pool=mean {short} extraction.execution={execution}"
    run = stages(tmp_path, model, f"{FILTER} {corpus} {pooled}")
    run.prepare()
    done, jobs = Handoff.batch_done, 0

    def stopped_after_some(self, *args):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        done(self, *args)

    monkeypatch.setattr(Handoff, "batch_done", stopped_after_some)
    while not run.shards:
        jobs += 1
        with contextlib.suppress(StoppedError):
            run.extract()
    assert jobs > 2
    run.merge()
    rows = stored(run)
    for hook in HOOKS:
        close(rows[hook], np.stack([p[hook].mean(axis=0) for p in plain]), 1e-6)


def test_a_changed_pooled_row_does_not_pass_verification(model, corpus, tmp_path):
    requested = "rows.keep='~[:1]' rows.pool=mean store.merge=physical extraction.shards=1"
    run = stages(tmp_path, model, f"{FILTER} {corpus} {requested} verify.documents=99")
    run.prepare()
    take = PooledStep.take
    with pytest.MonkeyPatch.context() as patched:  # a step that counts its first token twice
        patched.setattr(PooledStep, "take", lambda step, v: take(step, v) + v[0, 0] / 8)
        run.extract()
    run.merge()
    with pytest.raises(VerificationError, match="differs from the model"):
        run.verify()
