"""Documents from every kind of corpus, and what is said of those that cannot be read."""

import json

import datasets
import pytest
from support import a_config
from theloom.corpus import documents
from theloom.errors import CorpusError


def read(overrides: str):
    return list(documents.read_documents(a_config("any/model", overrides).corpus))


def test_python_docs_are_the_topics_of_the_standard_library():
    from pydoc_data.topics import topics

    found = read("")
    assert [d.id for d in found] == sorted(f"pydoc_data.topics/{name}" for name in topics)
    assert sum(len(d.text) for d in found) == sum(map(len, topics.values()))


def test_a_folder_of_texts_is_read_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "a.md").write_text("alpha ü", encoding="utf-8")
    (tmp_path / "sub/c.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "ignored.pdf").write_text("no")
    found = read(f"corpus=text corpus.path={tmp_path}")
    assert [(d.id, d.text) for d in found] == [
        ("a.md", "alpha ü"),
        ("b.txt", "beta"),
        ("sub/c.jsonl:1", "one"),
        ("sub/c.jsonl:3", "two"),
    ]


def test_columns_of_json_lines(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "one", "key": 7}\n')
    (found,) = read(
        f"corpus=text corpus.path={tmp_path}/x.jsonl corpus.column=body corpus.id_column=key"
    )
    assert (found.id, found.text) == ("7", "one")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"ab\xff", ["x.txt", "not utf-8", "0xff at offset 2", "corpus.encoding"]),
        ("x.jsonl", b'{"text": "a"}\n{oops\n', ["x.jsonl, line 2", "not JSON"]),
        ("x.jsonl", b'{"body": "a"}\n', ["x.jsonl:1", "'text'", "body", "corpus.column"]),
        ("x.jsonl", b'["a"]\n', ["x.jsonl:1", "list"]),
        ("x.jsonl", b'{"text": 3}\n', ["x.jsonl:1", "'text'"]),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        read(f"corpus=text corpus.path={tmp_path}")
    for word in words:
        assert word in str(caught.value)


def test_another_encoding_is_read_when_requested(tmp_path):
    (tmp_path / "x.txt").write_bytes("grün".encode("latin-1"))
    assert read(f"corpus=text corpus.path={tmp_path} corpus.encoding=latin-1")[0].text == "grün"
    with pytest.raises(CorpusError, match="no encoding 'klingon'"):
        read(f"corpus=text corpus.path={tmp_path} corpus.encoding=klingon")


@pytest.mark.parametrize(
    ("path", "words"), [("nowhere", "no file or folder"), (".", "holds no .txt")]
)
def test_missing_files_are_found_before_any_job(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=words):
        documents.check_local(a_config("any/model", f"corpus=text corpus.path={path}").corpus)


def test_a_data_set_on_disk_is_read_by_split_and_column(tmp_path):
    rows = {"body": ["one", "two", "three"], "name": ["x", "y", "z"]}
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows)}
    )
    splits.save_to_disk(tmp_path / "saved")
    requested = f"corpus=hub corpus.dataset={tmp_path}/saved corpus.column=body"
    assert [(d.id, d.text) for d in read(f"{requested} corpus.split=test")][:1] == [
        ("test/0", "one")
    ]
    assert [d.id for d in read(f"{requested} corpus.id_column=name corpus.max_documents=2")] == [
        "x",
        "y",
    ]
    with pytest.raises(CorpusError, match=r"corpus\.split.*'dev'.*train, test"):
        read(f"{requested} corpus.split=dev")


def test_a_folder_of_parquet_is_a_data_set_too(tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(folder / "train.parquet")
    assert [d.text for d in read(f"corpus=hub corpus.dataset={folder}")] == ["one", "two"]


def test_a_data_set_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(CorpusError, match=r"corpus\.dataset: nobody/nothing") as caught:
        read("corpus=hub corpus.dataset=nobody/nothing")
    assert "\n" not in str(caught.value)


def test_json_lines_hold_any_json(tmp_path):
    text = 'quote " and \\ and \u2028 and 🧵'
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read(f"corpus=text corpus.path={tmp_path}")[0].text == text
