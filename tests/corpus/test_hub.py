"""Data sets of the hub's formats on disk, whole and broken."""

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from support import a_config
from theloom.corpus import documents
from theloom.errors import CorpusError

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(overrides: str):
    return list(documents.read_documents(a_config("any/model", f"corpus=hub {overrides}").corpus))


def write(file, **columns):
    file.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), file)
    return file


def test_a_data_set_on_disk_is_read_by_split_and_column(tmp_path):
    rows = {"body": ["one", "two", "three"], "name": ["x", "y", "z"]}
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows)}
    )
    splits.save_to_disk(tmp_path / "saved")
    requested = f"corpus.dataset={tmp_path}/saved corpus.column=body"
    assert [(d.id, d.text) for d in read(f"{requested} corpus.split=test")][:1] == [
        ("test/0", "one")
    ]
    assert [d.id for d in read(f"{requested} corpus.id_column=name corpus.max_documents=2")] == [
        "x",
        "y",
    ]
    with pytest.raises(CorpusError, match=r"corpus\.split.*'dev'.*train, test"):
        read(f"{requested} corpus.split=dev")


def test_parquet_is_read_from_a_folder_or_as_one_file(tmp_path):
    file = write(tmp_path / "parquet" / "train.parquet", text=["one", "two"], other=[1, 2])
    for path in (file, file.parent):
        found = read(f"corpus.dataset={path}")
        assert [(d.id, d.text) for d in found] == [("train/0", "one"), ("train/1", "two")]
    with pytest.raises(CorpusError, match=r'Unknown split "test"'):
        read(f"corpus.dataset={file} corpus.split=test")


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
    ids=["large", "view", "dictionary"],
)
def test_every_type_of_text_in_parquet_is_a_text(tmp_path, texts):
    file = write(tmp_path / "x.parquet", text=texts)
    assert [d.text for d in read(f"corpus.dataset={file}")] == ["a", "b"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([1, 2], "train/0: column 'text' is a number"),
        ([["a"], ["b"]], "train/0: column 'text' is a list"),
        ([b"a", b"b"], "train/0: column 'text' is bytes"),
        (pa.array([b"\xff"]).view(pa.string()), "can't decode byte 0xff"),
    ],
    ids=["numbers", "lists", "bytes", "broken"],
)
def test_what_is_no_text_in_parquet_is_refused_with_its_row(tmp_path, texts, words):
    file = write(tmp_path / "x.parquet", text=texts)
    with pytest.raises(CorpusError, match=words):
        read(f"corpus.dataset={file}")


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    file = write(tmp_path / "x.parquet", body=["a"])
    with pytest.raises(
        CorpusError, match=r"no column 'text'; columns there: body; set corpus\.col"
    ):
        read(f"corpus.dataset={file}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.parquet", b"PAR1xxxxPAR1"),
        ("x.parquet", b""),
        ("x.jsonl", b'{"text": "a"}\n{oops'),
        ("x.jsonl.gz", b"\x1f\x8b\x08\0\0"),
        ("x.zip", b"PK"),
        ("dataset_info.json", b"{oops"),
    ],
)
def test_a_broken_data_set_ends_in_one_line(tmp_path, name, content):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"^corpus\.dataset: {folder}: .") as caught:
        read(f"corpus.dataset={folder}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "words"), [("x.csv", r"corpus=text corpus\.path=.*x\.csv"), ("x.zip", "convert it")]
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"text\na\n")
    with pytest.raises(CorpusError, match=words):
        read(f"corpus.dataset={tmp_path / name}")


def test_a_data_set_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(CorpusError, match=r"corpus\.dataset: nobody/nothing") as caught:
        read("corpus.dataset=nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_stream_gives_the_same_documents_and_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    rows = {"text": [f"text {n}" for n in range(50)], "label": [n % 2 for n in range(50)]}
    folder = tmp_path / "data"
    folder.mkdir()
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(folder / "train.parquet")
    requested = f"corpus.dataset={folder} corpus.columns=[label]"
    whole = read(requested)
    assert read(f"{requested} corpus.streaming=true") == whole
    assert [d.columns for d in whole[:2]] == [("no",), ("yes",)]
    seen = []
    of_row = documents.hub.rows.of_row
    monkeypatch.setattr(
        documents.hub.rows, "of_row", lambda row, *more: seen.append(row) or of_row(row, *more)
    )
    read(f"{requested} corpus.streaming=true corpus.max_documents=3")
    assert len(seen) == 3
    with pytest.raises(CorpusError, match=r"no column 'body'; columns there: text, label"):
        read(f"{requested} corpus.streaming=true corpus.column=body")
