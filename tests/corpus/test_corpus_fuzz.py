"""Corpora of random files: a run has the documents that plain Python reads, or ends on one line."""

import csv
import io
import json
import os
import random
import re
from pathlib import Path

import h5py
import pytest
import xxhash
from corpus_support import BYTES, byte_tokenizer
from support import build_tiny, stages
from theloom.corpus import tokens
from theloom.errors import TheLoomError
from transformers import AutoTokenizer

SEEDS = 3000 if "LONG_TESTS" in os.environ else 60
ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-32-be", "latin-1", "shift_jis", "gb18030")
CHARACTERS = [
    "a",
    "b ",
    '"',
    ",",
    "\t",
    "\\",
    "é",
    "ア",
    "🧵",
    "\u2028",
    "\x85",
    "\ufeff",
    "'",
    "{",
]
VALUES = [None, 3, 1.5, True, [], ["a"], {"text": "in"}, float("nan"), 10**30]


def a_text(rng: random.Random, lines: bool = False) -> str:
    chosen = CHARACTERS + ["\n", "\r\n", "\r"] * lines
    return "".join(rng.choices(chosen, k=rng.randrange(12)))


def a_line(rng: random.Random) -> str:
    row = {"text": a_text(rng, lines=True), "key": rng.choice(VALUES)}
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.9:
        return line
    return rng.choice(
        [
            "",
            " ",
            "[1]",
            '{"text": "a", "text": "b"}',
            '{"text": "\\ud800"}',
            json.dumps({"text": rng.choice(VALUES)}),
            json.dumps({"other": "a"}),
            '{"text": "x", "key": ' + "[" * 5000,
            line[: rng.randrange(len(line))],
            "9" * 5000,
        ]
    )


def a_file(rng: random.Random, suffix: str, encoding: str) -> bytes:
    if suffix == ".txt":
        text = a_text(rng, lines=True)
    elif suffix == ".jsonl":
        text = rng.choice(["\n", "\r\n", "\r"]).join(a_line(rng) for _ in range(rng.randrange(5)))
    else:
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["id", "text"])
        writer.writerows([n, a_text(rng, lines=True)] for n in range(rng.randrange(4)))
        text = table.getvalue()
    raw = ("\ufeff" * (rng.random() < 0.2 and encoding != "utf-16") + text).encode(
        encoding, "ignore"
    )
    if rng.random() < 0.2:
        raw = raw[: rng.randrange(len(raw) + 1)] + rng.randbytes(rng.randrange(4))
    return rng.randbytes(rng.randrange(40)) if rng.random() < 0.05 else raw


def read_plainly(file: Path, name: str, encoding: str) -> list[tuple[str, str]]:
    """The documents of a file as plain Python reads them. Raises ValueError where one is not
    whole.
    """
    raw = file.read_bytes()
    if encoding == "utf-16" and raw and raw[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("no byte order mark")
    text = raw.decode(encoding)
    if encoding != "utf-16":
        text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError("of another encoding")
    if file.suffix == ".txt":
        return [(name, text)]
    if file.suffix == ".csv":
        with io.StringIO(text, newline="") as lines:
            reader, found, line = csv.DictReader(lines, strict=True), [], 1
            if reader.fieldnames is None:
                return []
            if reader.fieldnames.count("text") != 1:
                raise ValueError("no column, or two")
            for fields in reader:
                found.append((f"{name}:{line + 1}", fields["text"]))
                line = reader.line_num
                if None in fields or None in fields.values():
                    raise ValueError("uneven")
        return found
    found = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if line.strip():
            if [key for key, _ in json.loads(line, object_pairs_hook=list)].count("text") > 1:
                raise ValueError("the column twice")
            text = json.loads(line)["text"]
            found.append((f"{name}:{number}", "" if text is None else text))
    if not all(isinstance(text, str) for _, text in found):
        raise ValueError("no text")
    for _, text in found:
        text.encode()  # UnicodeEncodeError is a ValueError
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny("llama", tmp_path_factory.mktemp("fuzz") / "model", vocab_size=BYTES)
    byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_random_files_are_read_as_python_reads_them_or_refused(tmp_path, model, encoding):
    folder = tmp_path / "texts"
    folder.mkdir()
    config = stages(
        tmp_path / "run",
        model,
        f"corpus=text corpus.path={folder} corpus.encoding={encoding} corpus.max_tokens=null",
    ).config("tokens")
    tokenizer = AutoTokenizer.from_pretrained(model)
    outcomes = {"read": 0, "refused": 0}
    for seed in range(SEEDS):
        rng = random.Random(f"{encoding} {seed}")
        for file in folder.iterdir():
            file.unlink()
        for number in range(rng.randrange(1, 4)):
            suffix = rng.choice([".txt", ".jsonl", ".jsonl", ".csv"])
            (folder / f"{number}{suffix}").write_bytes(a_file(rng, suffix, encoding))
        try:
            expected = [
                document
                for file in sorted(folder.iterdir())
                for document in read_plainly(file, file.name, encoding)
                if document[1]
            ]
        except (ValueError, KeyError, TypeError, csv.Error, RecursionError):
            expected = []
        output = tmp_path / "tokens.h5"
        if expected:
            tokens.tokenize(config, output)
            with h5py.File(output) as file:
                assert [i.decode() for i in file["documents/id"][:]] == [i for i, _ in expected]
                assert [h.decode() for h in file["documents/text_hash"][:]] == [
                    xxhash.xxh3_128_hexdigest(text.encode()) for _, text in expected
                ]
                assert file["tokens/input_ids"][:].tolist() == [
                    token for _, text in expected for token in tokenizer(text)["input_ids"]
                ]
            outcomes["read"] += 1
        else:
            with pytest.raises(TheLoomError) as caught:
                tokens.tokenize(config, output)
            assert str(caught.value).isprintable(), (seed, str(caught.value))
            outcomes["refused"] += 1
    assert min(outcomes.values()) > SEEDS / 10, outcomes
