"""A file whose author trusted code, opened by somebody else: nothing of the author's runs, however
the file is read; what runs with the reader's own consent is shown next to it.
"""

import json
import shutil
from pathlib import Path

import h5py
import pytest
import theloom
from model_folders import describe, llama, run
from theloom.cli import main
from theloom.dataset import conversions, token_text
from theloom.errors import ModelError
from theloom.report.draw import draw_states
from theloom.store import checksums, index

# the author's code: it works, and leaves a mark wherever one of its classes is made
CODE = """import os, pathlib
from transformers import LlamaModel, PreTrainedTokenizerFast
class Own({base}):
    def __init__(self, *args, **options):
        pathlib.Path(os.environ["MARK"]).write_text("{base}")
        super().__init__(*args, **options)
"""
BASES = {"model": "LlamaModel", "tokenizer": "PreTrainedTokenizerFast"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The author's run, whose config trusts the code of its model and its tokenizer."""
    folder = tmp_path_factory.mktemp("author")
    source = llama(folder / "model")
    for what, base in BASES.items():
        (source / f"own_{what}.py").write_text(CODE.format(base=base))
    describe(source, auto_map={"AutoModel": "own_model.Own"})
    file = source / "tokenizer_config.json"
    planted = {"auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | planted))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARK", str(folder / "mark"))
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        finished = run(folder, source, "model.trust_remote_code=true model.allow_pickle=true").all()
        finished.verify()  # the pipeline's own stages go by the run's own config
        assert (folder / "mark").exists()
    return finished


@pytest.fixture
def mark(made, tmp_path, monkeypatch) -> Path:
    """What the author's code would write into the reader's home."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    recorded = json.loads(theloom.open(made.activations).attributes["config"])
    assert recorded["tokens"]["model"]["trust_remote_code"] is True
    assert recorded["model"]["model"]["allow_pickle"] is True
    return tmp_path / "mark"


def source_of(made) -> str:
    return theloom.open(made.activations).attributes["model_source"]


def test_texts_of_tokens_come_from_the_file_and_run_nothing(made, mark):
    for path in (made.activations, *made.shards):
        acts = theloom.open(path)
        frame = acts.to_dataframe("tokens")
        document = acts.document(0)
        tokens = frame["token"][frame["document"] == 0]
        assert bytes("".join(tokens), "utf-8", "replace")
        assert not any(text.startswith("#") for text in tokens if len(text) > 1)
        assert len(tokens) == len(document)
    assert not mark.exists()


def test_figures_of_the_report_run_nothing(made, mark, tmp_path):
    draw_states(made.config("report"), made.activations, tmp_path)
    assert (tmp_path / "map.svg").exists()
    assert not mark.exists()


def test_recomputing_runs_code_only_with_the_flag(made, mark, capsys):
    command = ["verify", str(made.activations), "--recompute", "1"]
    assert main.main([*command, "--json"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.trust_remote_code" in error
    assert not mark.exists()
    assert main.main([*command, "--trust-remote-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recomputed"] == 1
    assert mark.read_text() == BASES["model"]


def test_a_tokenizer_runs_code_only_with_the_argument(made, mark):
    acts = theloom.open(made.activations)
    with pytest.raises(ModelError, match="trust_remote_code") as refused:
        conversions.tokens_frame(acts, slice(0, 5), tokenizer=source_of(made))
    assert "\n" not in str(refused.value)
    assert not mark.exists()
    trusted = acts.to_dataframe("tokens", slice(0, 5), source_of(made), trust_remote_code=True)
    assert trusted["token"].tolist() == acts.to_dataframe("tokens", slice(0, 5))["token"].tolist()
    assert mark.read_text() == BASES["tokenizer"]
    assert type(token_text.load(source_of(made), True)).__name__ == "Own"


@pytest.mark.parametrize("named", ["./model", "owner/model", "package:own_model"])
def test_a_model_that_only_the_file_names_is_not_fetched(made, mark, named, tmp_path, capsys):
    """A relative folder, a name on the hub or a package: the file's author could have put it
    there.
    """
    copy = shutil.copytree(made.folder, tmp_path / "copy")
    with h5py.File(copy / "activations.h5", "a") as file:
        config = json.loads(file.attrs["config"])
        config["model"]["model"]["source"] = config["extract"]["model"]["source"] = named
        file.attrs["config"] = json.dumps(config)
        index.write_index(file)
    checksums.write_checksums(copy / "activations.h5", *checksums.ALL)
    command = ["verify", str(copy / "activations.h5"), "--recompute", "1", "--trust-remote-code"]
    assert main.main(command) == 1
    assert f"give --model {Path(named)}" in capsys.readouterr().err
    assert not mark.exists()
    assert main.main([*command, "--model", source_of(made)]) == 0
    assert mark.exists()
