"""Documents from every kind of corpus, and what is said of those that cannot be read."""

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
    ("path", "words"), [("nowhere", "no file or folder"), (".", "holds no file of .txt")]
)
def test_missing_files_are_found_before_any_job(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=words):
        documents.check_local(a_config("any/model", f"corpus=text corpus.path={path}").corpus)


def test_ids_of_a_column_are_those_of_one_document_each(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1", "key": "x"}\n{"text": "2", "key": 7}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "3", "key": 3}\n\n{"text": "4", "key": "7"}\n')
    requested = f"corpus=text corpus.path={tmp_path}"
    assert len(read(requested)) == 4
    assert len(read(f"{requested} corpus.id_column=key corpus.max_documents=3")) == 3
    with pytest.raises(CorpusError, match=r"'7' \(a.jsonl, line 2, and b.jsonl, line 3\)"):
        read(f"{requested} corpus.id_column=key")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ('"x\\ud800"', "id has a lone surrogate"),
        ('"b\\u0000"', "has a NUL"),
        (f'"{"x" * 1025}"', "has 1025 bytes"),
        ("null", "'key' is null, not a name"),
        ("[1]", "'key' is a list, not a name"),
        ("true", "'key' is true or false, not a name"),
    ],
)
def test_an_id_that_no_file_can_hold_is_refused_at_its_line(tmp_path, key, words):
    (tmp_path / "x.jsonl").write_text(
        f'{{"text": "1", "key": "b"}}\n{{"text": "2", "key": {key}}}\n'
    )
    with pytest.raises(CorpusError, match=f"^x.jsonl, line 2: .*{words}") as caught:
        read(f"corpus=text corpus.path={tmp_path} corpus.id_column=key")
    assert str(caught.value).isprintable()
