"""Models whose numbers would take hours, or all memory: one line in the first stage, in seconds."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from model_folders import llama, refusal, run
from theloom.corpus import tokens
from theloom.engine.layerwise import weights_index
from theloom.errors import CorpusError, ModelError
from theloom.model.checkpoint import gguf
from theloom.model.checkpoint.limits import MODULES, bounded_build
from theloom.planning import estimate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("hostile") / "llama")


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def rewrite(file, **values):
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | values))


def nested(depth):
    found = {}
    for _ in range(depth):
        found = {"part": found}
    return found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000 in its config is beyond"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers=1e+18"),
        ({"vision_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers=10000000"),
        ({"decoder": {"num_codebooks": 10**7}}, "num_codebooks=10000000"),
        ({"num_experts": 10**9}, "num_experts=1000000000"),
        ({"hidden_size": -64}, "hidden_size=-64 in its config is negative"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776"),
        ({"num_attention_heads": 0}, "model.source"),
        ({"num_key_value_heads": -2}, "num_key_value_heads=-2"),
        ({"hidden_size": 0}, "model.source"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": float("nan")}, "hidden_size=nan"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000"),
        ({"extra": nested(500)}, "more than 32 levels"),
    ],
)
def test_a_size_that_no_model_has_is_one_line(tmp_path, source, values, words):
    rewrite(source / "config.json", **values)
    assert words in refusal(tmp_path, source)


def test_modules_of_any_kind_are_counted_while_a_model_is_built():
    with torch.device("meta"), bounded_build():
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(1000)))

    def build_many():
        with bounded_build():
            parent = torch.nn.Module()
            for number in range(MODULES + 1):
                parent.add_module(f"part{number % 7}", None)

    with pytest.raises(ModelError, match="more than 300,000 modules"):
        build_many()


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "rule",
    [
        replace({"String": "a"}, "b" * 10**6),
        replace({"Regex": ""}, "x" * 100),
        {"type": "Prepend", "prepend": "x" * 10**6},
        {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 30},
    ],
)
def test_a_normalizer_that_blows_up_a_letter_is_refused(tmp_path, source, rule):
    rewrite(source / "tokenizer.json", normalizer=rule)
    assert "can make a character" in refusal(tmp_path, source)


def test_a_template_of_too_many_tokens_is_refused(tmp_path, source):
    described = json.loads((source / "tokenizer.json").read_text())["post_processor"]
    described["single"] = described["single"][:1] * 5000 + described["single"]
    rewrite(source / "tokenizer.json", post_processor=described)
    assert "adds 5,001 tokens to each text" in refusal(tmp_path, source)


def test_usual_normalizers_are_taken(tmp_path, source):
    usual = [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]
    rewrite(source / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": usual})
    made = run(tmp_path, source)
    estimate.run_estimate(made.config("estimate"), made.folder / "estimate.h5")


def test_a_regex_over_its_limit_is_one_line(tmp_path, source):
    rewrite(source / "tokenizer.json", normalizer=replace({"Regex": "(a|a|aa)+$"}, "b"))
    made = run(tmp_path, source, texts=["a" * 4000 + "!"])
    with pytest.raises(CorpusError, match=r"fails on a text of the corpus: .*retry-limit") as found:
        tokens.tokenize(made.config("tokens"), made.folder / "tokens.h5")
    assert "\n" not in str(found.value)


@pytest.fixture
def gguf_file(tmp_path):
    file = tmp_path / "gguf" / "x.gguf"
    file.parent.mkdir()
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(8)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


COUNTS = 8  # where the header has the number of its tensors, then of its values


def put(at, number, kind="<Q"):
    def change(content):
        struct.pack_into(kind, content, at(content) if callable(at) else at, number)

    return change


def of_second_tensor(content):
    """Where the offset of the tensor `b` is: behind name, dimensions, shape and type."""
    return content.index(struct.pack("<Q", 1) + b"b" + struct.pack("<I", 2)) + 9 + 4 + 16 + 4


GGUF_DAMAGE = {
    "tensors": put(COUNTS, 1 << 60),
    "values": put(COUNTS + 8, 1 << 60),
    "a long name": put(COUNTS + 16, 1 << 62),
    "version": put(4, 99, "<I"),
    "overlap": put(of_second_tensor, 0),
    "beyond": put(of_second_tensor, 1 << 50),
    "shape": put(lambda c: of_second_tensor(c) - 12, 1 << 61),
    "type": put(lambda c: of_second_tensor(c) - 4, 200, "<I"),
    "cut": lambda content: content.__delitem__(slice(-100, None)),
    "empty": lambda content: content.clear(),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE)
def test_a_broken_gguf_file_is_one_line(tmp_path, gguf_file, damage):
    gguf.check(gguf_file, "x")
    content = bytearray(gguf_file.read_bytes())
    GGUF_DAMAGE[damage](content)
    gguf_file.write_bytes(content)
    assert "x.gguf" in refusal(tmp_path, gguf_file.parent)


def test_layers_of_a_gguf_file_have_a_bound(tmp_path, gguf_file):
    content = bytearray(gguf_file.read_bytes())
    at = content.index(b"llama.block_count") + len("llama.block_count") + 4
    struct.pack_into("<I", content, at, 10**7)
    gguf_file.write_bytes(content)
    assert "block_count=10000000 in its config is beyond" in refusal(tmp_path, gguf_file.parent)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [((0, 8), "share bytes"), ((-4, 4), "offsets"), ((8, 24), "offsets"), ((96, 104), "cut short")],
)
def test_headers_are_checked_layer_by_layer_too(tmp_path, offsets, words):
    entries = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": offsets},
    }
    header = json.dumps(entries).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ModelError, match=words):
        weights_index.index(tmp_path)
