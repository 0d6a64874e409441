"""Conversations with images through the stages of the pipeline, against plain transformers."""

import json

import pytest
import theloom
from chats_support import CONFIGS, build, plain_inputs, plain_states, write_chats
from support import stages
from theloom.rows.roles import code
from transformers import AutoModelForImageTextToText

HOOKS = "memory.activation_cache_filter=[blocks.*.hook_resid_pre,blocks.*.hook_resid_post]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "corpus")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return build("llava", tmp_path_factory.mktemp("models") / "llava")


def requested(path, more=""):
    return (
        f"corpus=text corpus.path={path} corpus.messages=messages model.modality=chat "
        f"corpus.max_tokens=null extraction.shards=2 memory.streaming_chunk_size=64 {HOOKS} {more}"
    )


def messages_of(folder):
    lines = (folder / "chats.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_those_of_the_whole_plain_model(kind, tmp_path, folder):
    model = build(kind, tmp_path / "model")
    run = stages(tmp_path / "run", model, requested(folder / "chats.jsonl")).all()
    run.verify()
    acts = theloom.open(run.activations)
    plain = AutoModelForImageTextToText.from_pretrained(model).eval()
    roles = acts.token_table("role").numpy(slice(None))
    for number, messages in enumerate(messages_of(folder)):
        document, inputs = acts.document(number), plain_inputs(kind, model, folder, messages)
        assert document.input_ids.tolist() == inputs["input_ids"][0].tolist()
        at = slice(*acts.document_tokens[number : number + 2])
        assert ((roles[at] == code("image")) == (inputs["input_ids"][0] == 256).numpy()).all()
        for hook, values in plain_states(plain, inputs).items():
            assert document[hook].shape == values.shape
            assert (document[hook] - values).abs().max() <= 1e-5 * values.abs().max()
