"""Kept rows of other kinds of runs equal the same rows of a run that keeps all; disk and memory
fall with them.
"""

import json

import h5py
import pytest
import torch
from support import build_tiny, stages, with_bytes
from theloom.dataset.activations import open_activations
from tiny_configs import tiny_config
from transformers import AutoModel

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


def test_ten_thousand_last_rows_take_no_more_disk_than_they_have_bytes(models, tmp_path, caplog):
    caplog.set_level("INFO")
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"{n} is it"}) for n in range(10_000)))
    hooks = "memory.activation_cache_filter=[blocks.0.hook_resid_pre,blocks.0.hook_resid_post]"
    batches = "extraction.batch_tokens=2048 corpus.max_tokens=null corpus.max_documents=10000"
    requested = f"corpus=text corpus.path={corpus} {hooks} {batches} extraction.shards=1"
    run = stages(tmp_path, models["llama"], f"{requested} rows.keep=last").all()
    (shard,) = run.shards
    expected = 10_000 * 2 * 64 * 4
    with h5py.File(shard) as file:
        rows = [file[f"hooks/{hook}/activations"].id.get_storage_size() for hook in file["hooks"]]
        tables = 0

        def add(name, item):
            nonlocal tables
            tables += item.id.get_storage_size() if isinstance(item, h5py.Dataset) else 0

        file.visititems(add)
    assert sum(rows) == expected
    assert shard.stat().st_size - (tables - expected) == pytest.approx(expected, rel=0.05)
    assert "disk: 5.2 MB in fp32 for 10000 rows of" in caplog.text
