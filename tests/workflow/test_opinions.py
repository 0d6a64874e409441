"""The example that ships with the project: a probe of SmolLM2 finds good and bad opinions apart."""

import csv
import json
from collections import Counter

import pytest
from browser import CHROMIUM, Page
from support import ROOT, copy_project

HOOKS = "memory.activation_cache_filter=[hook_embed,blocks.15.hook_resid_post]"
BATCH = "extraction.batch_tokens=512"  # load_model runs the largest one beside the documents
OPINIONS = ROOT / "config/corpus/opinions.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("project"))
    done = project.snakemake(profiles="opinions", overrides=f"name=opinions {HOOKS} {BATCH}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open results/opinions/report.html" in done.stderr
    return project.folder / "results/opinions"


def test_the_opinions_are_as_many_good_as_bad_and_end_alike():
    opinions = [json.loads(line) for line in OPINIONS.read_text("utf-8").splitlines()]
    assert len(opinions) >= 400
    assert len({o["text"] for o in opinions}) == len({o["id"] for o in opinions}) == len(opinions)
    assert {o["text"][-1] for o in opinions} == {"."}  # which tells no probe anything
    by_topic = Counter((o["topic"], o["label"]) for o in opinions)
    assert set(by_topic.values()) == {10}


def test_a_probe_finds_the_label_in_a_middle_layer_and_not_before(folder):
    with (folder / "figures/probe.csv").open() as file:
        embed, middle = csv.DictReader(file)
    assert int(middle["documents"]) == len(OPINIONS.read_text("utf-8").splitlines())
    assert float(middle["accuracy"]) > float(middle["shuffled_labels"]) + 0.2
    assert float(middle["low_95_percent"]) > float(middle["majority_share"]) + 0.1
    assert float(embed["accuracy"]) < 0.55


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_probe_first(folder, tmp_path, width):
    with Page((folder / "report.html").as_uri(), tmp_path / "profile", width) as shown:
        first, high, wide = shown.script(
            "(f => [f.id, f.querySelector('img').naturalHeight, f.querySelector('img').width])"
            "(document.querySelector('figure'))"
        )
        assert first == "probe"
        assert high > 100
        assert wide > 0.7 * min(width, 900)
        assert shown.script("document.documentElement.scrollWidth") <= width
        assert shown.errors == []
