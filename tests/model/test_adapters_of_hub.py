"""Adapters of a hub, by their revision: rows are those of the model that PEFT merges."""

import json

import pytest
import theloom
import torch
from adapter_support import merge_with_peft, save_adapter
from hub_support import RUN_STAGES, hub, run_on
from peft import LoraConfig
from support import build_tiny, plain_residuals, with_bytes


@pytest.mark.parametrize("tag", ["", "@v1"], ids=["main", "tag"])
def test_an_adapter_of_the_hub_is_merged_at_its_revision(tmp_path, tag):
    base = with_bytes(build_tiny("llama", tmp_path / "base", vocab_size=260))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    first, second = (save_adapter(base, tmp_path / f"{n}", config, n) for n in (1, 2))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    words = (
        f"corpus=text corpus.path={tmp_path / 'text.txt'} extraction.shards=1 "
        f"model.adapter=user/name{tag}"
    )
    with hub() as server:
        server.add(first)
        commits = {"@v1": server.tag("v1"), "": server.revisions["main"]}
        server.add(second)
        done = run_on(server, tmp_path, "-c", RUN_STAGES, str(tmp_path / "run"), str(base), words)
    assert done.returncode == 0, done.stderr
    assert server.unknown == []
    acts = theloom.open(tmp_path / "run/activations.h5")
    listed = acts.attributes["model_adapters"]
    (adapter,) = json.loads(listed) if isinstance(listed, str) else listed
    assert (adapter["source"], adapter["revision"]) == ("user/name", commits[tag])
    merge_with_peft(base, [first if tag else second]).save_pretrained(tmp_path / "merged")
    expected = plain_residuals(tmp_path / "merged", acts.document(0).input_ids.tolist())
    for hook in acts.hooks:
        assert torch.equal(acts.document(0)[hook], expected[hook])


def test_a_revision_that_the_hub_has_not_is_refused_in_one_line(tmp_path):
    base = with_bytes(build_tiny("llama", tmp_path / "base", vocab_size=260))
    words = "corpus.max_tokens=50 model.adapter=user/name@no"
    with hub() as server:
        done = run_on(server, tmp_path, "-c", RUN_STAGES, str(tmp_path / "run"), str(base), words)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("theloom.errors.ModelError: model.adapter: user/name: ")
    assert "revision" in last.lower()
