"""Columns of the corpus stay with their documents, typed, through every file and export."""

import gzip
import itertools
import json
import time

import datasets
import h5py
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
import theloom
import zstandard
from support import (
    a_config,
    build_tiny,
    extract_with_small_commits,
    forked,
    stages,
    with_bytes,
)
from theloom.corpus import documents, tokens
from theloom.corpus.columns import Category, Collected, Columns
from theloom.corpus.rows import Untyped
from theloom.corpus.spooled import values as spooled
from theloom.corpus.tokens_file import reading
from theloom.dataset.merge import merge_shards
from theloom.errors import CorpusError
from theloom.exports import export
from theloom.store.tables import columns as tables
from tokenizers import decoders, pre_tokenizers

ROWS = [
    {"key": "é-1", "text": "the first", "label": 3, "score": 0.5, "ok": True, "lang": "en"},
    {"key": "é-2", "text": "", "label": 99, "score": 9.0, "ok": False, "lang": "xx"},
    {"key": "é-3", "text": "zweiter 🧵", "label": -1, "score": 2, "ok": False, "lang": "de, \n"},
    {"key": "é-4", "text": None, "label": 98, "score": 8.0, "ok": False, "lang": "xx"},
    {"key": "ア", "text": "a", "label": None, "score": None, "ok": None, "lang": "日本"},
]
KEPT = [0, 2, 4]  # rows that have a text
NAMES = ["label", "score", "ok", "lang"]
COLUMNS = f"corpus.id_column=key corpus.columns=[{','.join(NAMES)}]"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return with_bytes(build_tiny("llama", tmp_path_factory.mktemp("bytes"), vocab_size=256))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))


def write_delimited(path, rows):
    table = pandas.DataFrame(rows).astype({"label": "Int64", "ok": "boolean"})
    table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)


def arrow_table(rows):
    return pa.Table.from_pylist(
        [row | {"score": row["score"] and float(row["score"])} for row in rows]
    )


def write_parquet(path, rows):
    pyarrow.parquet.write_table(arrow_table(rows), path, row_group_size=2)


def write_arrow(path, rows):
    table = arrow_table(rows)
    with pa.ipc.new_file(path, table.schema) as out:
        out.write_table(table, max_chunksize=2)


def write_arrow_stream(path, rows):
    table = arrow_table(rows)
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)


WRITERS = {
    "x.jsonl": write_jsonl,
    "x.json": write_json,
    "x.csv": write_delimited,
    "x.tsv": write_delimited,
    "x.parquet": write_parquet,
    "x.arrow": write_arrow,
    "stream.arrow": write_arrow_stream,
}


def packed(path, how):
    if not how:
        return path
    target = path.with_name(path.name + how)
    raw = path.read_bytes()
    made = gzip.compress(raw) if how == ".gz" else zstandard.ZstdCompressor().compress(raw)
    target.write_bytes(made)
    path.unlink()
    return target


def stored(columns):
    """The columns as a file holds them, read back."""
    typed = columns if isinstance(columns, dict) else columns.typed()
    with h5py.File("columns.h5", "w", driver="core", backing_store=False) as file:
        tables.write_pieces(file, typed)
        (count,) = {column.count for column in typed.values()}
        listed = tables.described(typed)
        return tables.read(lambda n: file[n][:] if n in file else None, listed, count)


def read(overrides):
    settings = documents.settings(a_config("any/model", overrides).corpus)  # as stages read
    return list(documents.read_documents(settings))


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_typed_columns(tmp_path, name, how):
    WRITERS[name](tmp_path / name, ROWS)
    packed(tmp_path / name, how)
    found = read(f"corpus=text corpus.path={tmp_path} {COLUMNS}")
    assert [(d.id, d.text) for d in found] == [(r["key"], r["text"] or "") for r in ROWS]
    columns = Columns(NAMES)
    for document in found:
        columns.add(document)
    typed = stored(columns)
    assert {n: c.type for n, c in typed.items()} == dict(
        zip(NAMES, ("integer", "float", "boolean", "string"), strict=True)
    )
    for column in ("label", "ok", "lang"):
        assert typed[column].tolist() == [row[column] for row in ROWS]
    assert np.array_equal(typed["score"].array(), [0.5, 9, 2, 8, np.nan], equal_nan=True)


