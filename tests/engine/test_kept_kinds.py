"""Kept rows of other kinds of runs equal the same rows of a run that keeps all; disk and memory
fall with them.
"""

import json
import os
import re

import h5py
import numpy as np
import pytest
import torch
from support import build_tiny, stages, with_bytes
from theloom.dataset.activations import open_activations
from theloom.pipeline import console
from theloom.planning.estimates import estimate_file
from tiny_configs import tiny_config
from transformers import AutoModel

DOCUMENTS = int(os.environ.get("THELOOM_DOCUMENTS", "3000"))
KEEP = "last(2) | [3:5]"
REQUESTED = "corpus.max_tokens=400 corpus.context_length=60 extraction.shards=1"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    encoder = tmp_path_factory.mktemp("bert")
    config = tiny_config("bert")
    config.vocab_size = 256
    AutoModel.from_config(config).save_pretrained(encoder)
    decoder = build_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=256)
    return {"bert": with_bytes(encoder), "llama": with_bytes(decoder)}


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("bert", "memory.activation_cache_filter=[blocks.*.hook_resid_post,blocks.0.attn.hook_z]"),
        ("llama", "store.dtype=bf16"),
        ("llama", "memory.quantization=8bit extraction.attention=eager"),
        (
            "llama",
            "memory.activation_cache_filter=[blocks.1.attn.hook_pattern]",
        ),
    ],
)
def test_kept_rows_are_those_of_a_run_that_keeps_all(models, tmp_path, model, more):
    found = {}
    for name, chosen in (("all", ""), ("kept", f"rows.keep='{KEEP}'")):
        run = stages(tmp_path / name, models[model], f"{REQUESTED} {more} {chosen}").all()
        run.verify()
        found[name] = open_activations(run.activations)
    expected, kept = found["all"].select(KEEP), found["kept"]
    assert 0 < len(kept) < len(found["all"]) / 2
    for hook in kept.hooks:
        assert torch.equal(kept[hook][:], expected[hook][:])


@pytest.mark.parametrize(
    ("model", "more", "store", "share"),
    [
        ("bert", "", "fp32", 1e-6),
        ("llama", "memory.quantization=8bit extraction.attention=eager", "fp32", 1e-6),
        ("llama", "memory.streaming_chunk_size=16", "bf16", 2**-8),
    ],
)
def test_pooled_rows_are_means_of_a_run_that_keeps_all(models, tmp_path, model, more, store, share):
    hook = "blocks.1.hook_resid_post"
    requested = f"{REQUESTED} {more} memory.activation_cache_filter=[{hook}]"
    every = stages(tmp_path / "all", models[model], f"{requested} store.dtype=fp32").all()
    pooled = f"rows.keep='~[:1] & ~last' rows.pool=mean store.dtype={store}"
    run = stages(tmp_path / "pooled", models[model], f"{requested} {pooled}").all()
    run.verify()
    assert "rows of 400 tokens of" in console.summary(run.folder)
    with h5py.File(every.activations) as file:
        states = file[f"hooks/{hook}/activations"][:].astype("f8")
        document = file["tokens/document"][:]
    documents = [states[document == n] for n in range(document.max() + 1)]
    expected = np.stack([d[1:-1].mean(axis=0) for d in documents if len(d) > 2])
    found = open_activations(run.activations)[hook][:].double().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


def test_the_disk_of_last_rows_is_known_before_and_no_more_than_they_take(models, tmp_path, caplog):
    """Rows × width × bytes, and the tables: 5% at most lie between, for THELOOM_DOCUMENTS."""
    caplog.set_level("INFO")
    corpus, width, hooks = tmp_path / "texts.jsonl", 64, 2
    texts = [f"{n} is it" for n in range(DOCUMENTS)]
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    points = "memory.activation_cache_filter=[blocks.0.hook_resid_pre,blocks.0.hook_resid_post]"
    batches = "extraction.batch_tokens=2048 corpus.max_tokens=null"
    requested = f"corpus=text corpus.path={corpus} {points} {batches} extraction.shards=1"
    run = stages(
        tmp_path, models["llama"], f"{requested} corpus.max_documents={DOCUMENTS} rows.keep=last"
    ).all()
    (shard,) = run.shards
    tokens = sum(map(len, texts))
    rows = DOCUMENTS * hooks * width * 4
    with h5py.File(shard) as file:
        stored = [file[f"hooks/{hook}/activations"].id.get_storage_size() for hook in file["hooks"]]
        tables = 0

        def add(name, item):
            nonlocal tables
            if isinstance(item, h5py.Dataset) and not name.endswith("/activations"):
                tables += item.id.get_storage_size()

        file.visititems(add)
    assert sum(stored) == rows
    assert shard.stat().st_size == pytest.approx(rows + tables, rel=0.05)
    estimated = estimate_file.read(run.folder / "estimate.h5")
    before = estimated.disk_bytes("fp32") + estimated.token_bytes * (tokens - DOCUMENTS)
    assert before == pytest.approx(shard.stat().st_size, rel=0.05)
    said = re.search(r"disk: ([\d.]+) (MB|kB): .* for the tables of (\d+) tokens", caplog.text)
    size = float(said[1]) * {"MB": 1e6, "kB": 1e3}[said[2]]
    assert size == pytest.approx(shard.stat().st_size, rel=0.05)
    assert int(said[3]) == tokens
