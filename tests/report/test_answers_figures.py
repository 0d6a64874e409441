"""Figures of answers, and what the front page says of them, against `answers.h5` itself."""

import csv
import json
from collections import Counter
from itertools import pairwise

import h5py
import numpy as np
import pytest
from model_folders import byte_tokenizer
from support import ROOT, build_tiny, stages
from theloom.config import frozen
from theloom.report import groups
from theloom.report.draw import draw_answers
from theloom.report.page import write_page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    byte_tokenizer(build_tiny("llama", folder / "model", vocab_size=320))
    rows = [{"text": text} for text in ("why", "a", "one day", "x = 1", "to be", "no")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = (
        f"corpus=text corpus.path={folder}/rows.jsonl answers.source=model answers.samples=3 "
        "answers.temperature=1 answers.max_new_tokens=20 answers.stop=[e,t] extraction.shards=2 "
        "memory.activation_cache_filter=[blocks.2.hook_resid_post] rows.keep=generated"
    )
    made = stages(folder / "run", folder / "model", asked).all()
    made.verify()
    return made


@pytest.fixture(scope="module")
def sampled(run):
    return sorted(run.folder.glob("answers/*.h5"))


@pytest.fixture(scope="module")
def figures(run, sampled):
    folder = run.folder / "figures"
    draw_answers(settings(run), run.documents, sampled, folder)
    return folder


def settings(run):
    return frozen.load_frozen(run.folder / "report.json")


def table(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_answer_has_a_row_with_its_length_and_end(run, figures):
    found = table(figures / "answers.csv")
    with h5py.File(run.documents) as file:
        offset, known = file["answers/offset"][:], file["answers/log_probability"][:]
        assert [row["document"].encode() for row in found] == file["documents/id"][:].tolist()
        ends = [row["stop_reason"].encode() for row in found]
        assert ends == file["answers/stop_reason"][:].tolist()
    assert [int(row["answer_tokens"]) for row in found] == np.diff(offset).tolist()
    means = [known[a:b].mean() for a, b in pairwise(offset)]
    shown = [float(row["mean_log_probability"]) for row in found]
    np.testing.assert_allclose(shown, means, rtol=1e-4)
    drawing = (figures / "answers.svg").read_text()
    for reason, count in Counter(row["stop_reason"] for row in found).items():
        assert f"{reason}: {count} (" in drawing


def test_speed_is_tokens_by_seconds_of_sampling_for_each_shard(sampled, figures):
    for number, row in enumerate(table(figures / "sampling.csv")):
        with h5py.File(sampled[number]) as file:
            assert int(row["tokens_sampled"]) == len(file["input_id"])
            seconds = file.attrs["seconds_sampling"]
            assert 0 < seconds < file.attrs["seconds"]
        expected = int(row["tokens_sampled"]) / seconds
        assert float(row["tokens_per_second"]) == pytest.approx(expected, rel=1e-4)
        assert row["side_by_side"] == "padded"


def test_the_page_says_how_many_answers_and_how_fast(run, figures):
    write_page(settings(run), run.folder, ROOT / "workflow/report")
    page = (run.folder / "report.html").read_text()
    with h5py.File(run.documents) as file:
        lengths = np.diff(file["answers/offset"][:])
        about = dict(file["answers"].attrs)
    words = f"18 to 6 prompts, of {lengths.min()} to {lengths.max()} tokens "
    assert words + f"({np.median(lengths):,.0f} in the median); end: " in page
    rate = about["tokens_sampled"] / about["seconds_sampling"]
    assert f"{about['tokens_sampled']:,} tokens, {rate:,.1f} a second; temperature 1" in page
    assert page.index('id="answers"') < page.index('id="sampling"')


def test_answers_of_another_engine_have_no_speed(run, tmp_path):
    draw_answers(settings(run), run.documents, [], tmp_path / "run/figures")
    assert "not sampled here" in (tmp_path / "run/figures/sampling.svg").read_text()


def test_only_runs_with_answers_have_their_figures():
    assert "answers" in groups.groups([], answered=True)
    assert "answers" not in groups.groups([])
