"""Parts of a model's folder that change the model, and files that are broken: used, or an error of
one line in the first stage.
"""

import json
import re
import shutil

import pytest
import theloom
import torch
from model_folders import describe, errors_against_plain, llama, refusal, run
from support import ROOT, build_tiny
from theloom.config import compose
from theloom.errors import ModelError
from theloom.pipeline import preflight
from theloom.store import file_format
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

OWN = """from transformers import {base}
class Own({base}):
    def forward(self, input_ids=None, **options):
        return super().forward(input_ids=(input_ids + 1) % 259, **options)
"""


@pytest.fixture
def source(tmp_path):
    return llama(tmp_path / "model")


def bring_code(source, auto="AutoModel", base="LlamaModel"):
    (source / "own.py").write_text(OWN.format(base=base))
    describe(source, auto_map={auto: "own.Own"})


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForCausalLM", "AutoConfig"])
def test_own_code_of_a_known_model_type_is_refused(tmp_path, source, name):
    bring_code(source, name)
    line = refusal(tmp_path, source)
    assert f"({name}: own.Own)" in line
    assert "model.trust_remote_code=true" in line
    assert "model.ignore_own_code=true" in line


def test_own_code_that_may_run_must_not_be_left_out_as_well(tmp_path, source):
    bring_code(source)
    both = "model.trust_remote_code=true model.ignore_own_code=true"
    assert "set one of them" in refusal(tmp_path, source, both)


@pytest.mark.parametrize(
    ("auto", "base", "execution"),
    [
        ("AutoModel", "LlamaModel", "resident"),
        ("AutoModelForCausalLM", "LlamaForCausalLM", "layerwise"),
    ],
)
def test_rows_of_own_code_are_its_own_in_every_stage(tmp_path, source, auto, base, execution):
    bring_code(source, auto, base)
    overrides = f"model.trust_remote_code=true extraction.execution={execution}"
    made = run(tmp_path, source, overrides).all()
    made.verify()
    rows, ids = first_document(made)
    assert_first_states(source, rows, (ids + 1) % 259)


def test_own_code_can_be_left_out_and_that_is_recorded(tmp_path, source, caplog):
    bring_code(source)
    made = run(tmp_path, source, "model.ignore_own_code=true").all()
    assert_first_states(source, *first_document(made))
    assert "model.ignore_own_code" in caplog.text
    with file_format.open_h5(made.folder / "model.h5", "model") as file:
        assert json.loads(file.attrs["config"])["model"]["ignore_own_code"] is True


def first_document(made):
    document = theloom.open(made.activations).document(0)
    return document["blocks.2.hook_resid_pre"], torch.from_numpy(document.input_ids).long()


def assert_first_states(source, rows, ids):
    """Rows are those of the library's own class for these ids."""
    model: PreTrainedModel = LlamaModel.from_pretrained(source)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(rows, states[2][0], rtol=1e-5, atol=1e-5)


def test_the_library_s_class_is_not_taken_for_an_unknown_model_type(tmp_path, source):
    bring_code(source, "AutoConfig")
    describe(source, model_type="nobody_has_this")
    line = refusal(tmp_path, source, "model.ignore_own_code=true")
    assert "transformers has no such model of its own" in line


def test_a_tokenizer_of_own_code_is_refused(tmp_path, source):
    describe(source, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})
    line = refusal(tmp_path, source)
    assert "the tokenizer is Python code of its own (AutoTokenizer: own.Tokenizer)" in line


@pytest.mark.parametrize("base", [True, False])
def test_an_adapter_that_does_not_say_what_it_is_of_is_refused(tmp_path, source, base):
    (source / "adapter_config.json").write_text("{}")
    shutil.copy(source / "model.safetensors", source / "adapter_model.safetensors")
    if not base:
        (source / "model.safetensors").unlink()
        (source / "config.json").unlink()
    words = "next to the model" if base else "without base_model_name_or_path"
    assert words in refusal(tmp_path, source)


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
def test_a_quantisation_that_the_config_does_not_have_is_refused(tmp_path, source, name):
    (source / name).write_text("{}")
    assert f"has a {name}" in refusal(tmp_path, source)


def test_files_that_do_not_change_the_model_are_no_matter(tmp_path, source):
    weights = (source / "model.safetensors").read_bytes()
    (source / "consolidated.safetensors").write_bytes(weights)
    for name in ("params.json", "generation_config.json"):
        (source / name).write_text("{}")
    (source / "modules.json").write_text("[]")
    (source / "pytorch_model.bin").write_bytes(b"not read")
    (source / "onnx").mkdir()
    (source / "onnx/model.safetensors").write_bytes(b"not read")
    assert errors_against_plain(run(tmp_path, source).all(), source) < 1e-5


def pointer(source):
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")


def half(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def another_size(source):
    other = build_tiny("llama", source.parent / "other", vocab_size=320, hidden_size=32)
    shutil.copy(other / "model.safetensors", source)


def shards(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="100KB")
    return sorted(source.glob("model-*.safetensors"))


def index(source):
    shards(source)
    return source / "model.safetensors.index.json"


BROKEN = {
    "a pointer of git-lfs": (pointer, "is a pointer of git-lfs"),
    "half a download": (half, r"model\.safetensors is damaged or cut short"),
    "empty weights": (lambda s: (s / "model.safetensors").write_bytes(b""), "is empty"),
    "weights of another size": (another_size, "weights of another shape than its config"),
    "a shard missing": (lambda s: shards(s)[1].unlink(), r"lacks 1 of \d weight files"),
    "a shard cut": (lambda s: shards(s)[1].write_bytes(b"123"), "damaged or cut short, 3 bytes"),
    "no index": (lambda s: index(s).unlink(), "no index of shards"),
    "a broken index": (lambda s: index(s).write_text("{"), r"index\.json is damaged or cut short"),
    "an empty index": (lambda s: index(s).write_text("{}"), "has no weight_map"),
    "an index of another": (
        lambda s: index(s).write_text('{"weight_map": {"a": "../b"}}'),
        "'../b'",
    ),
    "a broken config": (lambda s: (s / "config.json").write_text("{"), r"config\.json is damaged"),
    "an empty config": (lambda s: (s / "config.json").write_text(""), r"config\.json is empty"),
    "a list as config": (lambda s: (s / "config.json").write_text("[]"), "holds list, not an obj"),
    "a config of nothing": (lambda s: (s / "config.json").write_text("{}"), "model_type"),
    "a config not of text": (lambda s: describe(s, hidden_size="wide"), "hidden_size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_in_the_first_stage(tmp_path, source, name):
    damage, words = BROKEN[name]
    damage(source)
    assert re.search(words, refusal(tmp_path, source))


@pytest.mark.parametrize("name", ["half a download", "a shard missing", "a broken config"])
def test_a_broken_file_is_found_before_any_job(tmp_path, source, name):
    damage, _ = BROKEN[name]
    damage(source)
    (checked,) = compose.runs(
        ROOT / "config", "custom", f"model.source={source} corpus.max_tokens=10"
    ).values()
    with pytest.raises(ModelError):
        preflight.check(checked)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02junk", b"PK\x03\x04cut"],
)
def test_broken_pickles_are_one_line(tmp_path, source, content):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refusal(tmp_path, source, "model.allow_pickle=true")


def test_files_of_shards_are_read_in_full(tmp_path, source):
    whole = llama(tmp_path / "whole")
    shards(source)
    assert errors_against_plain(run(tmp_path, source).all(), whole) < 1e-5
