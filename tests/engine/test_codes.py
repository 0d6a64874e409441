"""Decoders of codes through the stages of the pipeline, against plain transformers."""

import copy
import json
from functools import cache

import h5py
import numpy as np
import pytest
import theloom
import torch
import transformers
from support import allocator_peak, build_tiny, stages
from theloom.corpus import tokens
from theloom.corpus.in_parts.gather import gather
from theloom.corpus.in_parts.part import tokenize_part
from theloom.engine import model_record, resident
from theloom.errors import ConfigError, CorpusError, ModelError, StoreError
from theloom.exports.run import export
from theloom.hooks.blocks import find_blocks
from theloom.hooks.catalog import build_catalog
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.checkpoint.classes import model_class
from theloom.model.fake import fake_model
from theloom.report.draw import draw_states
from theloom.store import writer
from tiny_configs import tiny_config
from transformers import AutoConfig

LAST = 128  # the code of padding, behind the vocabulary
LENGTHS = (1, 33, 3, 7, 40, 2, 16, 17)
KINDS = {  # by name, transformers' class, the codebooks, and how it is run
    "mono": ("MusicgenForCausalLM", 4, ""),
    "stereo": ("MusicgenForCausalLM", 8, "extraction.execution=layerwise store.merge=physical"),
    "melody": ("MusicgenMelodyForCausalLM", 4, ""),
    "whole": ("MusicgenForConditionalGeneration", 4, ""),  # as it is published
}
REQUESTED = (
    "corpus.input_ids=codes memory.streaming_chunk_size=16 extraction.batch_tokens=64 "
    "extraction.shards=2"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models and corpora by kind; those of `whole` differ from those of `mono` in one code."""
    folder = tmp_path_factory.mktemp("codes")
    for kind, (name, codebooks, _) in KINDS.items():
        torch.manual_seed(0)
        config = tiny_config("musicgen_melody" if "Melody" in name else "musicgen")
        config.decoder.update({"num_codebooks": codebooks, "vocab_size": LAST, "is_decoder": True})
        config.decoder.update({"audio_channels": codebooks // 4, "pad_token_id": LAST})
        model = getattr(transformers, name)(config if kind == "whole" else config.decoder)
        scaled(model).save_pretrained(folder / kind)
        draw = np.random.default_rng(0)
        every = [draw.integers(0, LAST + 1, (codebooks, n)) for n in LENGTHS]
        every[1][3][2] ^= kind == "whole"
        write(folder / f"{kind}.jsonl", *({"codes": codes.tolist()} for codes in every))
    return folder


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, folders):
    """The run of a kind through all stages, once."""

    @cache
    def run(kind):
        words = f"{corpus(folders, kind)} {KINDS[kind][2]}"
        return stages(tmp_path_factory.mktemp(kind), folders / kind, words).all()

    return run


def scaled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # the usual 0.02 would hide errors
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def corpus(folder, kind):
    return f"corpus=text corpus.path={folder / kind}.jsonl {REQUESTED}"


def plain_model(folders, kind):
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(folders / kind)
    return (model.decoder if kind == "whole" else model).eval()


def check_rows(acts, model, lines):
    """Every document's rows are the states of transformers on its codes alone."""
    worst = 0.0
    for number, line in enumerate(lines.read_text().splitlines()):
        codes, document = torch.tensor(json.loads(line)["codes"]), acts.document(number)
        assert document.input_ids.tolist() == codes.T.tolist()
        with torch.inference_mode():
            *states, last = model(codes, output_hidden_states=True).hidden_states
            end = f"blocks.{len(states) - 1}.hook_resid_post"
            found = [(model.model.decoder.layer_norm(document[end]), last)]
        found += [(document[f"blocks.{n}.hook_resid_pre"], s) for n, s in enumerate(states)]
        found += [(document[f"blocks.{n}.hook_resid_post"], s) for n, s in enumerate(states[1:])]
        worst = max(worst, *(float((a - b[0]).abs().max() / b.abs().max()) for a, b in found))
    assert worst <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_plain_transformers(folders, run_of, kind):
    run = run_of(kind)
    run.verify()
    acts, record = theloom.open(run.activations), model_record.read(run.folder / "model.h5")
    assert acts.codebooks == KINDS[kind][1]
    assert acts.input_ids.shape == (sum(LENGTHS), acts.codebooks)
    assert record.streams
    with h5py.File(run.activations) as file:
        assert (file["tokens/input_ids"][:] == acts.input_ids.numpy(...)).all()
    check_rows(acts, plain_model(folders, kind), folders / f"{kind}.jsonl")


def test_a_job_that_is_stopped_resumes_with_the_same_rows(tmp_path, folders, run_of, monkeypatch):
    mono, run = run_of("mono"), stages(tmp_path, folders / "mono", corpus(folders, "mono"))
    calls = []
    for name in ("estimate.h5", "tokens.h5", "model.h5"):
        (run.folder / name).write_bytes((mono.folder / name).read_bytes())
    forward = resident.ResidentRunner.run

    def stops_in_the_second(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    monkeypatch.setattr(resident.ResidentRunner, "run", stops_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run.extract(0)
    assert list(run.folder.glob("shards/*.partial"))
    run.extract()
    run.merge()
    check_rows(theloom.open(run.activations), plain_model(folders, "mono"), folders / "mono.jsonl")


def test_codes_that_several_jobs_read_are_those_of_one(tmp_path, run_of):
    mono = run_of("mono")
    config, parts = mono.config("tokens"), [tmp_path / f"{n}.h5" for n in range(3)]
    for number, path in enumerate(parts):
        tokenize_part(config, number, len(parts), path)
    gather(config, parts, tmp_path / "tokens.h5")
    with h5py.File(tmp_path / "tokens.h5") as found, h5py.File(mono.folder / "tokens.h5") as one:
        assert found.attrs["tokens_hash"] == one.attrs["tokens_hash"]
        assert (found["tokens/input_ids"][:] == one["tokens/input_ids"][:]).all()


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([[1, 2]] * 3, r"has the shape \[3, 2\], and the model reads 4 codes a position; give"),
        ([[1, 2], [3, 4], [5, 6], [7]], r"has the shape \[4, 1 or 2\]"),
        ([[[1, 2]] * 4], r"has the shape \[1, 4\], .* of EnCodec audio_codes\[0, 0\]"),
        ([1, 2, 3, 4], "has a number for a codebook"),
        ([[1], [2], [3], [LAST + 1]], f"the code {LAST + 1} .* which has {LAST + 1} rows, the"),
        ([[1], [2], [3], [-1]], "gives -1, which is no code"),
        ([[1], [2], [3], [0.5]], "gives 0.5, which is no code"),
    ],
)
def test_codes_that_the_model_does_not_take_are_named(tmp_path, folders, codes, words):
    write(tmp_path / "x.jsonl", {"codes": codes})
    refused(tmp_path, folders / "mono", corpus(tmp_path, "x"), words)


def refused(folder, model, requested, words):
    run = stages(folder / "run", model, requested)
    with pytest.raises(CorpusError, match=words) as caught:
        tokens.tokenize(run.config("tokens"), folder / "tokens.h5")
    assert "\n" not in str(caught.value)


def test_texts_for_a_model_of_codes_and_codes_for_one_of_texts(tmp_path, folders):
    write(tmp_path / "x.jsonl", {"text": "a", "codes": [[1], [2], [3], [4]]})
    given, texts = corpus(tmp_path, "x"), build_tiny("llama", tmp_path / "llama")
    as_texts = given.replace("corpus.input_ids=codes ", "")
    words = r"reads 4 codes a position, and the corpus has texts; set corpus\.input_ids to a column"
    refused(tmp_path, folders / "mono", as_texts, words)
    refused(tmp_path, texts, given, r"gives \[1\], which is no token id")


def test_hook_points_of_a_half_are_refused_of_a_decoder_of_codes(tmp_path, folders):
    hooks = "memory.activation_cache_filter=[decoder.blocks.0.hook_resid_post]"
    given = f"{corpus(folders, 'mono')} corpus.target=codes {hooks}"
    with pytest.raises(ModelError, match="name its hook points without 'decoder'") as caught:
        stages(tmp_path, folders / "whole", given).prepare()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_size", [256, 96])
@pytest.mark.parametrize("kind", ["musicgen_decoder", "musicgen_melody_decoder"])
def test_trace_gives_the_peak_of_the_cpu_allocator(kind, chunk_size):
    numbers = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 352}
    config = AutoConfig.for_model(kind, **numbers, vocab_size=512, max_position_embeddings=512)
    described = find_blocks(model_class(config)._from_config(copy.deepcopy(config)).eval())
    fake, workload = fake_model(config, "fp32"), Workload(2, 256, chunk_size)
    names = ["blocks.*.hook_resid_post", "blocks.*.hook_mlp_out"]
    codes = torch.randint(512, (workload.windows, workload.tokens, 4))
    for points in ([], build_catalog(described).select(names)):
        predicted = trace.trace(fake, workload, points, held=True)[0].total
        measured = allocator_peak(
            lambda points=points: trace.run(described, codes, workload, points, held=True)
        )
        assert abs(predicted / measured - 1) <= 1e-3, (len(points), predicted, measured)


