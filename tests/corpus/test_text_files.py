"""Files of texts: which are read, in which encodings, and what is refused with its line."""

import json
import os
import tempfile
from pathlib import Path

import pandas
import pytest
from support import a_config
from theloom.corpus import documents, rows, text_files
from theloom.errors import CorpusError

LINES = '{"text": "first é"}\n{"text": "second ア"}\n'


def read(path, overrides: str = ""):
    config = a_config("any/model", f"corpus=text corpus.path={path} {overrides}").corpus
    return [(d.id, d.text) for d in documents.read_documents(config)]


def refused(path, overrides: str = "") -> str:
    with pytest.raises(CorpusError) as caught:
        read(path, overrides)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"ab\xff", "x.txt, line 1: not utf-8 (byte 0xff, column 3)"),
        ("x.txt", b"a\0b\0", "x.txt, line 1: not utf-8 (byte 0x00, column 2)"),
        ("x.txt", "a".encode("utf-16"), "utf-16 or utf-32, by its looks"),
        ("x.jsonl", b'{"text": "a"}\n{oops\n', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "x.jsonl, line 1: no column 'text'; columns there: body"),
        ("x.jsonl", b'{"te\\ud800\\n": "a"}', "columns there: te\\ud800\\n; set corpus.column"),
        ("x.jsonl", b'["a"]\n', "x.jsonl, line 1: is a list"),
        ("x.jsonl", b'\n\r\n{"text": 7}', "x.jsonl, line 3: column 'text' is a number"),
        ("x.jsonl", b'{"text": NaN}\n', "x.jsonl, line 1: column 'text' is a number"),
        ("x.jsonl", b'{"text": {"text": "a"}}', "column 'text' is an object"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800 b"}',
            "x.jsonl, line 2: the text has a lone",
        ),
        (
            "x.jsonl",
            b'{"text": "a", "text": "b"}',
            "line 1: not JSON (the column 'text' is there 2",
        ),
        ("x.jsonl", b'{"text": "a", "x": ' + b"[" * 10**5, "line 1: not JSON (nested too deeply)"),
        ("x.jsonl", b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "line 1: not JSON (Exceeds"),
        (
            "x.jsonl",
            b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}',
            "line 2: not JSON (Unexpected UTF-8",
        ),
        ("x.csv", b"a,b\n1,2\n", "x.csv, line 1: no column 'text'; columns there: a, b"),
        ("x.csv", b"text,text\n1,2\n", "x.csv, line 1: 2 columns are named 'text'"),
        ("x.csv", b'a,text\n1,"x\n\ny"\n2\n', "x.csv, line 5: 1 fields, and the header has 2"),
        ("x.csv", b'text\n"a\nb\xff"\n', "x.csv, line 3: not utf-8 (byte 0xff, column 2)"),
        ("x.csv", b'text\n"never\nclosed\n', "x.csv, line 2: not a row of a .csv file"),
        ("x.jsonl.xz", b"\xfd7z", ".faa, or one of them with .gz or .zst (not read: 1 of"),
        ("x.jsonl.gz", b"\x1f\x8b", "x.jsonl.gz: cannot be unpacked (Compressed file ended"),
        ("x.csv.zst", b"\x28\xb5\x2f\xfd", "x.csv.zst: cannot be unpacked (cut short)"),
        ("x.tsv.zst", b"text\na", "x.tsv.zst: cannot be unpacked"),
        ("x.json", b'[{"text": "a"}\n{"text": "b"}]', "x.json, line 2: not JSON as it should be"),
        ("x.json", b'[{"text": "a"},\n{oops}]', "x.json, line 2: not JSON as it should be"),
        ("x.json", b'[{"text": "a"}', "the list has no end"),
        ("x.json", b'{"text": "a"} "b"', "not an object"),
        ("x.json", b'[{"text": "a", "x": ' + b"[" * 10**5, "(nested too deeply)"),
        ("x.json", b'{"body": "a"}', "x.json, row 1: no column 'text'; columns there: body"),
        ("x.parquet", b"PAR1xxxxPAR1", "x.parquet, row 1 or after: cannot be read"),
        ("x.arrow", bytes(64), "x.arrow, row 1 or after: cannot be read"),
        ("x.fasta", b"\nMKT\n>a b\n", "x.fasta, line 2: a sequence without a header"),
        ("x.fa", b">  \nMKT\n", "x.fa, line 1: a header without an id"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path)


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-7", "utf-16", "utf-16-le", "utf-32-be", "gb18030", "iso2022_jp_2"],
)
def test_lines_are_those_of_the_text_in_any_encoding(tmp_path, encoding):
    file = tmp_path / "x.jsonl"
    expected = [("x.jsonl:1", "first é"), ("x.jsonl:2", "second ア")]
    file.write_bytes(LINES.encode(encoding))
    assert read(file, f"corpus.encoding={encoding}") == expected
    file.write_bytes((LINES + "{").encode(encoding))
    assert "x.jsonl, line 3: not JSON" in refused(file, f"corpus.encoding={encoding}")
    file.write_bytes(LINES.encode(encoding) + b"\xff\xff\xff")
    assert f"x.jsonl, line 3: not {encoding}" in refused(file, f"corpus.encoding={encoding}")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    for encoding in ("utf-8", "utf-16-le", "utf-32-be"):
        (tmp_path / "a.txt").write_bytes("\ufeffhello \ufeff".encode(encoding))
        (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "x"}'.encode(encoding))
        (tmp_path / "c.csv").write_bytes("\ufefftext\r\ny".encode(encoding))
        assert [text for _, text in read(tmp_path, f"corpus.encoding={encoding}")] == [
            "hello \ufeff",
            "x",
            "y",
        ]


