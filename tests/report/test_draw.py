"""Figures: their numbers against definitions written out anew, their files, and what reruns for
them.
"""

import csv
import json
import shutil
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
import theloom
import torch
from support import stages
from theloom.config import frozen
from theloom.errors import ConfigError
from theloom.report import groups, runs, speed, style
from theloom.report.draw import draw_attention, draw_memory, draw_runs, draw_speed, draw_states
from theloom.report.states import measure_states, sampled_rows
from theloom.report.token_map import principal_plane, token_kind
from theloom.store.file_format import METRICS

HOOKS = "memory.activation_cache_filter=[blocks.*.hook_resid_post,blocks.1.attn.hook_pattern]"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    return stages(
        tmp_path_factory.mktemp("run"), tiny_llama, f"{HOOKS} corpus.max_tokens=1500 name=a"
    ).all()


@pytest.fixture(scope="module")
def figures(run):
    folder, settings = run.folder / "figures", frozen.load_frozen(run.folder / "report.json")
    benchmarks = run.folder / "benchmarks/extract_shard"
    benchmarks.mkdir(parents=True)
    for number, shard in enumerate(run.shards):  # as Snakemake leaves them
        (benchmarks / f"{shard.stem}.tsv").write_text(
            f"s\th:m:s\tmax_rss\n{10.0 + number}\t0:00:10\t512.0\n"
        )
    draw_memory(settings, run.folder / "estimate.h5", run.folder / "model.h5", folder)
    draw_speed(settings, run.shards, folder)
    draw_states(settings, run.activations, folder)
    draw_attention(settings, run.activations, folder)
    return folder


