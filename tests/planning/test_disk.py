"""Disk and time of sampled answers: what is planned against the files that a run leaves."""

import json
import logging

import pytest
from model_folders import byte_tokenizer
from support import ROOT, a_config, build_tiny, stages
from theloom.config import compose
from theloom.corpus import tokens
from theloom.errors import MemoryPlanError
from theloom.pipeline import resources
from theloom.planning import disk, estimate
from theloom.planning.estimates import estimate_file
from theloom.terminal import format_bytes

NEW, SAMPLES = 120, 3
TEXTS = ["why is it so", "a", "one day in the year", "x = 1"]
ASKED = (
    f"answers.source=model answers.max_new_tokens={NEW} answers.samples={SAMPLES} "
    "answers.temperature=1"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=320)
    byte_tokenizer(folder)
    return folder


def asked(folder, more=""):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    corpus = f"corpus=text corpus.path={folder}/rows.jsonl corpus.max_documents={len(TEXTS)}"
    return f"{corpus} {ASKED} extraction.shards=2 {more}"


def test_answers_take_about_the_disk_that_is_planned(model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sizes = sum(len(text) + 1 for text in TEXTS)  # bytes, and BOS
    run = stages(tmp_path / "run", model, asked(tmp_path, f"corpus.max_tokens={sizes}"))
    estimate.run_estimate(run.config("estimate"), run.folder / "estimate.h5")
    planned = estimate_file.read(run.folder / "estimate.h5")
    count = len(TEXTS) * SAMPLES
    assert planned.answers_tokens == count * NEW
    assert planned.answers_disk is not None
    assert f"{format_bytes(planned.answers_disk)} of disk" in caplog.text
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    run.answer()
    files = [run.documents, *run.folder.glob("answers/*.h5")]
    taken = sum(file.stat().st_size for file in files)
    # attributes and the metadata of HDF5 are of every file, whatever it holds
    empty = 40_000 * len(files)
    assert planned.answers_disk * 0.7 < taken < planned.answers_disk + empty


def test_the_rows_of_answers_are_counted_with_their_tables(model, tmp_path):
    more = "corpus.max_tokens=100 rows.keep=generated"
    config = a_config(model, asked(tmp_path, more))
    most = SAMPLES * 100 + len(TEXTS) * SAMPLES * NEW
    assert disk.most_tokens(config) == most
    plain = a_config(model, f"corpus=text corpus.path={tmp_path}/rows.jsonl rows.keep=last")
    assert disk.token_bytes(config) == disk.token_bytes(plain) + 2  # role and generated


def test_answers_without_a_bound_have_no_size(model, tmp_path):
    config = a_config(model, f"corpus=text corpus.path={tmp_path} {ASKED}")
    assert disk.most_sampled(config) is None
    assert disk.most_answers_bytes(config) is None


def test_sampling_jobs_request_what_their_answers_take(tmp_path):
    def of(more):
        (run,) = compose.runs(ROOT / "config", "7b", more).values()
        return resources.planned(run, tmp_path).config["resources"]

    source = "answers.source=model answers.max_new_tokens=200 corpus.max_tokens=100000"
    few, many = (of(f"{source} corpus.max_documents={n} extraction.shards=4") for n in (400, 40000))
    assert resources.STARTING < few["sample_runtime"] < many["sample_runtime"]
    assert 100 < few["sample_disk_mb"] < many["sample_disk_mb"]
    assert of(f"{source} corpus.max_documents=null")["sample_runtime"] == 240
    assert of(f"{source} resources.sample_runtime=7")["sample_runtime"] == 7


def test_output_that_does_not_fit_is_refused_in_one_line(tmp_path):
    disk.check_disk(tmp_path, 10, 10)
    with pytest.raises(MemoryPlanError, match="fewer tokens") as error:
        disk.check_disk(tmp_path, 11, 10)
    assert "\n" not in str(error.value)
