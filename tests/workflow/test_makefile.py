"""make: what it hands over, and the variables that it refuses."""

import os
import shlex
import shutil
import subprocess

import pytest
from support import ROOT


@pytest.fixture
def make(tmp_path):
    """make -n, in a folder whose environment is there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "envs").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "envs/constraints.txt", ".venv/complete"):
        (tmp_path / name).touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-n", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    return call


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["SET=a=1", "b=2"], 'SET="… b=2"'),
        (["PROFILE=custom"], "write PROFILES=custom"),
        (["profiles=7b"], "write PROFILES=7b"),
        (["profile=7b"], "write PROFILES=7b"),
        (["memory.precision_mode=bf16"], 'SET="… memory.precision_mode=bf16"'),
        (["set=verify.seed=1"], 'write SET="verify.seed=1"'),
        (["PROFILES=7b", "corpus.path=/my texts"], 'SET="… corpus.path=/my texts"'),
    ],
)
@pytest.mark.parametrize("goal", ["run", "report", "test"])
def test_a_variable_that_nothing_reads_is_refused_in_one_line(make, goal, words, meant):
    done = make(goal, *words)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "error: make knows no variable" in line
    assert meant in line


@pytest.mark.parametrize(
    "typed",
    [
        "corpus.path='/my texts' name=x",
        "report.title='it'\\''s $x $(PYTHON) #1 `id` \"q\" \\'",
        "report.title=é,🙂 verify.seed=1,2",
    ],
)
def test_set_reaches_snakemake_as_it_was_typed(make, typed):
    done = make("run", f"SET={typed}", "PROFILES=3b,7b")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[-2:] == ["profiles=3b,7b", f"set={typed}"]


def test_the_variables_that_it_knows_are_taken(make):
    for words in (["PYTHON=python3"], ["BENCH=--rounds 7"], ["-j2"], []):
        assert make("run", *words).returncode == 0