def table(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_figure_has_a_drawing_with_words_a_table_and_a_caption(figures):
    names = [
        name
        for group in ("memory", "speed", "states", "attention")
        for name in groups.GROUPS[group]
    ]
    for name in names:
        drawing = ElementTree.parse(figures / f"{name}.svg").getroot()
        assert len(list(drawing.iter("{http://www.w3.org/2000/svg}text"))) > 5, name
        rows = table(figures / f"{name}.csv")
        assert rows, name
        page = (figures / f"{name}.html").read_text()
        assert page.count("<tr>") == 1 + min(len(rows), style.ROWS_SHOWN)
        assert "<script" not in page
        assert "http" not in page.replace("http-equiv", "")


def test_the_same_data_give_the_same_drawing(run, figures, tmp_path):
    draw_states(
        frozen.load_frozen(run.folder / "report.json"), run.activations, tmp_path / "a/figures"
    )
    again = (tmp_path / "a/figures/similarity.svg").read_text()
    first = (figures / "similarity.svg").read_text()
    title = run.folder.name
    assert again.replace("a: cosine", "") == first.replace(f"{title}: cosine", "")


def test_statistics_of_states_are_those_of_their_definitions(run):
    acts = theloom.open(run.activations)
    states = measure_states(acts, count=10**6, seed=0)
    assert states.hooks == [f"blocks.{n}.hook_resid_post" for n in range(3)]
    assert states.rows.tolist() == list(range(len(acts)))
    every = torch.stack([acts[h][:] for h in states.hooks])
    np.testing.assert_allclose(states.norm, every.norm(dim=-1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(states.largest, every.abs().amax(dim=-1).numpy())
    expected = torch.nn.functional.cosine_similarity(every[0], every[2], dim=-1).mean()
    assert states.cosine[0, 2] == pytest.approx(float(expected), abs=1e-5)
    np.testing.assert_allclose(np.diag(states.cosine), 1, atol=1e-5)


def test_a_sample_has_entire_windows_but_the_last_and_the_size_requested(run):
    acts = theloom.open(run.activations)
    rows = sampled_rows(acts, 400, seed=1)
    assert len(rows) == len(set(rows.tolist())) == 400
    window = np.searchsorted(acts.window_offset, rows, "right") - 1
    whole = [
        w for w in set(window.tolist()) if (window == w).sum() == np.diff(acts.window_offset)[w]
    ]
    assert len(whole) >= len(set(window.tolist())) - 1


def test_the_map_keeps_the_distances_of_rows_that_lie_in_a_plane():
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(64, 2)).Q.T
    angles = torch.rand(50) * 6.28
    rows = torch.stack([angles.cos(), angles.sin()], dim=1) @ plane
    found, share = principal_plane(rows)
    assert float(share.sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(
        torch.cdist(found, found).float(), torch.cdist(rows, rows), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (" the", "word"),
        ("ing", "subword"),
        (" 12", "number"),
        (".", "punctuation"),
        ("\n", "whitespace"),
    ],
)
def test_kinds_of_tokens(token, kind):
    assert token_kind(token) == kind


def test_memory_is_that_of_model_h5(run, figures):
    with h5py.File(run.folder / "model.h5") as file:
        predicted, measured = (
            dict(file[f"memory/{side}"].attrs) for side in ("predicted", "measured")
        )
    found = {row["component"]: row for row in table(figures / "memory.csv")}
    assert int(found["weights"]["predicted_bytes"]) == predicted["weights"]
    assert int(found["temporaries"]["measured_bytes"]) == measured["temporaries"]


def test_padding_is_what_the_engine_counted(tmp_path, tiny_llama, caplog):
    caplog.set_level("INFO")
    made = stages(
        tmp_path, tiny_llama, "corpus.max_tokens=1500 extraction.shards=1 corpus.context_length=50"
    ).all()
    said = next(r.getMessage() for r in caplog.records if "padding: " in r.getMessage())
    assert f"padding: {100 * speed.shard_work(made.shards[0]).padding:.1f}%" in said


def test_memory_of_a_layerwise_run_is_drawn_from_its_plan(tiny_llama, tmp_path):
    made = stages(
        tmp_path / "run", tiny_llama, "extraction.execution=layerwise corpus.max_tokens=500"
    )
    made.prepare()
    settings = frozen.load_frozen(made.folder / "report.json")
    draw_memory(settings, made.folder / "estimate.h5", made.folder / "model.h5", tmp_path)
    with h5py.File(made.folder / "model.h5") as file:
        predicted = dict(file["memory/predicted"].attrs)
        peak = file["memory/measured"].attrs
        expected = {"sweep": (str(peak["predicted"]), str(peak["growth"]))}
    parts = {name: predicted[name] for name in ("buffers", "working_set", "residuals")}
    expected |= {name: (str(value), "") for name, value in parts.items()}
    rows = {row.pop("component"): tuple(row.values()) for row in table(tmp_path / "memory.csv")}
    assert {name: rows[name] for name in expected} == expected
    assert (tmp_path / "gpus.svg").is_file()


def test_seconds_are_the_shard_s_own_else_those_of_the_job(run, figures, tmp_path):
    shard = run.shards[0]
    found = speed.shard_work(shard)
    assert found.source == "shard"
    assert 0 < found.parts["seconds_forward"] < found.seconds
    copy = tmp_path / "run" / "shards" / shard.name
    copy.parent.mkdir(parents=True)
    shutil.copy(shard, copy)
    shares = {"seconds_total": 8.0, "seconds_forward": 6.0, "seconds_waiting_for_disk": 1.5}
    with h5py.File(copy, "r+") as file:
        file["metrics"][:] = [shares.get(name, 0.0) for name in METRICS]
    found = speed.shard_work(copy)
    assert (found.seconds, found.source) == (8.0, "shard")
    assert found.parts == {"seconds_forward": 6.0, "seconds_waiting_for_disk": 1.5}
    with h5py.File(copy, "r+") as file:
        file["metrics"][:] = 0.0
    assert speed.shard_work(copy).seconds is None
    times = copy.parents[1] / "benchmarks/extract_shard" / f"{copy.stem}.tsv"
    times.parent.mkdir(parents=True)
    times.write_text("s\th:m:s\n10.0\t0:00:10\n")
    timed = speed.shard_work(copy)
    assert (timed.seconds, timed.source) == (10.0, "benchmark of the job")
    assert timed.tokens_per_second == timed.tokens / 10
    table_of_time = speed.time_breakdown([found], "x").table
    assert table_of_time.columns[-1] == "seconds_other"
    assert table_of_time.rows[0][-1] == 0.5


def test_attention_weights_of_a_query_add_up_to_one(figures):
    sums: dict[tuple[str, str], float] = {}
    for row in table(figures / "attention.csv"):
        key = row["head"], row["query"]
        sums[key] = sums.get(key, 0.0) + float(row["weight"])
    assert len(sums) == 4 * 24
    assert all(total == pytest.approx(1, abs=1e-4) for total in sums.values())


def test_runs_side_by_side_give_the_error_against_fp32(run, tmp_path, tiny_llama):
    words = f"{HOOKS} corpus.max_tokens=1500 name=b store.dtype=bf16"
    half = stages(tmp_path / "half", tiny_llama, f"{words} extraction.execution=layerwise").all()
    precise, rounded = runs.compare([run.folder, half.folder])
    assert (precise.error_rms, precise.error_largest) == (0, 0)
    a, b = (theloom.open(r.activations) for r in (run, half))
    expected = max(float((b[h][:].float() - a[h][:]).norm() / a[h][:].norm()) for h in a.hooks)
    assert rounded.error_rms == pytest.approx(expected, rel=1e-3)
    assert 2**-10 < rounded.error_rms < 2**-8
    assert rounded.disk * 2 == precise.disk
    (alone,) = runs.compare([half.folder])
    assert alone.error_rms is None
    draw_runs([run.folder, half.folder], tmp_path / "figures")
    assert len(table(tmp_path / "figures/runs.csv")) == 2


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("report.map_hook=blocks.9.hook_resid_post", "report.map_hook"),
        ("report.attention_document=99", "no document 99"),
    ],
)
def test_a_missing_hook_or_document_is_rejected_by_its_key(run, tmp_path, tiny_llama, key, words):
    other = stages(tmp_path, tiny_llama, key).config("report")
    draw = draw_states if "map" in key else draw_attention
    with pytest.raises(ConfigError, match=words):
        draw(other, run.activations, tmp_path / "figures")


