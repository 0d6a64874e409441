"""Conversations with images through the stages of the pipeline, against plain transformers."""

import json
import re
import shutil

import h5py
import pyarrow as pa
import pyarrow.parquet
import pytest
import theloom
import torch
from chats_support import (
    CONFIGS,
    WINDOWED,
    build,
    image_part,
    messages_of,
    plain_inputs,
    plain_states,
    text_part,
    write_chats,
)
from PIL import Image
from support import stages
from theloom.corpus import tokens
from theloom.errors import ConfigError, CorpusError, ModelError, StoreError
from theloom.hooks.blocks import find_blocks
from theloom.model.checkpoint.classes import model_class
from theloom.model.towers.check import images_check
from theloom.rows.modality import CHAT, mark
from theloom.rows.roles import code
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

HOOKS = "memory.activation_cache_filter=[blocks.*.hook_resid_pre,blocks.*.hook_resid_post]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "corpus")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return build("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def llava_run(tmp_path_factory, llava, folder):
    words = requested(folder / "chats.jsonl")
    return stages(tmp_path_factory.mktemp("runs") / "llava", llava, words).all()


def requested(path, more=""):
    most = "" if "max_tokens" in more else "corpus.max_tokens=null"
    return (
        f"corpus=text corpus.path={path} corpus.messages=messages model.modality=chat {most} "
        f"extraction.shards=2 memory.streaming_chunk_size=64 {HOOKS} {more}"
    )


@pytest.mark.parametrize("kind", CONFIGS | WINDOWED)
def test_rows_are_those_of_the_whole_plain_model(kind, tmp_path, folder, llava, llava_run):
    model, run = llava, llava_run
    if kind != "llava":
        model = build(kind, tmp_path / "model")
        run = stages(tmp_path / "run", model, requested(folder / "chats.jsonl")).all()
    run.verify()
    with h5py.File(run.folder / "model.h5") as file:
        assert file["memory/images"].attrs["method"] == "trace"
        assert not file.attrs["streams"]
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


def tokenized(tmp_path, model, corpus, more=""):
    run = stages(tmp_path / "run", model, requested(corpus, more))
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    return h5py.File(run.folder / "tokens.h5")


def written(tmp_path, *conversations):
    lines = [json.dumps({"messages": messages}) for messages in conversations]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return tmp_path / "chats.jsonl"


def user(*parts):
    return [{"role": "user", "content": [*parts]}]


def test_tokens_of_images_have_their_role_message_and_placeholder(tmp_path, llava, folder):
    with tokenized(tmp_path, llava, folder / "chats.jsonl") as file:
        document = slice(*file["documents/offset"][2:4])
        ids, role, message, start, end = (
            file[f"tokens/{name}"][document]
            for name in ("input_ids", "role", "message", "char_start", "char_end")
        )
        assert file.attrs["images"] == 3
        images = json.loads(file["documents/columns/input_images"][2])
    assert [one["file"] for one in images] == ["1.png", "2.png"]
    assert (role[ids == 256] == code("image")).all()
    assert message[ids == 256].tolist() == [0] * 16 + [2] * 16
    tokenizer = AutoTokenizer.from_pretrained(llava)
    text = tokenizer.apply_chat_template(messages_of(folder)[2], tokenize=False)
    pieces = [text[a:b] for a, b in zip(start, end, strict=True)]
    assert {p for p, i in zip(pieces, ids, strict=True) if i == 256} == {"<image>"}
    once = [p for p, at in zip(pieces, start, strict=True) if at >= 0 and len(p) == 1]
    assert "".join(once).replace("éé", "é") == text.replace("<image>", "")
    assert (message[role == code("user")] >= 0).all()


def test_rows_of_images_alone_are_kept(tmp_path, llava, folder):
    with tokenized(tmp_path, llava, folder / "chats.jsonl", "rows.keep=image") as file:
        assert file["tokens/kept"][:].sum() == 3 * 16


