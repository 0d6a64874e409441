"""Tokens that a model's embedding has no row for end the run before a model is loaded."""

import json

import h5py
import pytest
import torch
from corpus_support import BYTES, byte_tokenizer
from support import build_tiny, stages
from theloom.config.schema import ModelConfig
from theloom.corpus import tokens
from theloom.corpus.vocabulary import Vocabulary
from theloom.errors import CorpusError


def texts(folder, *lines):
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return f"corpus=text corpus.path={file}"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_token_beyond_the_embedding_is_named_before_any_shard(tmp_path, model_type):
    model = build_tiny(model_type, tmp_path / "model", vocab_size=BYTES)
    byte_tokenizer(model, added=("<new>", "<newer>"))
    corpus = texts(tmp_path, *["plain text"] * 30, "the end <newer> <new>")
    run = stages(tmp_path / "run", model, f"{corpus} extraction.shards=3")
    with pytest.raises(CorpusError) as caught:
        run.all()
    for words in ("document texts.jsonl:31", "'<newer>'", "the id 257", "has 256 rows"):
        assert words in str(caught.value)
    assert not run.shards


def test_a_token_that_max_tokens_cuts_off_does_no_harm(tmp_path):
    model = build_tiny("llama", tmp_path / "model", vocab_size=BYTES)
    byte_tokenizer(model, added=("<new>",))
    run = stages(
        tmp_path / "run", model, f"{texts(tmp_path, 'ten bytes <new>')} corpus.max_tokens=9"
    )
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    with h5py.File(tmp_path / "tokens.h5") as file:
        assert len(file["tokens/input_ids"]) == 9


def test_the_last_row_of_a_larger_embedding_is_used(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = build_tiny("llama", tmp_path / "model", vocab_size=BYTES)
    tokenizer = byte_tokenizer(folder, added=("<new>",))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(BYTES + 1, mean_resizing=False)
    model.save_pretrained(folder)
    run = stages(tmp_path / "run", folder, texts(tmp_path, "a <new>")).all()
    with h5py.File(run.activations) as file:
        assert file["tokens/input_ids"][:].tolist() == tokenizer("a <new>")["input_ids"]


def test_rows_beyond_vocab_size_are_those_of_the_model_itself(tmp_path):
    from transformers import CpmAntConfig, CpmAntModel

    config = CpmAntConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, dim_head=8,
        dim_ff=16, prompt_types=2, prompt_length=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        rows = CpmAntModel(config).get_input_embeddings().num_embeddings
    assert rows > config.vocab_size
    byte_tokenizer(tmp_path)
    vocabulary = Vocabulary(ModelConfig(source=str(tmp_path)))
    tokenizer = byte_tokenizer(tmp_path)
    assert vocabulary.check([0, rows - 1], "a", tokenizer).tolist() == [0, rows - 1]
    with pytest.raises(CorpusError, match=f"the id {rows}, .* has {rows} rows"):
        vocabulary.check([rows], "a", tokenizer)


@pytest.mark.parametrize(
    "ids", [[-1], [1, None], [1.0], [2**40], [2**63], ["a"], [[1]], [[1], [1, 2]]]
)
def test_what_is_no_token_id_is_refused(tmp_path, ids):
    model = build_tiny("llama", tmp_path / "model", vocab_size=BYTES)
    tokenizer = byte_tokenizer(model)
    with pytest.raises(CorpusError, match="document a: ") as caught:
        Vocabulary(ModelConfig(source=str(model))).check(ids, "a", tokenizer)
    assert "\n" not in str(caught.value)
