"""What the stage of tokens keeps: the tables of rows, documents without any, and bad requests."""

import json
import logging

import h5py
import pytest
from support import build_tiny, stages, with_bytes
from theloom.corpus import tokens
from theloom.errors import ConfigError, CorpusError
from theloom.planning import estimate
from theloom.planning.estimates import estimate_file

TEXTS = ["abc", "b", "cab", "xyz"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_bytes(build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=256))


@pytest.fixture
def made(model, tmp_path):
    """Gives `tokens.h5` of a request, and its run."""

    def tokenized(requested):
        corpus = tmp_path / "texts.jsonl"
        corpus.write_text("\n".join(json.dumps({"text": t, "at": "1:2"}) for t in TEXTS))
        run = stages(tmp_path, model, f"corpus=text corpus.path={corpus} {requested}")
        tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
        return run, h5py.File(tmp_path / "tokens.h5")

    return tokenized


@pytest.mark.parametrize(
    ("requested", "kept", "row_tokens"),
    [
        ("rows.keep=last", [0, 0, 1, 1, 0, 0, 1, 0, 0, 1], [2, 3, 6, 9]),
        ("rows.pool=mean", [1] * 10, [2, 3, 6, 9]),
        ("rows.pool=first", [1, 0, 0, 1, 1, 0, 0, 1, 0, 0], [0, 3, 4, 7]),
        ("rows.keep='~[:1]' rows.pool=last", [0, 0, 1, 0, 0, 0, 1, 0, 0, 1], [2, 6, 9]),
        ("rows.keep=span(at) corpus.columns=[at]", [0, 1, 0, 0, 0, 1, 0, 0, 1, 0], [1, 5, 8]),
        ("rows.keep=last corpus.max_tokens=6", [0, 0, 1, 1, 0, 1], [2, 3, 5]),  # cut, then kept
    ],
)
def test_the_tables_have_each_stored_row(made, requested, kept, row_tokens):
    _, file = made(requested)
    assert file["tokens/kept"][:].tolist() == kept
    assert file["rows/token"][:].tolist() == row_tokens
    assert file.attrs["rows"] == len(row_tokens)


def test_every_row_needs_no_tables(made):
    _, file = made("rows.keep=all")
    assert "rows" not in file
    assert "tokens/kept" not in file
    assert "rows_keep" not in file.attrs


def test_documents_that_keep_nothing_are_counted_and_named(made, caplog):
    caplog.set_level(logging.INFO)
    _, file = made("'rows.keep=match(\"a\")'")
    assert '2 of 4 documents keep no row by rows.keep=match("a")' in caplog.text
    assert file.attrs["documents_without_rows"] == 2
    assert "2 rows of 10 tokens are kept" in caplog.text


@pytest.mark.parametrize(
    ("requested", "error", "message"),
    [
        ("'rows.keep=match(\"q\")'", CorpusError, r"keeps no token of the 4 documents \(such as"),
        ("rows.keep=assistant", ConfigError, "the corpus has plain texts; set corpus.messages"),
        ("rows.pool=mean rows.by=message", CorpusError, "set corpus.messages"),
        ("rows.keep=span(to) corpus.columns=[at]", ConfigError, "corpus.columns has at; add it"),
        ("rows.by=message", ConfigError, "of use with rows.pool alone"),
        ("rows.keep=lest", ConfigError, "unknown word"),
    ],
)
def test_what_cannot_be_kept_ends_before_a_model_is_loaded(made, requested, error, message):
    with pytest.raises(error, match=message):
        made(requested)


@pytest.mark.parametrize(
    ("requested", "rows"),
    [
        ("rows.keep=last corpus.max_documents=3", 3),
        ("rows.keep='last(2)&~special' corpus.max_documents=3", 6),
        ("rows.pool=mean corpus.max_documents=3", 3),
        ("rows.keep=last corpus.max_documents=3000 corpus.max_tokens=2000", 2000),
        ("rows.keep='~special' corpus.max_documents=3 corpus.max_tokens=null", None),
    ],
)
def test_the_estimate_counts_stored_rows_alone(model, tmp_path, requested, rows):
    run = stages(tmp_path, model, f"corpus=text corpus.path={model} {requested}")
    estimate.run_estimate(run.config("estimate"), tmp_path / "estimate.h5")
    found = estimate_file.read(tmp_path / "estimate.h5")
    assert found.rows == rows
    least = None if rows is None else rows * found.row_bytes["fp32"] + found.table_bytes
    assert found.disk_bytes("fp32") == least
