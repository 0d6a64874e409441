"""What several jobs tokenise is the `tokens.h5` of one job, and so are its errors."""

import gzip
import io
import json
import random
from itertools import accumulate
from pathlib import Path

import h5py
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from model_folders import byte_tokenizer
from support import a_config, build_tiny
from theloom.corpus.formats import shares
from theloom.corpus.in_parts.gather import gather
from theloom.corpus.in_parts.part import tokenize_part
from theloom.corpus.tokens import tokenize
from theloom.errors import CorpusError
from transformers import BertTokenizerFast

OF_A_JOB = ("tokenize_jobs", "read_by_one")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("model") / "m", vocab_size=320)
    byte_tokenizer(folder)
    return folder


def content(file):
    """Everything in a file: attributes, and datasets with their types."""
    found = {}
    with h5py.File(file) as opened:
        found |= {f"@{name}": str(v) for name, v in opened.attrs.items() if name not in OF_A_JOB}
        opened.visititems(
            lambda name, item: found.update(
                {name: (item.dtype.str, item.shape, item[()].tobytes())}
                if isinstance(item, h5py.Dataset)
                else {}
            )
        )
    return found


def in_parts(config, folder, count):
    folder.mkdir(exist_ok=True)
    parts = [folder / f"{n}-of-{count}.h5" for n in range(count)]
    for number, path in enumerate(parts):
        tokenize_part(config, number, count, path)
    gather(config, parts, folder / f"tokens{count}.h5")
    return folder / f"tokens{count}.h5"


def outcome(make, *arguments):
    try:
        return content(make(*arguments))
    except CorpusError as error:
        return str(error)


def alone(config, output):
    tokenize(config, output)
    return output


def compare(model, path, tmp_path, requested="", counts=(1, 2, 7), shards=3):
    config = a_config(
        model, f"corpus=text corpus.path={path} extraction.shards={shards} {requested}"
    )
    right = outcome(alone, config, tmp_path / "one.h5")
    for count in counts:
        same(outcome(in_parts, config, tmp_path / "parts", count), right)
    return right


def same(found, right):
    """They are equal; else what differs is told."""
    if isinstance(right, str) or isinstance(found, str):
        assert found == right
    else:
        assert {k: (found.get(k), v) for k, v in right.items() if found.get(k) != v} == {}
        assert found.keys() == right.keys()


def lines(folder, name, rows, newline="\n"):
    folder.mkdir(exist_ok=True)
    text = newline.join(json.dumps(row, ensure_ascii=False) if row else "" for row in rows)
    (folder / name).write_bytes(text.encode())
    return folder / name


ROWS = [
    {"text": "é" * (n % 7) + f" {n}" * (n % 5), "key": f"k{n % 25}", "n": n} if n % 9 else None
    for n in range(50)
]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_of_json(model, tmp_path, newline):
    path = lines(tmp_path, "x.jsonl", ROWS, newline)
    right = compare(
        model, path, tmp_path, "corpus.columns=[n,key]", (1, 2, 7) if newline != "\n" else (2, 40)
    )
    assert right["@empty_documents"] != "0"


def test_lines_and_their_ends_are_those_of_python():
    chance = random.Random(0)
    for mark in (b"", b">"):
        for _ in range(300):
            data = bytes(chance.choice(b"\n\r>a") for _ in range(chance.randrange(30)))
            text = io.TextIOWrapper(io.BytesIO(data), "latin-1", newline="")
            begins = list(accumulate(map(len, text), initial=0))  # \r\n is one line's end
            starts = [0] + [b for b in begins[1:] if data.startswith(mark, b)]
            for at in range(len(data) + 1):
                right = next((b for b in starts if b >= at), len(data))
                assert shares.line_start(io.BytesIO(data), at, mark) == right, (data, at)
            for number, begin in enumerate(begins):
                if begin < len(data):
                    assert shares.lines_before(io.BytesIO(data), begin) == number, data


