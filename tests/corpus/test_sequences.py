"""Corpora that are no texts: sequences of FASTA, and token ids."""

import gzip
import json
import sys

import h5py
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
import theloom
import zstandard
from support import a_config, build_tiny, stages, with_bytes
from theloom.corpus import documents, rows, tokens
from theloom.corpus.formats import arrow_files, decoding
from theloom.errors import ConfigError, CorpusError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

LETTERS = "LAGVESIKRDTPNQFYMHCWX"
FASTA = """>sp|P1|ONE first protein, of é
MKTAYIAK
QRUZO
>P2
\tMK

>P3 empty
"""


def words_of_letters(folder):
    """A tokenizer as ProtBert's: letters are words, and what is no letter of it is unknown."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    made = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False)
    made.save_pretrained(folder)
    return made


def characters(folder):
    """A tokenizer as ESM's: each letter is a token, without spaces."""
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<cls>", *LETTERS, "U", "Z", "O"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", cls_token="<cls>")
    made.save_pretrained(folder)
    return made


@pytest.fixture
def proteins(tmp_path):
    model = build_tiny("llama", tmp_path / "model", vocab_size=40)
    (tmp_path / "x.fasta").write_text(FASTA)
    return model


def tokenized(folder, model, overrides):
    run = stages(folder / "run", model, overrides)
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    return h5py.File(run.folder / "tokens.h5")


@pytest.mark.parametrize("kind", [words_of_letters, characters])
def test_a_sequence_is_as_the_tokenizer_wants_it(tmp_path, proteins, caplog, kind):
    caplog.set_level("INFO")
    tokenizer = kind(proteins)
    requested = f"corpus=text corpus.path={tmp_path}/x.fasta corpus.columns=[description]"
    spaced = kind is words_of_letters
    sequences = ["MKTAYIAKQRUZO", "MK"]
    texts = [" ".join(s.replace("U", "X").replace("Z", "X").replace("O", "X")) for s in sequences]
    expected = [tokenizer(t)["input_ids"] for t in (texts if spaced else sequences)]
    with tokenized(tmp_path, proteins, requested) as file:
        assert file["tokens/input_ids"][:].tolist() == [i for ids in expected for i in ids]
        assert file["documents/id"][:].tolist() == [b"sp|P1|ONE", b"P2"]
        found = file["documents/columns/description"][:].tolist()
        assert [v.decode() for v in found] == ["first protein, of é", ""]
        assert file.attrs["empty_documents"] == 1
        starts, ends = file["tokens/char_start"][:], file["tokens/char_end"][:]
        letters = starts >= 0
        assert starts[letters].tolist() == [*range(13), *range(2)]
        assert (ends - starts)[letters].tolist() == [1] * 15
    said = "U, Z and O become X" in caplog.text
    assert said == spaced


@pytest.mark.parametrize("kind", [words_of_letters, characters])
def test_masked_regions_in_lower_case_are_taken_in_upper(tmp_path, proteins, caplog, kind):
    caplog.set_level("INFO")
    tokenizer = kind(proteins)
    (tmp_path / "x.fasta").write_text(">a\nmktAYIa\n>b\nMK\nuT\n")
    spaced = kind is words_of_letters
    texts = [" ".join(s) if spaced else s for s in ("MKTAYIA", "MKXT" if spaced else "MKUT")]
    expected = [i for t in texts for i in tokenizer(t)["input_ids"]]
    with tokenized(tmp_path, proteins, f"corpus=text corpus.path={tmp_path}/x.fasta") as file:
        assert file["tokens/input_ids"][:].tolist() == expected
        starts = file["tokens/char_start"][:]
        assert starts[starts >= 0].tolist() == [*range(7), *range(4)]
    assert caplog.text.count("those of masked regions are taken in upper case") == 1


@pytest.mark.parametrize("kind", [words_of_letters, characters])
@pytest.mark.parametrize("wrong", ["J", "-", "é", "j"])
def test_a_letter_that_the_tokenizer_lacks_is_refused(tmp_path, proteins, kind, wrong):
    kind(proteins)
    (tmp_path / "x.fasta").write_text(f">a\nMKT\n>b\nMK{wrong}T\n")
    with pytest.raises(CorpusError, match=rf"x\.fasta, line 3: the tokenizer has no {wrong} of"):
        tokenized(tmp_path, proteins, f"corpus=text corpus.path={tmp_path}/x.fasta")


