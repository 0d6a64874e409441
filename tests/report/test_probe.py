"""The probe of a label: against scikit-learn by hand, and where there can be none."""

import copy
import csv
import json

import numpy as np
import pytest
import theloom
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from support import stages
from theloom.config import compose, frozen
from theloom.config.locations import project_folder
from theloom.errors import ConfigError
from theloom.report import groups, probe
from theloom.report.draw import draw_probe, draw_states

KEYS = "corpus=text corpus.column=text report.label=label corpus.columns="
COLOURS = ("red", "green", "blue")


def corpus(path, documents=60, values=COLOURS, words=6):
    """Texts in which a word gives the label, which is missing in every tenth."""
    random = np.random.default_rng(0)
    filler = ("house", "river", "stone", "paper", "winter", "music")
    with path.open("w", encoding="utf-8") as file:
        for n in range(documents):
            label = values[n % len(values)]
            text = " ".join([str(label), *random.choice(filler, words)])
            line = {"text": text, "label": None if n % 10 == 9 else label, "even": n % 2 == 0}
            file.write(json.dumps(line | {"weight": n + 0.5, "number": n}) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("run")
    texts = corpus(folder / "texts.jsonl")
    requested = f"{KEYS}[label,even,weight,number] corpus.path={texts}"
    return stages(folder, tiny_llama, requested).all()


def table(folder):
    with (folder / "probe.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn(run, folder, **settings):
    config = copy.deepcopy(run.config("report"))
    OmegaConf.set_readonly(config, False)
    config.report.update(settings)
    draw_probe(config, run.activations, folder)
    return config


def test_accuracy_is_that_of_probes_which_saw_no_row_of_the_document(run, tmp_path):
    """Each document left out in turn: a split that is not the report's."""
    drawn(run, tmp_path)
    acts = theloom.open(run.activations)
    rows = table(tmp_path)
    assert [row["hook"] for row in rows] == acts.hooks
    hook = acts.hooks[-1]
    x, y = acts.xy(hook, "label", missing="drop")
    document = acts.rows["document"][~np.ma.getmaskarray(acts.rows["label"])]
    assert {int(row["rows"]) for row in rows} == {len(y)}
    assert {int(row["documents"]) for row in rows} == {54}
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-12)
    right = 0
    for held_out in np.array_split(np.random.default_rng(1).permutation(np.unique(document)), 18):
        inside = np.isin(document, held_out)
        fitted = LogisticRegression(C=1 / x.shape[1], max_iter=1000).fit(x[~inside], y[~inside])
        right += int((fitted.predict(x[inside]) == y[inside]).sum())
    row = rows[-1]
    assert float(row["accuracy"]) == pytest.approx(right / len(y), abs=0.06)
    assert float(row["low_95_percent"]) < float(row["accuracy"]) < float(row["high_95_percent"])
    assert float(row["majority_share"]) == pytest.approx(max(np.mean(y == c) for c in COLOURS))


def test_what_only_tells_documents_apart_tells_no_label(tmp_path, tiny_llama):
    """All rows of a document are nearly equal, and labels are random: a split of rows would find
    every label.
    """
    file = tmp_path / "texts.jsonl"
    random = np.random.default_rng(3)
    words = random.choice([chr(97 + n) * 3 for n in range(26)], (40, 2))
    labels = np.repeat([True, False], 20)
    random.shuffle(labels)
    lines = [
        {"text": " ".join([*pair] * 12), "label": bool(label)}
        for pair, label in zip(words, labels, strict=True)
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    made = stages(tmp_path / "run", tiny_llama, f"{KEYS}[label] corpus.path={file}").all()
    drawn(made, tmp_path)
    shares = [float(row["accuracy"]) for row in table(tmp_path)]
    assert max(shares) < 0.8, shares


def test_a_label_in_the_rows_is_found_and_a_shuffled_one_is_not():
    """Rows that hold the label, of documents of uneven length."""
    random = np.random.default_rng(0)
    length = random.integers(1, 9, 80)
    document = np.repeat(np.arange(80), length)
    label = (np.arange(80) % 2)[document]
    x = random.normal(size=(len(document), 30)).astype("f4")
    x[:, 3] += 6 * label
    chosen = probe.Labelled(np.arange(len(document)), label, document, ["a", "b"], {})
    assert chosen.folds == 5
    assert probe._held_out(x, label, chosen, 0) > 0.97
    (one, *_) = probe._shuffled(chosen, 0)
    assert all(len(set(one[document == n])) == 1 for n in range(80))
    assert sorted(one[np.unique(document, return_index=True)[1]]) == [0] * 40 + [1] * 40
    assert probe._held_out(x, one, chosen, 0) < 0.7


def test_a_label_of_two_documents_of_each_value_is_split_in_two():
    document = np.repeat([0, 1, 2, 3], [9, 90, 20, 30])
    label = document // 2
    chosen = probe.Labelled(np.arange(149), label, document, ["a", "b"], {})
    assert chosen.folds == 2
    x = np.stack([label, document], axis=1).astype("f4")
    assert probe._held_out(x, label, chosen, 0) == 1.0


@pytest.mark.parametrize(
    ("label", "words"), [("weight", "has 60 values"), ("number", "has 60 values")]
)
def test_a_label_that_is_no_class_is_said_in_the_figure(run, tmp_path, label, words):
    drawn(run, tmp_path, label=label)
    (row,) = table(tmp_path)
    assert words in row["note"]
    assert "2 to 20" in row["note"]


def test_a_label_of_one_value_is_said_in_the_figure(tmp_path, tiny_llama):
    texts = corpus(tmp_path / "texts.jsonl", documents=9, values=("one",))
    made = stages(tmp_path / "run", tiny_llama, f"{KEYS}[label] corpus.path={texts}").all()
    drawn(made, tmp_path)
    assert table(tmp_path)[0]["note"].endswith("documents by value: one: 9.")


def test_a_value_of_one_document_is_left_out_and_logged(tmp_path, tiny_llama, caplog):
    texts = corpus(tmp_path / "texts.jsonl", documents=20, values=("a", "b"))
    with texts.open("a") as file:
        file.write(json.dumps({"text": "a lonely one", "label": "c"}) + "\n")
    made = stages(tmp_path / "run", tiny_llama, f"{KEYS}[label] corpus.path={texts}").all()
    drawn(made, tmp_path)
    assert {row["values"] for row in table(tmp_path)} == {"2"}
    assert "'c': 1" in caplog.text


def test_the_map_is_coloured_by_the_label(run, tmp_path):
    config = run.config("report")
    draw_states(config, run.activations, tmp_path)
    with (tmp_path / "map.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of_document = theloom.open(run.activations).columns["label"].tolist()
    assert rows
    for row in rows:
        assert row["label"] == (of_document[int(row["document"])] or "other")
    text = (tmp_path / "map.svg").read_text()
    assert all(f">{value}<" in text for value in (*COLOURS, "other"))


def test_a_column_that_the_run_lacks_is_an_error_in_one_line(run, tmp_path):
    with pytest.raises(ConfigError, match=r"no column 'flavour'.*label, even, weight, number"):
        drawn(run, tmp_path, label="flavour")
    with pytest.raises(ConfigError, match=r"report\.label: 'x' is not among corpus\.columns"):
        compose.runs(project_folder() / "config", "smollm2-135m", "report.label=x")


def test_a_label_adds_its_figure_and_changes_no_other_stage(tmp_path, tiny_llama):
    assert "probe" in groups.groups([], "label")
    assert "probe" not in groups.groups([])
    keys = "corpus.columns=[label] corpus=text corpus.path=x"
    (without,) = compose.runs(project_folder() / "config", "smollm2-135m", keys).values()
    (labelled,) = compose.runs(
        project_folder() / "config", "smollm2-135m", f"{keys} report.label=label name=smollm2-135m"
    ).values()
    differ = {s for s in frozen.STAGES if without.stage(s)["config"] != labelled.stage(s)["config"]}
    assert differ == {"report"}
