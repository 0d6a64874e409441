"""Encoder-decoders in the pipeline: the encoder's rows, and the decoder's behind its source."""

import json

import numpy as np
import pytest
import theloom
import torch
from model_folders import VOCABULARY, byte_tokenizer, scaled
from support import Stages, stages
from theloom.engine import model_record
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
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
