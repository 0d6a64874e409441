"""Encoder-decoders in the pipeline: the encoder's rows, and the decoder's behind its source."""

import json

import h5py
import pytest
import theloom
import torch
from model_folders import VOCABULARY, byte_tokenizer, llama, scaled
from support import Stages, copy_project, stages
from theloom.corpus import tokens
from theloom.engine import model_record
from theloom.errors import ConfigError, CorpusError, TheLoomError
from theloom.model import loading
from theloom.model.files import prepare_files
from theloom.planning import estimate
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

T5 = {"d_model": 64, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 128}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "pad_token_id": 0}
KINDS = {
    "t5": {**T5, "d_ff": 96, "decoder_start_token_id": 0},
    "mt5": {**T5, "d_ff": 96, "decoder_start_token_id": 0},  # gated
    "bart": {**BART, "decoder_start_token_id": 2},
    "marian": {**BART, "decoder_start_token_id": 0},
    "mbart": BART,
    "m2m_100": {**BART, "decoder_start_token_id": 2},
    "pegasus": {**BART, "decoder_start_token_id": 0},
}
PAIRS = [
    ("The quick brown fox", "Der schnelle braune Fuchs"),
    ("a", "jumps over the lazy dog, far away"),
    ("jumps over the lazy dog. " * 3, "x"),
    ("", "without a source"),
    ("without a target", ""),
    ("b", "c"),
]
STATES = "memory.activation_cache_filter=[{0}.blocks.*.hook_resid_pre,{0}.blocks.*.hook_resid_post]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random models, each with a tokenizer of bytes, and a table of pairs of texts."""
    made = tmp_path_factory.mktemp("models")
    for kind, values in KINDS.items():
        config = AutoConfig.for_model(kind, **{**values, "vocab_size": VOCABULARY, "dropout": 0.1})
        scaled(AutoModelForSeq2SeqLM.from_config(config)).save_pretrained(made / kind)
        byte_tokenizer(made / kind)
    rows = (json.dumps({"text": source, "de": target}) for source, target in PAIRS)
    (made / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return made


def run_of(folder, models, kind, side, more: str = "") -> Stages:
    target = "corpus.target=de" if side == "decoder" else ""
    corpus = f"corpus=text corpus.path={models / 'pairs.jsonl'} {target}"
    filters = "" if "cache_filter" in more else STATES.format(side)
    size = "" if "context_length" in more else "corpus.context_length=100"
    size += "" if "chunk_size" in more else " memory.streaming_chunk_size=100"
    return stages(
        folder / side, models / kind, f"{corpus} extraction.shards=2 {size} {filters} {more}"
    )


def plain(models, kind) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(models / kind).eval()


def states_of(model, source: list[int], target: list[int]) -> dict[str, tuple[torch.Tensor, ...]]:
    """The model's own hidden states of one pair, by side."""
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([source]),
            decoder_input_ids=torch.tensor([target]),
            output_hidden_states=True,
        )
    return {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}


@pytest.mark.parametrize(
    ("kind", "side"),
    [(kind, "decoder") for kind in KINDS]
    + [(kind, "encoder") for kind in ("t5", "mt5", "bart", "marian", "pegasus")],
)
def test_rows_are_the_states_of_each_pair_by_itself(tmp_path, folders, kind, side):
    run = run_of(tmp_path, folders, kind, side).all()
    run.verify()
    model, acts = plain(folders, kind), theloom.open(run.activations)
    blocks = 2 if side == "encoder" else 3
    assert len(acts.hooks) == 2 * blocks
    sources = acts.columns["source_ids"].tolist() if side == "decoder" else [[1]] * 6
    assert len(acts.documents) == (4 if side == "decoder" else 5)
    for number in range(len(acts.documents)):
        document = acts.document(number)
        ids = document.input_ids.tolist()
        own = (ids, [1]) if side == "encoder" else (sources[number], ids)
        states = states_of(model, *own)[side]
        for block in range(blocks):
            for value, expected in ("pre", states[block]), ("post", states[block + 1]):
                if value == "post" and block == blocks - 1:
                    continue  # a final norm may come behind it
                rows = document[f"{side}.blocks.{block}.hook_resid_{value}"]
                torch.testing.assert_close(rows, expected[0], rtol=2e-5, atol=2e-5)
    assert model_record.read(run.folder / "model.h5").causal == (side == "decoder")