@pytest.mark.parametrize("mode", ["virtual", "physical"])
def test_columns_reach_every_file_and_export(tmp_path, model, mode, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "x.jsonl", ROWS * 1)
    requested = f"corpus=text corpus.path={tmp_path}/x.jsonl {COLUMNS} extraction.shards=2"
    run = stages(tmp_path / "run", model, requested).all()
    merge_shards(run.shards, mode, run.activations)
    kept = [ROWS[n] for n in KEPT]
    acts = theloom.open(run.activations)
    assert acts.documents == [row["key"] for row in kept]
    shards = [theloom.open(path) for path in run.shards]
    for name in ("label", "ok", "lang"):
        expected = [row[name] for row in kept]
        assert acts.columns[name].tolist() == expected
        assert [v for shard in shards for v in shard.columns[name].tolist()] == expected
    frame = acts.to_dataframe()
    assert list(frame.columns) == ["id", "first_row", "tokens", "windows", *NAMES]
    assert frame["label"].dtype == "Int64"
    assert frame["label"].isna().tolist() == [False, False, True]
    assert frame["lang"].tolist() == [row["lang"] for row in kept]
    lengths = [len(row["text"].encode()) for row in kept]
    by_row = [row["lang"] for row, n in zip(kept, lengths, strict=True) for _ in range(n)]
    tokens = acts.to_dataframe(of="tokens")
    assert tokens["lang"].tolist() == by_row
    assert not tokens["special"].any()
    text = "".join(row["text"] for row in kept)
    assert tokens["char_end"].max() == max(len(row["text"]) for row in kept)
    first = tokens[tokens["document"] == 0]
    assert [text[a:b] for a, b in zip(first["char_start"], first["char_end"], strict=True)] == list(
        kept[0]["text"]
    )
    assert acts.to_xarray(acts.hooks[:1])["lang"].to_numpy().tolist() == by_row
    assert acts.to_datasets(acts.hooks[:1])["lang"][:] == by_row
    export(acts, "safetensors", tmp_path / "x", hooks=acts.hooks[:1])
    documents = json.loads((tmp_path / "x/documents.json").read_text())
    assert documents["lang"] == [row["lang"] for row in kept]
    assert documents["ok"] == [row["ok"] for row in kept]
    assert documents["offset"] == acts.document_offset.tolist()
    with h5py.File(run.activations) as file:  # as a plain reader has them
        assert file["documents/columns/label"][:2].tolist() == [3, -1]
        assert file["documents/columns/lang"][2].decode() == "日本"
        assert file["documents/null/label"][:].tolist() == [0, 0, 1]
        assert file["tokens/char_start"].shape == file["tokens/input_ids"].shape
        assert [c["name"] for c in json.loads(file.attrs["columns"])] == NAMES


def typed(*values):
    collected = Collected("c")
    for number, value in enumerate(values):
        collected.add(value, f"row {number}")
    return stored({"c": collected.column()})["c"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((1, None, 2), "integer"),
        ((1, 2.5, None), "float"),
        ((True, None, False), "boolean"),
        (("1", "", None), "string"),
        (([[0, 5]], None, [1]), "json"),
        ((None, None), "string"),
        ((), "string"),
        ((-(2**63), 2**63 - 1), "integer"),
    ],
)
def test_a_column_has_the_type_of_its_values(values, kind):
    column = typed(*values)
    assert column.type == kind
    found = [None if isinstance(v, float) and np.isnan(v) else v for v in column.tolist()]
    assert found == list(values)


@pytest.mark.parametrize(
    "values", [("a", 1), (1, True), (1.5, "a"), ([1], "a"), (True, 0.0), (1, None, "1")]
)
def test_a_column_of_mixed_types_is_refused_with_both_places(values):
    with pytest.raises(CorpusError, match=r"^row \d: column 'c' is of mixed types: .*\(row 0\)"):
        typed(*values)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2**63, "beyond 64 bits"),
        (b"x", "is bytes"),
        ("a\0", "has a NUL"),
        ("\ud800", "lone surrogate"),
        ("x" * 1025, "1025 bytes, and may have 1024"),
    ],
)
def test_a_value_that_no_file_can_hold_is_refused(value, words):
    with pytest.raises(CorpusError, match=words):
        typed(value)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "20", ""], "integer"),
        (["1.5", "-2", ""], "float"),
        (["true", "False", ""], "boolean"),
        (["007", "1"], "string"),
        (["1", "x"], "string"),
        (["9" * 25, "1"], "string"),
        (["2024-01-01"], "string"),
        (["", ""], "string"),
    ],
)
def test_cells_of_a_csv_are_numbers_only_where_nothing_is_lost(tmp_path, cells, kind):
    frame = pandas.DataFrame({"text": "t", "c": cells})
    frame.to_csv(tmp_path / "x.csv", index=False)
    columns = Columns(["c"])
    for document in read(f"corpus=text corpus.path={tmp_path} corpus.columns=[c]"):
        columns.add(document)
    assert stored(columns)["c"].type == kind


