"""theloom inspect and theloom verify."""

import json
import os
import shutil
import subprocess
import sys

import h5py
import pytest
from crashes import flip
from support import stages
from theloom.cli import main
from theloom.store.file_format import METRICS

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    return stages(
        tmp_path_factory.mktemp("run"), tiny_llama, "extraction.shards=2 corpus.max_tokens=400"
    ).all()


def test_inspect_prints_the_contents_of_a_file(run, capsys):
    for file in (run.activations, run.shards[0]):
        assert main.main(["inspect", str(file)]) == 0
        text = capsys.readouterr().out
        assert (
            max(len(line) for line in text.splitlines() if "/" not in line) <= 80
        )  # but for paths
        assert HOOK in text
        assert "Where the time went" in text
        assert "corpus_hash" in text


def test_inspect_as_json(run, capsys):
    assert main.main(["inspect", str(run.activations), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"]["rows"] == 400
    assert len(found["schema"]["files"]) == 2
    assert list(found["metrics"]) == list(METRICS)
    assert found["metrics"]["seconds_disk"] > 0
    (hook,) = [h for h in found["hooks"] if h["name"] == HOOK]
    assert (hook["shape"], hook["nbytes"], hook["nonfinite"]) == ([64], 400 * 64 * 4, 0)
    assert found["provenance"]["package_versions"]["torch"]


def test_a_path_that_is_no_file_of_hidden_states_is_rejected(run, tmp_path, capsys):
    cut = tmp_path / "cut.h5"
    cut.write_bytes(run.shards[0].read_bytes()[:-1000])
    size = run.shards[0].stat().st_size
    text, other = tmp_path / "text.h5", tmp_path / "other.h5"
    text.write_text("text")
    with h5py.File(other, "w") as file:
        file["x"] = [1]
    for path, words in (
        (run.activations.parent, f"is a folder; give a file in it, for example {run.activations}"),
        (cut, f"cut short, {size - 1000:,} of {size:,} bytes are there; copy it again"),
        (text, "cannot be read as HDF5 (it is none); give activations.h5"),
        (other, "found a file of another program; give activations.h5"),
    ):
        assert main.main(["inspect", str(path)]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_verify_recomputes_documents_with_the_model(run, capsys):
    assert main.main(["verify", str(run.activations), "--recompute", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recomputed"] >= 1
    assert found["max_relative_error"] <= found["tolerance"]
    assert main.main(["verify", str(run.shards[1]), "--recompute", "1"]) == 0
    assert "1 documents recomputed" in capsys.readouterr().out


def test_verify_draws_no_bar_into_a_pipe(run):
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = [
        sys.executable,
        "-m",
        "theloom.cli.main",
        "verify",
        str(run.activations),
        "--recompute",
        "1",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Loading weights" not in done.stderr


def test_verify_ends_on_one_line_where_a_bit_is_flipped(run, capsys):
    with h5py.File(run.shards[0]) as file:
        place = file[f"hooks/{HOOK}/activations"].id.get_offset() + 1000
    flip(run.shards[0], place, 3)
    assert main.main(["verify", str(run.activations)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rows of 1 windows are not those that were written" in error
    flip(run.shards[0], place, 3)
    assert main.main(["verify", str(run.activations)]) == 0
    assert "all hashes" not in capsys.readouterr().err


def test_control_characters_of_others_do_not_reach_the_terminal(run, tmp_path, capsys):
    folder = tmp_path / "a\x1b[2Jfolder"
    folder.mkdir()
    shutil.copy(run.shards[0], folder / "shard.h5")
    assert main.main(["inspect", str(folder / "shard.h5")]) == 0
    assert main.main(["inspect", str(folder / "none.h5")]) == 1
    for text in capsys.readouterr():
        assert "\x1b" not in text
        assert r"a\x1b[2Jfolder" in text