def test_utf_16_without_its_mark_is_refused_with_both_choices(tmp_path):
    (tmp_path / "a.txt").write_bytes("hello".encode("utf-16-le"))
    assert "utf-16-le or utf-16-be" in refused(tmp_path, "corpus.encoding=utf-16")
    assert read(tmp_path, "corpus.encoding=utf-16-le") == [("a.txt", "hello")]


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "hex", "undefined", "idna"])
def test_what_is_no_encoding_of_texts_is_refused(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes(b"x")
    assert encoding in refused(tmp_path, f"corpus.encoding={encoding}")


def test_json_lines_hold_any_json_and_end_as_lines_end(tmp_path):
    texts = ['quote " and \\ and \u2028 and \x85 and 🧵', "\0", "a\r\nb", "x" * 10**6]
    for end in ("\n", "\r\n", "\r"):
        for ascii_only in (True, False):
            lines = [json.dumps({"text": t}, ensure_ascii=ascii_only) for t in texts]
            (tmp_path / "x.jsonl").write_bytes(end.join(lines).encode())
            expected = [(f"x.jsonl:{n}", t) for n, t in enumerate(texts, start=1)]
            assert read(tmp_path) == expected


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_are_read_as_pandas_wrote_them(tmp_path, suffix):
    rows = {"id": ["a", "b", "c"], "body": ['two\nlines, "quoted"\t', "é" * 200_000, "plain"]}
    table = pandas.DataFrame(rows)
    separator = "," if suffix == ".csv" else "\t"
    table.to_csv(tmp_path / f"x{suffix}", sep=separator, index=False, encoding="utf-16")
    requested = "corpus.encoding=utf-16 corpus.column=body"
    assert read(tmp_path, f"{requested} corpus.id_column=id") == list(
        zip(rows["id"], rows["body"], strict=True)
    )
    assert [i for i, _ in read(tmp_path, requested)] == [f"x{suffix}:{line}" for line in (2, 4, 5)]


def test_hidden_files_and_what_is_no_file_are_left_out_and_counted(tmp_path, caplog):
    root = tmp_path / ".own"  # the folder that was asked for may be hidden itself
    for name in ("a.txt", "._a.txt", ".git/b.txt", "c/.ipynb_checkpoints/c.txt", "x.txt/d.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "figure.png").write_bytes(b"\x89")
    os.mkfifo(root / "pipe.txt")
    (root / "loop").symlink_to(root)
    (root / "link.txt").symlink_to(root / "a.txt")
    assert [i for i, _ in read(root)] == ["a.txt", "link.txt", "x.txt/d.md"]
    (message,) = [r.getMessage() for r in caplog.records]
    for words in ("3 hidden", "1 links to folders", "1 of other kinds", "1 pipes or devices"):
        assert words in message
    assert read(root / "._a.txt") == [("._a.txt", "._a.txt")]


def test_a_link_to_no_file_and_a_name_not_in_utf_8_are_refused(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    assert "a.txt is a link to no file" in refused(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "e\udc80.txt").write_text("x")
    assert "the file name e\\udc80.txt is not UTF-8" in refused(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(LINES)
    config = a_config("any/model", f"corpus=text corpus.path={file}").corpus
    found = documents.read_documents(config)
    next(found)
    with file.open("a") as more:
        more.write(LINES)
    with pytest.raises(CorpusError, match=r"x\.jsonl: changed while it was read"):
        list(found)


@pytest.mark.parametrize("encoding", ["punycode", "unicode_escape", "raw_unicode_escape", "base64"])
def test_codecs_that_are_no_encodings_are_refused(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes(b"x")
    assert "knows no encoding" in refused(tmp_path, f"corpus.encoding={encoding}")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv"])
def test_a_sparse_file_of_terabytes_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr(rows, "MAX_TEXT", 1 << 20)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 42)
    said = refused(tmp_path)
    assert name in said
    assert "a document of more than" in said or "not utf-8 (byte 0x00" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "é" * 1001),
        ("x.jsonl", '{"text": "a"}\n{"text": "' + "é" * 1001 + '"}\n'),
        ("x.csv", "text\na\n" + "é" * 1001 + "\n"),
        ("x.csv", 'text\n"' + "é\n" * 1100 + '"\n'),
        ("x.jsonl", '{"text": "' + "\\u00e9" * 999 + '"}\n'),
    ],
)
def test_a_document_longer_than_the_limit_is_refused_with_its_place(
    tmp_path, monkeypatch, name, content
):
    monkeypatch.setattr(rows, "MAX_TEXT", 1000)
    (tmp_path / name).write_text(content)
    said = refused(tmp_path)
    assert name in said
    assert "a document of more than 1,000 characters; split it" in said


def test_a_folder_of_too_much_else_ends_the_search(tmp_path, monkeypatch, caplog):
    for number in range(30):
        (tmp_path / f"folder{number}").mkdir()
        (tmp_path / f"folder{number}/x.txt").write_text("x")
    assert len(read(tmp_path)) == 30
    monkeypatch.setattr(text_files, "_SECONDS_BETWEEN_COUNTS", 0.0)
    read(tmp_path)
    assert "others seen, now in" in caplog.text
    monkeypatch.setattr(text_files, "MOST_OTHERS", 20)
    assert "more than 20 folders and files of other kinds" in refused(tmp_path)
    monkeypatch.setattr(text_files, "MOST_OTHERS", 100)
    monkeypatch.setattr(text_files, "MOST_TEXTS", 20)
    assert "20 texts; give a folder of texts alone" in refused(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become nobody")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_without_permission_is_one_line(mode):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = Path(folder, "closed")
        closed.mkdir()
        (closed / "x.txt").write_text("x")
        closed.chmod(mode)
        os.seteuid(65534)
        try:
            said = refused(Path(folder))
        finally:
            os.seteuid(0)
    assert "Permission denied" in said