def test_a_run_with_every_hook_point_reads_cross_attention(tmp_path, folders):
    """Sources longer than a chunk."""
    run = run_of(
        tmp_path,
        folders,
        "t5",
        "decoder",
        "memory.activation_cache_filter=[decoder.*] memory.streaming_chunk_size=40",
    ).all()
    run.verify()
    acts, model = theloom.open(run.activations), plain(folders, "t5")
    assert acts.attributes["decoder_start"] == 0
    document = acts.document(2)
    source = acts.columns["source_ids"].tolist()[2]
    assert len(source) == 76
    assert document.input_ids.tolist()[0] == 0
    seen = {}

    def keep(key, value):
        seen[key] = value

    for number, block in enumerate(model.decoder.block):
        cross, name = block.layer[1], f"decoder.blocks.{number}.hook_cross_attn"
        cross.EncDecAttention.register_forward_hook(
            lambda m, args, output, name=name: keep(f"{name}_out", output[0])
        )
        cross.layer_norm.register_forward_hook(
            lambda m, args, output, name=name: keep(f"{name}_in", args[0])
        )
    states_of(model, source, document.input_ids.tolist())
    assert len(seen) == 2 * len(model.decoder.block)
    for key, expected in seen.items():
        torch.testing.assert_close(document[key], expected[0], rtol=2e-5, atol=2e-5)
    last = document["decoder.ln_final.hook_out"]
    with torch.no_grad():
        expected = model.get_decoder()(
            input_ids=torch.from_numpy(document.input_ids).long()[None],
            encoder_hidden_states=model.get_encoder()(torch.tensor([source])).last_hidden_state,
        ).last_hidden_state
    torch.testing.assert_close(last, expected[0], rtol=2e-5, atol=2e-5)


def test_batches_of_uneven_pairs_have_the_rows_of_single_ones(tmp_path, folders):
    rows = []
    for tokens_of_batch in 400, 1:
        more = f"extraction.batch_tokens={tokens_of_batch}"
        run = run_of(tmp_path / str(tokens_of_batch), folders, "bart", "decoder", more).all()
        acts = theloom.open(run.activations)
        rows.append({hook: acts[hook][:] for hook in acts.hooks})
    for hook, values in rows[0].items():
        torch.testing.assert_close(values, rows[1][hook], rtol=1e-5, atol=1e-5)


def test_the_encoder_loads_no_weight_of_the_decoder(tmp_path, folders):
    run = run_of(tmp_path, folders, "t5", "encoder")
    loaded = loading.load_model(run.config("extract"), prepare_files(run.config("extract").model))
    model = loaded.architecture.model
    assert not [n for n, _ in model.named_parameters() if n.startswith("decoder")]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("memory.activation_cache_filter=[encoder.*,decoder.*]", "make a run for the encoder and"),
        ("memory.activation_cache_filter=[encoder.*,blocks.*]", "make a run for the encoder and"),
        ("memory.activation_cache_filter=[encoder.*] corpus.target=de", "no hook point is one of"),
        ("memory.activation_cache_filter=[decoder.*]", "corpus.target: not set"),
        ("memory.activation_cache_filter=[blocks.*] corpus.target=de", "no hook point is one of"),
        (
            "memory.activation_cache_filter=[encoder.*] extraction.execution=layerwise",
            "runs on the device as a whole alone",
        ),
        (
            "memory.activation_cache_filter=[decoder.*] corpus.target=de corpus.messages=m",
            "conversations have no target",
        ),
        (
            "memory.activation_cache_filter=[decoder.*] corpus.target=de "
            "corpus.columns=[source_ids]",
            "rename the corpus' column",
        ),
        ("corpus.columns=[source_ids]", "rename the corpus' column"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words) as caught:
        stages(tmp_path, "somewhere", f"corpus=text corpus.path=x {more}")
    assert "\n" not in str(caught.value)