@pytest.mark.parametrize(
    ("values", "cells", "found"),
    [
        ([1, None], ["2", ""], [1, None, 2, None]),
        ([1, 2], ["2.5", ""], [1.0, 2.0, 2.5, None]),
        ([0.5, 7], ["3", ""], [0.5, 7.0, 3.0, None]),
        ([True, None], ["false", ""], [True, None, False, None]),
        (["x", None], ["7", ""], ["x", None, "7", ""]),
        ([[1], None], ["[2, 3]", '{"a": 1}'], [[1], None, [2, 3], {"a": 1}]),
        ([1, 2], ["x"], "'x'"),
        ([1, 2], ["9" * 25], "99999"),
        ([1.5], [str(2**53 + 1)], "no float holds"),
        ([True], ["yes"], "'yes'"),
        ([[1]], ["[2"], "'\\[2'"),
    ],
)
def test_texts_of_a_csv_are_of_the_type_of_other_files(monkeypatch, values, cells, found):
    monkeypatch.setattr(spooled, "_TOGETHER", 1)
    collected = Collected("c")
    for n, value in enumerate([*values, *map(Untyped, cells)]):
        collected.add(value, f"row {n}")
    if isinstance(found, str):
        with pytest.raises(CorpusError, match=rf"'c' .*{found}"):
            collected.column()
        return
    column = stored({"c": collected.column()})["c"].tolist()
    assert [None if isinstance(v, float) and np.isnan(v) else v for v in column] == found


def test_a_text_that_is_no_category_of_other_files_is_refused():
    collected = Collected("c")
    collected.add(Category.of("no", ["no", "yes"]), "row 0")
    collected.add(Untyped("yes"), "row 1")
    assert stored({"c": collected.column()})["c"].tolist() == ["no", "yes"]
    collected.add(Untyped("maybe"), "row 2")
    with pytest.raises(CorpusError, match="'c' is of mixed types over the files: 'maybe' in one"):
        collected.column()


def test_a_category_keeps_its_names_and_their_order(tmp_path):
    values = pa.DictionaryArray.from_arrays(pa.array([2, 0, None]), ["no", "maybe", "yes"])
    pyarrow.parquet.write_table(
        pa.table({"text": list("abc"), "c": values}), tmp_path / "x.parquet"
    )
    labels = datasets.Features(
        {"text": datasets.Value("string"), "c": datasets.ClassLabel(names=["n", "y"])}
    )
    made = datasets.Dataset.from_dict({"text": list("abc"), "c": [1, 0, -1]}, features=labels)
    made.to_parquet(tmp_path / "y.parquet")
    for path in ("x", "y"):
        columns = Columns(["c"])
        for document in read(
            f"corpus=text corpus.path={tmp_path}/{path}.parquet corpus.columns=[c]"
        ):
            columns.add(document)
        column = stored(columns)["c"]
        assert column.type == "category"
        assert column.tolist() == (["yes", "no", None] if path == "x" else ["y", "n", None])
    assert column.values.tolist() == [1, 0, -1]


def test_an_unknown_column_is_named_with_those_there(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name, ROWS)
        with pytest.raises(
            CorpusError, match=r"no column 'split'; columns there: key, text, label"
        ):
            read(f"corpus=text corpus.path={tmp_path}/{name} corpus.columns=[split]")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(CorpusError, match=r"x\.txt: no column 'label'; columns there: none"):
        read(f"corpus=text corpus.path={tmp_path}/x.txt corpus.columns=[label]")


def test_names_with_slashes_and_dots_are_names(tmp_path, model):
    row = {"text": "a", "a/b": 1, ".": 2, "%2F": 3, "tokens": 4}
    write_jsonl(tmp_path / "x.jsonl", [row])
    requested = f"corpus=text corpus.path={tmp_path}/x.jsonl corpus.columns=[a/b,.,%2F,tokens]"
    run = stages(tmp_path / "run", model, requested).all()
    acts = theloom.open(run.activations)
    assert {n: c.tolist() for n, c in acts.columns.items()} == {
        "a/b": [1],
        ".": [2],
        "%2F": [3],
        "tokens": [4],
    }
    assert acts.to_dataframe()["corpus.tokens"].tolist() == [4]