def test_pieces_that_end_anywhere_change_no_line(monkeypatch):
    data = b"a\r\n>b\r>c\n\r\n>\r\n" * 2

    def found():
        whole = io.BytesIO(data)
        starts = [[shares.line_start(whole, at, m) for at in range(40)] for m in (b"", b">")]
        return starts, [shares.lines_before(whole, at) for at in starts[0]]

    right = found()
    for size in range(1, 9):
        monkeypatch.setattr(shares, "_PIECE", size)
        assert found() == right, size


@pytest.mark.parametrize(
    ("encoding", "requested"),
    [("utf-8-sig", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("latin-1",) * 2],
)
def test_encodings_and_byte_order_marks(model, tmp_path, encoding, requested):
    rows = [{"text": "éü" * n} for n in range(9)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_bytes(text.encode(encoding))
    compare(model, tmp_path / "x.jsonl", tmp_path, f"corpus.encoding={requested}", (4,))


def test_a_folder_of_every_format(model, tmp_path):
    folder = tmp_path / "texts"
    table = {"text": [f"ü{n} " * (n % 5) for n in range(40)], "n": [*range(40)]}
    rows = [{"text": t, "n": n} for t, n in zip(*table.values(), strict=True)]
    packed = "\n".join(map(json.dumps, rows)).encode()
    lines(folder, "a.jsonl", rows[:9])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(packed))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(packed))
    (folder / "d.json").write_text(json.dumps(rows, indent=1))
    quoted = "\n".join(f'"say ""{n}""\n\nand {n}",{n}' for n in range(30))
    (folder / "e.csv").write_text(f"text,n\n{quoted}\n")
    (folder / "f.tsv").write_text("text\tn\none\t1\n\t2\n")
    made = pa.table(table)
    pyarrow.parquet.write_table(made, folder / "g.parquet", row_group_size=7)
    pyarrow.parquet.write_table(made.slice(0, 0), folder / "h.parquet")
    with pa.OSFile(str(folder / "i.arrow"), "wb") as out, pa.ipc.new_file(out, made.schema) as to:
        to.write_table(made)
    right = compare(model, folder, tmp_path, "corpus.columns=[n]", (2, 13))
    assert right["documents/offset"][1] == (199,)