def test_bytes_in_a_table_are_those_of_files(tmp_path, llava, llava_run, folder):
    conversations = messages_of(folder)
    own = [
        [
            {"bytes": (folder / part["path"]).read_bytes(), "path": None}
            for message in messages
            for part in message["content"]
            if part["type"] == "image"
        ]
        for messages in conversations
    ]
    without = json.loads(re.sub(r', "path": "[0-9]\.png"', "", json.dumps(conversations)))
    table = pa.table({"messages": [json.dumps(m) for m in without], "shown": own})
    pa.parquet.write_table(table, tmp_path / "chats.parquet", row_group_size=3)
    words = requested(tmp_path / "chats.parquet", "corpus.images=shown")
    run = stages(tmp_path / "run", llava, words.replace("model.modality=chat ", ""))
    for name in ("estimate.h5", "model.h5"):  # of the same model
        shutil.copy(llava_run.folder / name, run.folder)
    tokens.tokenize(run.config("tokens"), run.documents)
    run.extract()
    run.merge()
    acts = theloom.open(run.activations)
    files = theloom.open(llava_run.activations)
    for hook in acts.hooks:
        assert torch.equal(acts[hook][:], files[hook][:])


@pytest.mark.parametrize(
    ("parts", "more", "error"),
    [
        ([image_part("none.png")], "", r"image 1: no file '.*none\.png'"),
        ([image_part("chats.jsonl")], "", r"image 1: is no image that can be read"),
        ([image_part("https://a.b/c.png")], "", "is no file here; fetch it, and give its path"),
        ([{"type": "image"}], "", "names no file and has no bytes, and corpus.images is not set"),
        ([{"type": "video", "path": "a"}], "", "has a part of the type 'video'"),
        ([text_part("<image>")], "", "has 1 placeholders of images and the messages have 0"),
        ([image_part("0.png"), text_part("<image>")], "", "has 2 placeholders '<image>' and the"),
        ([image_part("0.png")], "corpus.context_length=9", "goes in one window of at most 9"),
        ([image_part("0.png")], "corpus.max_tokens=9", "the corpus has no tokens"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(tmp_path, llava, folder, parts, more, error):
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(CorpusError, match=error) as found:
        tokenized(tmp_path, llava, written(tmp_path, user(*parts)), more)
    assert "\n" not in str(found.value)


def test_models_and_runs_that_read_no_images_say_so(tmp_path, llava, folder, tiny_llama):
    path = folder / "chats.jsonl"
    words = requested(path).replace("model.modality=chat", "")
    run = stages(tmp_path / "a", llava, words)
    with pytest.raises(CorpusError, match=r"of the type 'image', and model\.modality is not"):
        tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    with pytest.raises(ModelError, match=r"\(llama\) has no vision part"):
        stages(tmp_path / "b", tiny_llama, requested(path)).prepare()
    for more, error in [
        ("extraction.execution=layerwise", "run on the device as a whole alone"),
        ("model.tokenizer=/a", "does not go with conversations with images"),
        ("corpus.messages=null", "corpus.messages is None"),
    ]:
        with pytest.raises(ConfigError, match=error):
            stages(tmp_path / "c", llava, requested(path, more))
    shutil.copytree(llava, tmp_path / "model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        tokenized(tmp_path, tmp_path / "model", path)


def test_a_changed_image_stops_the_job_and_is_no_pair(tmp_path, llava, llava_run, folder):
    shutil.copytree(folder, tmp_path / "corpus")
    run = stages(tmp_path / "run", llava, requested(tmp_path / "corpus/chats.jsonl"))
    for name in ("estimate.h5", "model.h5"):
        shutil.copy(llava_run.folder / name, run.folder)
    tokens.tokenize(run.config("tokens"), run.documents)
    Image.new("RGB", (40, 64)).save(tmp_path / "corpus/0.png")
    with pytest.raises(CorpusError, match=r"0\.png: has changed since its tokens were counted"):
        run.extract()
    tokens.tokenize(run.config("tokens"), run.documents)
    run.extract()
    run.merge()
    assert len(theloom.open_pair(llava_run.activations, llava_run.activations)) > 100
    with pytest.raises(StoreError, match=r"has images of SHA-256"):
        theloom.open_pair(llava_run.activations, run.activations)


def test_a_model_that_adds_to_the_stream_between_its_blocks_is_refused(tmp_path, folder):
    model = build("qwen3_vl", tmp_path / "model")
    config = AutoConfig.from_pretrained(model)
    mark(config, CHAT)
    loaded = model_class(config).from_pretrained(model).eval()
    given = plain_inputs("qwen3_vl", model, folder, messages_of(folder)[0])
    ids = given.pop("input_ids")
    with pytest.raises(ModelError, match="it adds to the stream between its blocks"):
        images_check(find_blocks(loaded), ids, given, 1e-6)