def test_equal_ids_are_refused_or_numbered(tmp_path):
    keys = ["a", "b", "a", "a#2", "a"]
    write_jsonl(tmp_path / "x.jsonl", [{"text": "t", "k": k} for k in keys])
    requested = f"corpus=text corpus.path={tmp_path} corpus.id_column=k"
    with pytest.raises(CorpusError, match=r"two documents 'a'.*duplicate_ids=number"):
        read(requested)
    found = [d.id for d in read(f"{requested} corpus.duplicate_ids=number")]
    assert found == ["a", "b", "a#2", "a#2#2", "a#3"]


def labelled(count):
    """Rows with shuffled ids, of which some have no text; the label of each is told by its text."""
    order = np.random.default_rng(0).permutation(count).tolist()
    rows = []
    for number in order:
        text = {3: "", 5: None}.get(number % 7, f"text {number} é")
        row = {"key": f"ü{number}", "text": text, "label": number, "score": number / 2}
        rows.append(row | {"ok": number % 2 == 0, "lang": f"日{number % 5}"})
    return rows


def assert_labels_are_those_of_texts(input_ids, offsets, ids, columns):
    """By the bytes of each document, which its tokens are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    decode = decoders.ByteLevel().decode
    labels, names = columns["label"].tolist(), columns["lang"].tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        text = decode([alphabet[i] for i in input_ids[start:stop]])
        assert text == f"text {labels[n]} é"
        assert (ids[n], names[n]) == (f"ü{labels[n]}", f"日{labels[n] % 5}")


@pytest.mark.parametrize("name", WRITERS)
def test_each_of_ten_thousand_rows_keeps_its_label(tmp_path, name):
    rows = labelled(10_000)
    WRITERS[name](tmp_path / name, rows)
    found, columns = read(f"corpus=text corpus.path={tmp_path} {COLUMNS}"), Columns(NAMES)
    assert [(d.id, d.text) for d in found] == [(r["key"], r["text"] or "") for r in rows]
    for document in found:
        columns.add(document)
    typed = stored(columns)
    for column in NAMES:
        assert typed[column].tolist() == [row[column] for row in rows]


def test_each_of_ten_thousand_documents_keeps_its_label(tmp_path, model):
    rows = labelled(10_000)
    write_parquet(tmp_path / "x.parquet", rows)
    requested = f"corpus=text corpus.path={tmp_path}/x.parquet {COLUMNS} corpus.max_tokens=null"
    run = stages(tmp_path / "run", model, f"{requested} extraction.shards=3")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    parts = [reading.read_job(run.folder / "tokens.h5", shard).shard for shard in range(3)]
    labels = [v for part in parts for v in part.columns["label"].tolist()]
    assert labels == [row["label"] for row in rows if row["text"]]
    for part in parts:
        ids = [i.decode() for i in part.document_id]
        assert_labels_are_those_of_texts(part.input_ids, part.document_offset, ids, part.columns)


def test_labels_stay_with_their_rows_through_a_kill(tmp_path, model):
    write_jsonl(tmp_path / "x.jsonl", labelled(150))
    requested = f"corpus=text corpus.path={tmp_path}/x.jsonl {COLUMNS} extraction.shards=1"
    run = stages(tmp_path / "run", model, f"{requested} extraction.batch_tokens=32")
    run.prepare()
    job = forked(extract_with_small_commits, run.folder)
    partial = run.folder / "shards/00000-of-00001.h5.partial"
    while job.is_alive() and not (partial.exists() and committed_rows(partial)):
        time.sleep(0.002)
    job.kill()
    job.join()
    assert partial.exists()
    run.extract()
    run.merge()
    run.verify()  # some documents, from the texts
    acts = theloom.open(run.activations)
    everything = acts.input_ids.numpy(...)
    assert_labels_are_those_of_texts(everything, acts.document_offset, acts.documents, acts.columns)


def committed_rows(partial):
    with h5py.File(partial, "r") as file:
        return int(file["commit_log"]["rows"].max(initial=0))


def test_other_labels_of_the_same_texts_begin_the_shards_anew(tmp_path, model):
    run_of = {}
    for name, label in (("a", 1), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "same", "label": label}])
        requested = f"corpus=text corpus.path={tmp_path}/{name}.jsonl corpus.columns=[label]"
        run = stages(tmp_path / name, model, requested)
        tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
        run_of[name] = reading.attributes(run.folder / "tokens.h5")
    assert run_of["a"]["tokens_hash"] == run_of["b"]["tokens_hash"]
    assert run_of["a"]["tables_hash"] != run_of["b"]["tables_hash"]