def test_attention_is_drawn_if_the_filter_matches_patterns():
    for filters in ([], ["*"], ["blocks.*.attn.*"], ["blocks.-1.attn.hook_pattern"]):
        assert "attention" in groups.groups(filters), filters
    assert "attention" not in groups.groups(["blocks.*.hook_resid_post"])


def test_a_new_title_redraws_the_figures_and_reruns_nothing_else(project, tiny_profile):
    tiny_profile(project)
    done = project.snakemake("figures", profiles="tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.jobs(profiles="tiny") == {}
    page = project.folder / "report.html"
    done = project.snakemake("figures", "--report", str(page), profiles="tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    for label in (
        "Memory by component",
        "Token map (PCA) of a middle layer",
        "Norms by layer and position",
        "shown as",
    ):
        assert label in text
    assert 'src="http' not in text
    assert json.dumps("results/tiny/figures/map.svg") in text
    project.folder.joinpath("config/profile/tiny.yaml").open("a").write(
        "report:\n  title: Another\n"
    )
    dry = project.snakemake("figures", "--dry-run", "--quiet", "host", profiles="tiny")
    stats = (dry.stdout + dry.stderr).split("Job stats:")[1].split("\n\n")[0]
    rerun = {line.split()[0] for line in stats.splitlines()[3:]}
    assert rerun == {
        "freeze_config",
        "report_memory",
        "report_speed",
        "report_states",
        "report_page",
        "figures",
        "total",
    }
