"""The front page of a run: what it says against the files that it is about."""

import json
import re
import shutil

import h5py
import pytest
import theloom
from support import ROOT, stages
from theloom import terminal
from theloom.config import frozen
from theloom.report.draw import draw_memory, draw_speed, draw_states
from theloom.report.page import write_page

CAPTIONS = ROOT / "workflow/report"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    made = stages(tmp_path_factory.mktemp("run"), tiny_llama, "corpus.max_tokens=1000").all()
    made.verify()
    settings, figures = frozen.load_frozen(made.folder / "report.json"), made.folder / "figures"
    draw_memory(settings, made.folder / "estimate.h5", made.folder / "model.h5", figures)
    draw_speed(settings, made.shards, figures)
    draw_states(settings, made.activations, figures)
    return made


def written(folder, title=None):
    settings = frozen.load_frozen(folder / "report.json")
    if title is not None:
        file = folder / "report.json"
        file.write_text(file.read_text().replace('"title": null', f'"title": {json.dumps(title)}'))
        settings = frozen.load_frozen(file)
    write_page(settings, folder, CAPTIONS)
    return (folder / "report.html").read_text()


def facts(page):
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td( class="failed")?>([^<]*)</td>', page)
    return {name: (value, bool(failed)) for name, failed, value in rows}


def test_the_page_says_what_ran(run):
    page, acts = written(run.folder), theloom.open(run.activations)
    found = facts(page)
    assert found["rows"][0] == f"{len(acts):,} of {len(acts.hooks)} hook points"
    assert found["hook points"][0] == ", ".join(acts.hooks)
    assert found["corpus"][0] == f"{acts.attributes['corpus']}, {len(acts.documents)} documents"
    size = sum(f.stat().st_size for f in [run.activations, *run.shards])
    assert found["on disk"][0] == terminal.format_bytes(size)
    with h5py.File(run.folder / "verification.h5") as file:
        error = (file["recomputed/max_abs_error"][:] / file["recomputed/max_abs"][:]).max()
        documents = len(file["recomputed/window"])
    windows = len(acts.window_document)
    assert found["verification"] == (
        f"{windows} of {windows} windows have their hashes; {documents} documents recomputed, "
        f"largest error {error:.1e} of the largest value",
        False,
    )


def test_the_page_holds_every_drawing_and_needs_no_other_file(run):
    page = written(run.folder)
    drawn = {f.stem for f in (run.folder / "figures").glob("*.svg")}
    assert {"norms", "massive", "similarity", "map", "memory", "gpus", "time"} <= drawn
    assert set(re.findall(r'<figure id="(\w+)"', page)) == drawn
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == len(drawn)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for link in re.findall(r'href="([^"]*)"', page):
        assert (run.folder / link).exists(), link


def test_damage_that_verification_found_is_shown_as_a_failure(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    with h5py.File(folder / "verification.h5", "a") as file:
        file.attrs["windows_wrong"] = "[0]"
    value, failed = facts(written(folder))["verification"]
    windows = len(theloom.open(run.activations).window_document)
    assert value.startswith(f"{windows - 1} of {windows} windows have their hashes")
    assert failed


def test_a_title_is_text_and_not_markup(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    page = written(folder, title="<script>alert(1)</script> & co")
    assert "<script" not in page
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt; &amp; co</h1>" in page