def test_ids_of_fasta_differ_or_are_numbered(tmp_path, proteins):
    characters(proteins)
    (tmp_path / "x.fasta").write_text(">a\nM\n>a\nK\n")
    requested = f"corpus=text corpus.path={tmp_path}/x.fasta"
    with pytest.raises(CorpusError, match=r"names two documents 'a' \(x.fasta, line 1, and x.fas"):
        tokenized(tmp_path, proteins, requested)
    with tokenized(tmp_path, proteins, f"{requested} corpus.duplicate_ids=number") as file:
        assert file["documents/id"][:].tolist() == [b"a", b"a#2"]


IDS = [[5, 6, 7], [], [1], None, [127] * 9]


def write_ids(path, lists):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"tokens": r}) for r in lists))
    elif path.suffix == ".csv":
        cells = ["" if r is None else json.dumps(r) for r in lists]
        pandas.DataFrame({"n": range(len(lists)), "tokens": cells}).to_csv(path, index=False)
    else:
        pyarrow.parquet.write_table(
            pa.table({"tokens": pa.array(lists, pa.list_(pa.int32()))}), path
        )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_token_ids_are_taken_as_they_are(tmp_path, suffix):
    model = build_tiny("llama", tmp_path / "model", vocab_size=128)  # it has no tokenizer
    write_ids(tmp_path / f"x{suffix}", IDS)
    requested = f"corpus=text corpus.path={tmp_path}/x{suffix} corpus.input_ids=tokens"
    run = stages(tmp_path / "run", model, requested).all()
    run.verify()
    acts = theloom.open(run.activations)
    assert acts.input_ids.numpy(...).tolist() == [5, 6, 7, 1, *[127] * 9]
    assert acts.attributes["empty_documents"] == 2
    assert acts.token_table("special") is None
    assert acts.attributes["characters"].startswith("none")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, 128], "the token id 128 of corpus.input_ids is beyond the embedding"),
        ([-1], "corpus.input_ids gives -1, which is no token id"),
        ([1, True], "gives True, which is no token id"),
        ([1.5], "gives 1.5, which"),
        ([[1]], "which is no token id"),
        ("a", "column 'tokens' is a text, not a list of token ids"),
        (7, "column 'tokens' is a number, not a list of token ids"),
    ],
)
def test_what_is_no_token_id_is_refused(tmp_path, row, words):
    model = with_bytes(build_tiny("llama", tmp_path / "model", vocab_size=128))
    (tmp_path / "x.jsonl").write_text(json.dumps({"tokens": row}))
    with pytest.raises(CorpusError, match=words.replace(".", r"\.")):
        tokenized(
            tmp_path, model, f"corpus=text corpus.path={tmp_path}/x.jsonl corpus.input_ids=tokens"
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("corpus.input_ids=a corpus.messages=b", "either token ids or a conversation"),
        ("corpus.chat_template=x.jinja", "is for corpus.messages alone"),
        ("corpus.streaming=true", "is for corpus=hub alone"),
        ("corpus.columns=[a,b,a]", "'a' is there twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        stages(tmp_path / "run", "any/model", overrides)


def test_what_unpacks_to_a_bomb_is_refused(tmp_path, monkeypatch):
    model = with_bytes(build_tiny("llama", tmp_path / "model", vocab_size=256))
    monkeypatch.setattr(arrow_files, "_MOST_BYTES", 1 << 20)
    monkeypatch.setattr(rows, "MAX_TEXT", 1 << 16)
    zeros = b" " * (8 << 20)
    for name, raw in {
        "x.parquet.gz": gzip.compress(zeros),
        "x.arrow.zst": zstandard.ZstdCompressor().compress(zeros),
        "x.txt.gz": gzip.compress(zeros),
        "x.jsonl.zst": zstandard.ZstdCompressor().compress(zeros),
        "x.json.gz": gzip.compress(b'[{"text": "' + zeros + b'"}]'),
        "x.fa.gz": gzip.compress(b">a\n" + b"MK\n" * (1 << 20)),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(raw)
        with pytest.raises(CorpusError, match=r"unpacks to more than|a document of more than"):
            tokenized(folder, model, f"corpus=text corpus.path={folder}/{name}")
    assert decoding.kind_of("x.txt.gz") == ".txt"


def test_tables_that_need_a_missing_package_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    config = a_config("any/model", f"corpus=text corpus.path={tmp_path}").corpus
    with pytest.raises(CorpusError, match=r"x\.parquet needs the package pyarrow: pip install"):
        documents.check_local(config)