def test_a_model_and_hook_points_of_another_kind_are_refused_in_one_line(tmp_path, folders):
    llama(tmp_path / "llama")
    for source, filters, words in (
        (folders / "t5", "blocks.*.hook_resid_post", "the hook points name neither"),
        (tmp_path / "llama", "encoder.blocks.*.hook_resid_post", "is no encoder-decoder"),
        (folders / "t5", "encoder.blocks.0.hook_cross_attn_out", "unknown hook point"),
        (folders / "t5", "encoder.blocks.9.hook_resid_post", "did you mean 'encoder.blocks.1."),
        (folders / "t5", "encoder.blocks.0.hook_pos_embed", "unknown hook point"),
    ):
        run = stages(
            tmp_path / "run",
            source,
            f"corpus=text corpus.path=x memory.activation_cache_filter=[{filters}]",
        )
        with pytest.raises(TheLoomError, match=words) as caught:
            estimate.run_estimate(run.config("estimate"), tmp_path / "estimate.h5")
        assert "\n" not in str(caught.value)


def test_pairs_that_cannot_be_read_are_refused_in_one_line(tmp_path, folders):
    corpus = tmp_path / "pairs.jsonl"
    for row, more, words in (
        ({"text": "a", "de": 7}, "", "column 'de' is a number, not a text"),
        ({"text": "a"}, "", "no column 'de'"),
        ({"text": "a" * 120, "de": "b"}, "", "the source of document .* has 121 tokens"),
        ({"text": "a", "de": "b" * 120}, "", "the target of document .* has 122 tokens"),
    ):
        corpus.write_text(json.dumps(row) + "\n")
        run = stages(
            tmp_path / "run",
            folders / "t5",
            f"corpus=text corpus.path={corpus} corpus.target=de corpus.context_length=100 "
            f"{STATES.format('decoder')} {more}",
        )
        with pytest.raises(CorpusError, match=words) as caught:
            tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
        assert "\n" not in str(caught.value)


def test_pairs_of_token_ids_are_taken_as_they_are(tmp_path, folders):
    corpus = tmp_path / "ids.jsonl"
    corpus.write_text(json.dumps({"source": [5, 6, 7], "target": [0, 9]}) + "\n")
    run = stages(
        tmp_path / "run",
        folders / "t5",
        f"corpus=text corpus.path={corpus} corpus.input_ids=source corpus.target=target "
        f"{STATES.format('decoder')}",
    )
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    with h5py.File(tmp_path / "tokens.h5") as file:
        assert file["tokens/input_ids"][:].tolist() == [0, 9]
        assert file["documents/columns/source_ids"][:].tolist() == [b"[5,6,7]"]


def test_a_whole_run_of_the_pipeline_with_targets(tmp_path, folders):
    project = copy_project(tmp_path)
    settings = (
        f"name=pairs model.source={folders / 't5'} corpus=text "
        f"corpus.path={folders / 'pairs.jsonl'} corpus.target=de corpus.context_length=100 "
        "memory.activation_cache_filter=[decoder.blocks.*.hook_resid_post] extraction.device=cpu"
    )
    results = project.results("pairs")
    finished = project.snakemake(
        "results/pairs/verification.h5", "--cores", "2", profiles="custom", overrides=settings
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    acts = theloom.open(results / "activations.h5")
    assert len(acts.documents) == 4
    assert acts.columns["source_ids"].tolist()[1] == [1, 67]
