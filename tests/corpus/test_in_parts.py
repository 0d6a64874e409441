"""What several jobs tokenise is the `tokens.h5` of one job, and so are its errors."""

import json

import h5py
import pytest
from support import a_config, build_tiny
from model_folders import byte_tokenizer
from theloom.corpus.in_parts.gather import gather
from theloom.corpus.in_parts.part import tokenize_part
from theloom.corpus.tokens import tokenize
from theloom.errors import CorpusError

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
        assert outcome(in_parts, config, tmp_path / "parts", count) == right, count
    return right


def lines(folder, name, rows, newline="\n"):
    folder.mkdir(exist_ok=True)
    text = newline.join(json.dumps(row, ensure_ascii=False) if row else "" for row in rows)
    (folder / name).write_bytes(text.encode())
    return folder / name


ROWS = [
    {"text": "é" * (n % 7) + f" {n}" * (n % 5), "key": f"k{n % 30}", "n": n} if n % 9 else None
    for n in range(60)
]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_of_json(model, tmp_path, newline):
    path = lines(tmp_path, "x.jsonl", ROWS, newline)
    right = compare(model, path, tmp_path, "corpus.columns=[n,key]", (1, 2, 7, 100))
    assert right["@empty_documents"] != "0"
