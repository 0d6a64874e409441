"""Adapters of a hub, by their revision: rows are those of the model that PEFT merges."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest
import theloom
import torch
from adapter_support import merge_with_peft, save_adapter
from hub_support import RUN_STAGES, hub, run_on
from peft import LoraConfig
from support import build_tiny, plain_residuals, with_bytes


class Runs(NamedTuple):
    """A run of each revision, one after another in one process; the last one's is not there."""

    folder: Path
    base: Path
    adapters: dict[str, Path]
    commits: dict[str, str]
    done: "CompletedProcess[str]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters-of-hub")
    base = with_bytes(build_tiny("llama", folder / "base", vocab_size=260))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    first, second = (save_adapter(base, folder / f"{n}", config, n) for n in (1, 2))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    words = f"corpus=text corpus.path={folder / 'text.txt'} extraction.shards=1"
    arguments = []
    for name, revision in {"main": "", "tag": "@v1", "none": "@no"}.items():
        arguments += [str(folder / name), str(base), f"{words} model.adapter=user/name{revision}"]
    with hub() as server:
        server.add(first)
        commits = {"tag": server.tag("v1"), "main": server.revisions["main"]}
        server.add(second)
        done = run_on(server, folder, "-c", RUN_STAGES, *arguments)
    assert server.unknown == []
    return Runs(folder, base, {"main": second, "tag": first}, commits, done)


@pytest.mark.parametrize("revision", ["main", "tag"])
def test_an_adapter_of_the_hub_is_merged_at_its_revision(runs, tmp_path, revision):
    run = runs.folder / revision
    assert (run / "verification.h5").exists(), runs.done.stderr
    acts = theloom.open(run / "activations.h5")
    listed = acts.attributes["model_adapters"]
    (adapter,) = json.loads(listed) if isinstance(listed, str) else listed
    assert (adapter["source"], adapter["revision"]) == ("user/name", runs.commits[revision])
    merge_with_peft(runs.base, [runs.adapters[revision]]).save_pretrained(tmp_path / "merged")
    expected = plain_residuals(tmp_path / "merged", acts.document(0).input_ids.tolist())
    for hook in acts.hooks:
        assert torch.equal(acts.document(0)[hook], expected[hook])


def test_a_revision_that_the_hub_has_not_is_refused_in_one_line(runs):
    assert runs.done.returncode == 1
    last = runs.done.stderr.splitlines()[-1]
    assert last.startswith("theloom.errors.ModelError: model.adapter: user/name: ")
    assert "revision" in last.lower()