def test_tables_and_exports_have_all_codes_of_a_row(tmp_path, run_of):
    acts = theloom.open(run_of("mono").activations)
    codes = acts.input_ids.numpy(...)
    frame = acts.to_dataframe("tokens")
    assert frame["input_id"].tolist() == codes.tolist()
    assert frame["token"][0] == " ".join(map(str, codes[0]))
    assert acts.rows.to_dataframe()["input_id"].tolist() == codes.tolist()
    assert acts.to_xarray(hooks=acts.hooks[:1])["input_id"].shape == codes.shape
    assert acts.to_datasets(hooks=acts.hooks[:1])["input_id"][:3] == codes[:3].tolist()
    export(acts, "parquet", tmp_path / "parquet", hooks=acts.hooks[:1])
    (file,) = (tmp_path / "parquet").glob("*.parquet")
    pandas = pytest.importorskip("pandas")
    assert np.array(pandas.read_parquet(file)["input_id"].tolist()).tolist() == codes.tolist()
    with pytest.raises(ConfigError, match=r"saelens has one token id a row, .* have 4 codes"):
        export(acts, "saelens", tmp_path / "saelens")


def test_pairs_compare_all_codes_of_a_row(run_of):
    mono = run_of("mono").activations
    assert len(theloom.open_pair(mono, run_of("melody").activations)) == sum(LENGTHS)
    for other, words in (
        ("whole", r"token 2 of document 'mono.jsonl:2' is \[.*\] in the first and \["),
        ("stereo", "has 4 ids a token in the first and 8 ids a token in the second"),
    ):
        with pytest.raises(StoreError, match=words):
            theloom.open_pair(mono, run_of(other).activations)


def test_the_report_draws_a_run_of_codes(tmp_path, run_of):
    run = run_of("mono")
    draw_states(run.config("report"), run.activations, tmp_path)
    assert (tmp_path / "map.svg").exists()
