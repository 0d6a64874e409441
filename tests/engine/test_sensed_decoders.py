"""Decoders of texts behind an encoder of audio, through the stages, against plain transformers."""

import json
import logging
import time

import h5py
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import theloom
import torch
from decoders_support import CONFIGS, SAMPLES, TEXTS, Plain, build, clip, write_table
from support import extract_one_shard, extract_with_small_commits, forked, stages
from theloom.cli.main import main
from theloom.corpus import tokens
from theloom.engine import resident
from theloom.engine.context import read_job
from theloom.errors import ConfigError, CorpusError, TheLoomError
from theloom.planning.forecast import forecast
from tokenizers import pre_tokenizers
from towers_support import build as build_tower
from transformers import WhisperTokenizer

VALUES = ("resid_pre", "resid_post", "cross_attn_out")
HOOKS = ",".join(f"decoder.blocks.*.hook_{value}" for value in VALUES)
HOOKS += ",decoder.ln_final.hook_out"
THERE = [n for n, text in enumerate(TEXTS) if text and SAMPLES[n]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("decoders")
    write_table(made / "clips.parquet", TEXTS, SAMPLES)
    return made


@pytest.fixture(scope="module")
def clips(folder):
    cells = pyarrow.parquet.read_table(folder / "clips.parquet")["audio"].to_pylist()
    return [cell["bytes"] for cell in cells]


@pytest.fixture(scope="module")
def models(folder):
    """The folder of each kind of model, made when it is asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = build(kind, folder / kind)
        return made[kind]

    return of


def requested(path, more=""):
    hooks = "" if "cache_filter" in more else f"memory.activation_cache_filter=[{HOOKS}]"
    target = "" if "corpus.target" in more else "corpus.target=text"
    most = "" if "max_tokens" in more else "corpus.max_tokens=null"
    return f"corpus=audio corpus.path={path} {target} {most} {hooks} {more}"


@pytest.fixture(scope="module")
def run_of(folder, models):
    """A verified run of each kind, made once."""
    made = {}

    def of(kind):
        if kind not in made:
            words = requested(
                folder / "clips.parquet",
                "extraction.shards=1 extraction.batch_tokens=400 corpus.columns=[text]",
            )
            made[kind] = stages(folder / f"run-{kind}", models(kind), words).all()
            made[kind].verify()
        return made[kind]

    return of


def check_rows(acts, plain, clips, tolerance=1e-5):
    """Every row of a run is that of the plain model, of each document by itself."""
    for number, name in enumerate(acts.documents):
        document = acts.document(number)
        ids = document.input_ids.tolist()
        expected = plain.values(clips[int(name.rpartition("#")[2]) - 1], ids)
        assert set(expected) <= set(acts.hooks)
        for hook, values in expected.items():
            rows = document[hook].float()
            assert rows.shape == values.shape
            error = float((rows - values.float()).abs().max() / values.float().abs().max())
            assert error <= tolerance, (number, hook, error)


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_those_of_the_plain_decoder(kind, run_of, models, clips):
    acts = theloom.open(run_of(kind).activations)
    assert list(acts.documents) == [f"clips.parquet#{n + 1}" for n in THERE]
    assert acts.columns["text"].tolist() == [TEXTS[n] for n in THERE]
    start = 2 if kind == "speech_to_text" else 1
    assert acts.attributes["decoder_start"] == start
    for number, n in enumerate(THERE):  # the start, once; the tokenizer's own; the bytes
        ids = acts.document(number).input_ids.tolist()
        assert ids[0] == start
        assert ids.count(1) == 1
        assert len(ids) == len(TEXTS[n].encode()) + (2 if start == 2 else 1)
    check_rows(acts, Plain(models(kind)), clips)


def test_the_rows_of_each_source_are_kept_with_its_document(run_of, clips, models):
    acts = theloom.open(run_of("speech_to_text").activations)
    model = Plain(models("speech_to_text")).model
    frames = [values[0] for values in acts.columns["input_shape"].tolist()]
    expected = model._get_feat_extract_output_lengths(torch.tensor(frames)).tolist()
    assert acts.columns["source_rows"].tolist() == expected
    assert len(set(expected)) > 1


def batches(run):
    names = ("extract.json", "estimate.h5", "model.h5", "tokens.h5")
    output = run.folder / "shards/other.h5"
    job = read_job(*(run.folder / name for name in names), 0, output)
    return job, resident.batches_of(job, resident.plan_resident(job).plan)


def test_batches_of_uneven_documents_have_the_rows_of_single_ones(tmp_path, run_of, models, folder):
    together = run_of("speech_to_text")
    job, planned = batches(together)
    assert max(len(batch.windows) for batch in planned) > 2
    for batch in planned:  # neither targets nor sources take more than the plan has
        assert len(batch.windows) * max(job.planned_lengths[list(batch.windows)]) <= 400
    words = requested(folder / "clips.parquet", "extraction.shards=2 extraction.batch_tokens=1")
    alone = stages(tmp_path, models("speech_to_text"), words).all()
    one, other = theloom.open(together.activations), theloom.open(alone.activations)
    for hook in one.hooks:
        torch.testing.assert_close(one[hook][:], other[hook][:], rtol=1e-5, atol=1e-5)


def test_a_batch_that_ran_out_of_memory_is_cut_by_its_sources(run_of, monkeypatch):
    """Five targets of few tokens, of sources of 25 rows each: two fit the smaller plan."""
    run = run_of("speech_to_text")
    before = {hook: theloom.open(run.activations)[hook][:] for hook in (HOOKS.split(",")[-1],)}
    plain_run, windows = resident.ResidentRunner.run, []

    def seen(self, ids, *rest):
        windows.append(len(ids))
        return plain_run(self, ids, *rest)

    monkeypatch.setattr(resident.ResidentRunner, "run", seen)
    (shard,) = run.shards
    shard.rename(shard.with_suffix(".kept"))
    extract_one_shard(run, oom_level=3)  # 400 tokens of a pass become 50
    assert 1 < max(windows) <= 2
    assert theloom.open(shard).metrics["oom_level"] == 3
    for hook, rows in before.items():
        torch.testing.assert_close(theloom.open(shard)[hook][:], rows, rtol=1e-5, atol=1e-5)
    shard.with_suffix(".kept").rename(shard)


def test_a_killed_job_goes_on_from_its_last_committed_row(tmp_path, models):
    table = write_table(tmp_path / "clips.parquet", ["other words, " * 4] * 8, [16000] * 8)
    run = stages(tmp_path / "run", models("moonshine"), requested(table, "extraction.shards=1"))
    run.prepare()
    job = forked(extract_with_small_commits, run.folder)
    partial = run.folder / "shards/00000-of-00001.h5.partial"
    while job.is_alive() and not committed(partial):
        time.sleep(0.01)
    job.kill()
    job.join()
    assert partial.exists()
    run.extract()
    run.merge()
    run.verify()
    contents = [cell["bytes"] for cell in pyarrow.parquet.read_table(table)["audio"].to_pylist()]
    check_rows(theloom.open(run.activations), Plain(models("moonshine")), contents)


def committed(partial):
    try:
        with h5py.File(partial) as file:
            return int(file["commit_log"]["rows"].max(initial=0))
    except (OSError, KeyError):
        return 0


def test_one_document_of_one_token(tmp_path, models):
    table = write_table(tmp_path / "clips.parquet", ["a"], [12000])
    more = "corpus.add_special_tokens=false extraction.shards=1"
    run = stages(tmp_path / "run", models("whisper"), requested(table, more)).all()
    run.verify()
    acts = theloom.open(run.activations)
    assert acts.input_ids.numpy(...).shape == (1,)
    assert acts.attributes["decoder_start"] == "null"
    check_rows(acts, Plain(models("whisper")), [clip(12000)])


def test_every_hook_point_is_read_in_bf16(tmp_path, models, folder, clips):
    more = "memory.activation_cache_filter=[decoder.*] memory.precision_mode=bf16"
    run = stages(tmp_path, models("whisper"), requested(folder / "clips.parquet", more)).all()
    run.verify()
    acts, plain = theloom.open(run.activations), Plain(models("whisper"), torch.bfloat16)
    check_rows(acts, plain, clips, 3e-2)
    document = acts.document(2)
    pattern = document["decoder.blocks.1.attn.hook_pattern"]
    assert pattern.shape[0] == len(document.input_ids)


def test_documents_without_text_or_sound_are_skipped_and_named(folder, models, tmp_path, caplog):
    run = stages(tmp_path, models("whisper"), requested(folder / "clips.parquet"))
    with caplog.at_level(logging.WARNING):
        tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    skipped = [n for n in range(len(TEXTS)) if n not in THERE]
    assert len(skipped) == 3
    for n in skipped:
        assert f"document clips.parquet#{n + 1} has no tokens: skipped" in caplog.text
    with h5py.File(tmp_path / "tokens.h5") as file:
        assert file.attrs["empty_documents"] == 3
        assert len(file["documents/columns/source_rows"]) == len(THERE)


def test_a_start_that_the_tokenizer_writes_is_there_once(tmp_path):
    start, written = "<|startoftranscript|>", ["<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", start, *written]
    ends = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
    own = WhisperTokenizer(
        vocab={token: number for number, token in enumerate([*alphabet, "<|translate|>"])},
        merges=[],
        language="english",
        task="transcribe",
        **ends,
    )
    folder = build("whisper", tmp_path / "model", decoder_start_token_id=alphabet.index(start))
    for file in folder.glob("*token*"):
        file.unlink()
    own.save_pretrained(folder)
    table = write_table(tmp_path / "clips.parquet", ["ab"], [16000])
    run = stages(tmp_path / "run", folder, requested(table))
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    with h5py.File(tmp_path / "tokens.h5") as file:
        ids = file["tokens/input_ids"][:].tolist()
    assert ids == own("ab").input_ids
    assert [alphabet[i] for i in ids] == [start, *written, "a", "b", "<|endoftext|>"]


def test_rows_of_a_data_set_on_disk_have_their_targets(tmp_path, models, clips):
    import datasets

    rows = [{"audio": {"bytes": clips[n], "path": None}, "text": TEXTS[n]} for n in THERE]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    words = requested(tmp_path / "set").replace("corpus.path", "corpus.dataset")
    run = stages(tmp_path / "run", models("moonshine"), words)
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    with h5py.File(tmp_path / "tokens.h5") as file:
        lengths = np.diff(file["documents/offset"][:]).tolist()
    assert lengths == [len(TEXTS[n].encode()) + 1 for n in THERE]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("corpus.target=null", "corpus.target: not set"),
        ("extraction.execution=layerwise", "runs on the device as a whole alone"),
        ("corpus.messages=m", "corpus.messages=m: is for texts"),
        ("corpus.input_ids=m", "corpus.input_ids=m: is for texts"),
        ("corpus.max_tokens=7", "corpus.max_tokens=7: is for texts"),
        ("answers.source=model", "answers.source=model: is for texts"),
        ("resources.tokenize_jobs=2", "resources.tokenize_jobs=2: is for texts"),
        ("memory.activation_cache_filter=[encoder.*]", "no hook point is one of a decoder"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words) as caught:
        stages(tmp_path, "somewhere", requested("x", more))
    assert "\n" not in str(caught.value)


def test_a_decoder_behind_images_is_refused_in_one_line(tmp_path):
    words = requested("x").replace("corpus=audio", "corpus=images")
    with pytest.raises(ConfigError, match="a decoder is read behind texts or audio") as caught:
        stages(tmp_path, "somewhere", words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "samples", "more", "words"),
    [
        (["a" * 70], [16000], "", "has 71 tokens, and 64 is the most that the decoder takes"),
        (["a" * 9], [16000], "corpus.context_length=8", "and 8 corpus.context_length is the most"),
        (["a"], [16000], "corpus.context_length=8", "has 100 rows, and memory is planned for 8"),
        (["a"], [40000], "", "has 40,000 samples, and the model takes 32,000 at once"),
        ([""], [16000], "", "1 documents read, all empty"),
        (["a"], [16000], "corpus.target=words", "no column 'words'; columns there: audio, text"),
        (["a"], [16000], "corpus.columns=[source_rows]", "'source_rows' is what the run itself"),
    ],
)
def test_clips_that_cannot_be_taken_are_named(tmp_path, models, texts, samples, more, words):
    table = write_table(tmp_path / "clips.parquet", texts, samples)
    run = stages(tmp_path / "run", models("whisper"), requested(table, more))
    with pytest.raises(CorpusError, match=words) as caught:
        tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    assert "\n" not in str(caught.value)


def test_a_clip_that_the_processor_cuts_is_refused(tmp_path, models):
    """The processor of Cohere's model makes several of more than 30 seconds."""
    table = write_table(tmp_path / "clips.parquet", ["a"], [16000 * 40])
    more = "corpus.context_length=9000"
    run = stages(tmp_path / "run", models("cohere_asr"), requested(table, more))
    with pytest.raises(CorpusError, match="its processor cuts it into 2 clips") as caught:
        tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    assert "\n" not in str(caught.value)


def test_files_of_sound_alone_have_no_column_of_targets(tmp_path, models):
    soundfile.write(tmp_path / "clip.wav", np.ones(16000) * 0.1, 16000)
    run = stages(tmp_path / "run", models("whisper"), requested(tmp_path / "clip.wav"))
    with pytest.raises(CorpusError, match=r"clip\.wav: no column 'text'; columns there: none"):
        tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")


def test_a_model_without_such_a_decoder_is_refused_in_one_line(tmp_path, folder, tiny_llama):
    words = requested(folder / "clips.parquet")
    for source, said in (
        (tiny_llama, "reads texts, and the corpus has audio"),
        (build_tower("wav2vec2", tmp_path / "wav2vec2"), "is one list of blocks"),
    ):
        with pytest.raises(TheLoomError, match=said) as caught:
            stages(tmp_path / source.name, source, words).prepare()
        assert "\n" not in str(caught.value)


def test_a_model_whose_clips_of_a_length_are_not_known_is_refused(tmp_path, models, folder):
    words = requested(folder / "clips.parquet")
    with pytest.raises(TheLoomError, match="does not know which clips have as many") as caught:
        stages(tmp_path / "run", models("moonshine_streaming"), words).prepare()
    assert "\n" not in str(caught.value)


def test_hooks_and_estimates_know_both_halves(models, capsys):
    main(["hooks", str(models("whisper")), "--json"])
    names = [hook["name"] for hook in json.loads(capsys.readouterr().out)["hooks"]]
    for name in ("encoder.blocks.1.hook_resid_post", "decoder.blocks.2.hook_cross_attn_out"):
        assert name in names
    assert "encoder.blocks.0.hook_cross_attn_out" not in names
    main(["hooks", str(models("canary")), "--json"])
    names = [hook["name"] for hook in json.loads(capsys.readouterr().out)["hooks"]]
    assert {"blocks.1.hook_resid_post", "decoder.blocks.2.hook_resid_post"} <= {*names}
    main(["hooks", str(models("moonshine")), "--json"])  # whose decoder's MLP has a gate in it
    listed = json.loads(capsys.readouterr().out)
    names = [hook["name"] for hook in listed["hooks"]]
    assert "decoder.blocks.0.mlp.hook_post" in names
    assert "in an order that is not" in listed["unsupported"]["decoder.blocks.0.mlp.hook_pre"]
    whole, half = (
        forecast(str(models("moonshine")), "fp32", filters=[f"{side}.blocks.*.hook_resid_post"])
        for side in ("decoder", "encoder")
    )
    assert whole.weights > half.weights
    assert whole.tokens == half.tokens == 1248  # rows of 30 seconds
    assert "encoder-decoder runs on the device as a whole alone" in whole.layerwise_unsupported