def test_a_folder_of_whole_texts(model, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, text in enumerate(["one", "", "three " * 50, "four", "", "x"]):
        (folder / f"{n}.{'md' if n % 2 else 'txt'}").write_text(text)
    (folder / "7.jsonl").touch()
    right = compare(model, folder, tmp_path, "corpus.context_length=40")
    assert right["@empty_documents"] == "2"


def test_a_document_longer_than_all_parts(model, tmp_path):
    rows = [{"text": "one"}, {"text": "é" * 9_000}, {"text": "two"}, {"text": "three"}]
    path = lines(tmp_path, "x.jsonl", rows)
    compare(model, path, tmp_path, counts=(3,))


def words_of_letters(folder):
    """A tokenizer as ProtBert's: letters are words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWX"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    made = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False)
    made.save_pretrained(folder)


def test_sequences_of_fasta(tmp_path):
    model = build_tiny("llama", tmp_path / "model", vocab_size=40)
    words_of_letters(model)
    records = [f">p{n % 12} text\nMKTAY\n{'iakq' * n}\n\n" for n in range(15)]
    (tmp_path / "x.fasta").write_text("\n" + "".join(records))
    requested = "corpus.columns=[description]"
    assert "names two documents 'p0'" in compare(model, tmp_path / "x.fasta", tmp_path, requested)
    right = compare(
        model, tmp_path / "x.fasta", tmp_path, f"{requested} corpus.duplicate_ids=number"
    )
    assert b"p2#2" in right["documents/id"][2]


@pytest.mark.parametrize("tokens", [1, 40, 41, 150, 155, 540])
def test_the_cut_at_max_tokens_in_any_part(model, tmp_path, tokens):
    path = lines(tmp_path, "x.jsonl", ROWS)
    requested = f"corpus.max_tokens={tokens} 'rows.keep=last(2)' corpus.columns=[key]"
    right = compare(model, path, tmp_path, requested, (5,))
    assert right["tokens/input_ids"][1] == (tokens,)


@pytest.mark.parametrize("documents", [1, 20, 44, 45])
def test_max_documents_in_any_part(model, tmp_path, documents):
    path = lines(tmp_path, "x.jsonl", ROWS)
    compare(model, path, tmp_path, f"corpus.max_documents={documents}", (5,))


@pytest.mark.parametrize(
    "requested", ["rows.pool=mean", "'rows.keep=[2:5]&~special'", r"rows.keep=match\(\"2+\"\)"]
)
def test_rows_that_are_kept(model, tmp_path, caplog, requested):
    path = lines(tmp_path, "x.jsonl", ROWS)
    right = compare(model, path, tmp_path, requested, (4,))
    assert int(right["@rows"]) > 10
    warned = [m for m in caplog.messages if "documents keep no row" in m]
    assert len({*warned}) == len(warned) / 2


@pytest.mark.parametrize("wrong", ['{"text": "\udcff"}', '{"text": 7}', "{", '{"text": "a\0"}'])
def test_an_error_in_a_late_part_names_the_same_line(model, tmp_path, wrong):
    path = lines(tmp_path, "x.jsonl", ROWS)
    written = path.read_bytes().splitlines()
    written[43] = wrong.encode(errors="surrogateescape")
    path.write_bytes(b"\n".join(written))
    for requested in ("", "corpus.max_tokens=5000"):
        assert "line 44" in compare(model, path, tmp_path, requested, (4,))
    # the corpus ends before it
    assert isinstance(compare(model, path, tmp_path, "corpus.max_tokens=300", (4,)), dict)


def test_ids_that_are_there_in_two_parts(model, tmp_path):
    path = lines(tmp_path, "x.jsonl", ROWS)
    requested = "corpus.id_column=key"
    said = compare(model, path, tmp_path, requested, (2, 7))
    assert "(x.jsonl, line 2, and x.jsonl, line 27)" in said
    right = compare(model, path, tmp_path, f"{requested} corpus.duplicate_ids=number", (2, 7))
    assert b"k1#2" in right["documents/id"][2]
    compare(model, path, tmp_path, f"{requested} corpus.max_documents=25", (3,))


VALUES = {
    "integers": [1, None, -3, 2**62],
    "numbers": [1, 2.5, None, float("nan")],
    "truths": [True, False, None, True],
    "texts": ["é", "", None, "7"],
    "objects": [[1, {"a": None}], None, {"b": [0.1]}, []],
    "nothing": [None] * 4,
}


def test_values_of_columns_of_every_type(model, tmp_path):
    rows = [
        {"text": f"{n}", **{name: values[n % 4] for name, values in VALUES.items()}}
        for n in range(16)
    ]
    path = lines(tmp_path, "x.jsonl", rows)
    compare(model, path, tmp_path, f"corpus.columns=[{','.join(VALUES)}]", (2, 5))


def test_categories_are_numbered_as_they_come(model, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, names in enumerate([["b", "a"], ["a", "c"], ["d", "b"]]):
        label = pa.DictionaryArray.from_arrays([0, 1, None], names)
        made = pa.table({"text": ["x", "y", "z"], "label": label})
        pyarrow.parquet.write_table(made, folder / f"{n}.parquet")
    right = compare(model, folder, tmp_path, "corpus.columns=[label]", (3,))
    assert right["documents/categories/label"][2] == b"bacd"
    compare(model, folder, tmp_path, "corpus.columns=[label] corpus.max_documents=4", (3,))


def test_types_that_do_not_mix_are_told_of_the_first_places(model, tmp_path):
    rows = [{"text": "x", "a": n, "b": n if n < 9 else "nine"} for n in range(12)]
    path = lines(tmp_path, "x.jsonl", rows)
    said = compare(model, path, tmp_path, "corpus.columns=[a,b]", (3, 5))
    assert "line 10: column 'b' is of mixed types: a text here, an integer before" in said
    assert "line 1)" in said


def test_tables_of_texts_alone_are_typed_over_all_parts(model, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, value in enumerate(["1", "2", "", "x3"]):
        (folder / f"{n}.csv").write_text(f"text,value\nsome,{value}\n")
    compare(model, folder, tmp_path, "corpus.columns=[value]", (3,))
    (folder / "3.csv").unlink()
    right = compare(model, folder, tmp_path, "corpus.columns=[value]", (2,))
    assert '"integer"' in right["@columns"]


def test_token_ids_and_conversations(model, tmp_path):
    rows = [{"ids": [n, 1, 7][: n % 4], "talk": talk(n)} for n in range(12)]
    path = lines(tmp_path, "x.jsonl", rows)
    compare(model, path, tmp_path, "corpus.input_ids=ids", (3,))
    template = Path(__file__).parent / "templates/generation.jinja"
    requested = f"corpus.messages=talk corpus.chat_template={template}"
    right = compare(model, path, tmp_path, f"{requested} rows.keep=assistant", (3,))
    assert "tokens/role" in right


def talk(n):
    return [
        {"role": "user", "content": "Hi " * n},
        {"role": "assistant", "content": f"number {n}"},
    ]


def test_the_first_texts_decide_of_class_and_file(tmp_path, caplog):
    """A tokenizer whose file gives other ids than its class for one text among the first."""
    model = build_tiny("llama", tmp_path / "model", vocab_size=320)
    byte_tokenizer(model)
    file = model / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    other = tmp_path / "other"
    byte_tokenizer(other)
    file.write_text(json.dumps(changed))
    (tmp_path / "x").mkdir()
    path = lines(tmp_path / "x", "x.jsonl", [{"text": "a" * n} for n in range(9)])
    compare(model, path, tmp_path, "corpus.tokenizer_from=file", (4,))


def test_a_text_that_begins_with_a_bos_is_counted_once(model, tmp_path):
    rows = [{"text": "<s> one" if n % 3 else "two"} for n in range(12)]
    path = lines(tmp_path, "x.jsonl", rows)
    assert compare(model, path, tmp_path, "", (5,))["@double_bos_documents"] == "8"
    right = compare(model, path, tmp_path, "corpus.max_documents=7", (5,))
    assert right["@double_bos_documents"] == "4"


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl.gz", "x16.jsonl"])
def test_what_is_read_from_front_to_back_is_one_job_s(model, tmp_path, caplog, name):
    caplog.set_level("INFO")
    text = '{"text": "one"}\n'.encode("utf-16" if "16" in name else "utf-8")
    whole = {"x.csv": b"text\none\n", "x.jsonl.gz": gzip.compress(text)}.get(name, text)
    (tmp_path / name).write_bytes(whole)
    encoding = "corpus.encoding=utf-16" if "16" in name else ""
    compare(model, tmp_path / name, tmp_path, encoding, (2,))
    with h5py.File(tmp_path / "parts/tokens2.h5") as file:
        assert file.attrs["read_by_one"] == f"{name} is read from front to back"
        assert file.attrs["tokenize_jobs"] == 1
    assert f"one job reads all of the corpus: {name} is read" in caplog.text


def test_a_corpus_that_changes_between_the_jobs_is_refused(model, tmp_path):
    path = lines(tmp_path, "x.jsonl", ROWS)
    config = a_config(model, f"corpus=text corpus.path={path} corpus.max_tokens=9000")
    parts = [tmp_path / f"{n}.h5" for n in range(2)]
    tokenize_part(config, 0, 2, parts[0])
    lines(tmp_path, "x.jsonl", ROWS[1:])
    tokenize_part(config, 1, 2, parts[1])
    with pytest.raises(CorpusError, match="has changed since jobs tokenised parts of it"):
        gather(config, parts, tmp_path / "tokens.h5")
    assert not any(part.exists() for part in parts)
    assert not (tmp_path / "tokens.h5").exists()


def test_a_corpus_without_tokens_is_refused(model, tmp_path):
    path = lines(tmp_path, "x.jsonl", [{"text": ""}] * 5)
    assert "5 documents read, all empty" in compare(model, path, tmp_path, "", (3,))


def test_rows_of_a_data_set(model, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_dict({"text": [f"{n} " * (n % 3) for n in range(20)]})
    made.save_to_disk(tmp_path / "saved")
    config = a_config(model, f"corpus=hub corpus.dataset={tmp_path}/saved")
    right = outcome(alone, config, tmp_path / "one.h5")
    for count in (3, 23):
        same(outcome(in_parts, config, tmp_path / "parts", count), right)
