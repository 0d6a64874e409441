"""`theloom run`: every word arrives in the frozen configs as it was typed, in a project too."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import preloading
import pytest
from support import ROOT
from theloom.cli import main, project, run
from theloom.config import compose, words
from theloom.errors import ConfigError, ProjectError
from theloom.pipeline import request

LONG = bool(os.environ.get("LONG_TESTS"))
ODD = list("""'"#,=~()[]{}<>|&;:!?*%$@^`\\+-_. éß中🙂""")


def theloom(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "theloom.cli.main", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        env=preloading.environment(ROOT / "workflow"),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project of `theloom init`."""
    folder = tmp_path_factory.mktemp("made") / "my project"
    project.lay(folder)
    return folder


def called(*arguments: str) -> list[str]:
    """What `theloom run` would call, from Snakemake's first argument on."""
    read = main._parsed(main._parser(), ["run", *arguments])
    return run.command(read, read.extra)[3:]


def frozen(folder: Path, name: str, stage: str) -> dict:
    path = folder / f"results/{name}/config/{stage}.json"
    return json.loads(path.read_text(encoding="utf-8"))["config"]


def test_every_word_reaches_the_frozen_config_as_it_was_typed(made, tiny_llama):
    rng = random.Random(7)
    typed = ["my texts", "a,b", 'it\'s #1 "é"', "$HOME `id`", "~x", "[a, b]", "null", "-n {run} \\"]
    typed += [
        "".join(rng.choice(ODD) for _ in range(12)).strip(".") + "x" for _ in range(60 * LONG + 1)
    ]
    paths = [made / name for name in typed]
    for path in paths:
        path.mkdir(exist_ok=True)
        (path / "a.txt").write_text("Some text.")
    fixed = [f"model.source={tiny_llama}", "corpus=text", "report.title=a, b #1 ${x} 'q'"]
    asked = [*fixed, *(f"corpus.path={path}" for path in paths)]
    runs = compose.runs(made / "config", "custom", words.from_words(asked))
    targets = [f"results/{name}/config/{s}.json" for name in runs for s in ("tokens", "report")]
    done = theloom(made, "run", "custom", *asked, "--cores", "2", "--", *targets)
    assert done.returncode == 0, done.stdout + done.stderr
    arrived = [frozen(made, name, "tokens")["corpus"]["path"] for name in runs]
    assert arrived == [str(path) for path in paths]
    assert {frozen(made, n, "report")["report"]["title"] for n in runs} == {fixed[2][13:]}


def test_set_and_run_and_a_file_request_the_same_runs(made):
    (made / "mine.yaml").write_text(
        "memory: {precision_mode: [fp16, bf16]}\nreport.title: 'a #1'\n"
    )
    title = "report.title=a #1"
    swept = "memory.precision_mode=fp16,bf16"
    calls = [
        ["run", "3b,7b", swept, title, "-n"],
        ["run", "-n", "profiles=3b,7b", "overrides=mine.yaml"],
    ]
    printed = [theloom(made, *call) for call in calls]
    command = [sys.executable, "-m", "snakemake", "--profile", "workflow/profiles/local", "-n"]
    command += ["--config", "profiles=3b,7b", f"set={swept} report.title='a #1'"]
    printed.append(
        subprocess.run(
            command,
            cwd=made,
            capture_output=True,
            text=True,
            env=preloading.environment(ROOT / "workflow"),
        )
    )
    tables = []
    for done in printed:
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append([x for x in done.stderr.splitlines() if " shards" in x])
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 4
    assert tables[0][0].startswith("3b+precision_mode=fp16+title=a-1-")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["3b", "corpus.max_tokens=200_000"], "write 200000"),
        (["3b", "verify.seed=1", "verify.seed=2"], "verify.seed: given twice"),
        (["3b", "7b"], "error: '7b': write key=value"),
        (["3b", "overrides=no.yaml"], "error: overrides='no.yaml': cannot be read"),
        (["3b", "--profile", "slrum"], "--profile slrum: neither a folder of workflow/profiles"),
        (["3b", "--", "--config", "set=name=x"], "theloom run passes it itself"),
        (["3b", "profiles=7b"], "write one list"),
        (["custom", "model.source=/x\nerror: /y", "-n"], "line breaks"),
        (["custom", "model.source=/x\udcff", "-n"], "not UTF-8"),
    ],
)
def test_a_mistake_is_one_line_before_snakemake_starts(made, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(made)
    assert main.main(["run", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["3b", "verify.sed=1"], "error: unknown key 'verify.sed'"),
        (["custom", "model.source=a/b", "corpus=text", f"corpus.path={'x' * 300}"], "too long"),
    ],
)
def test_a_mistake_that_snakemake_s_parse_finds_is_one_line(made, arguments, said):
    done = theloom(made, "run", *arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Using profile")]
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 1), done.stderr
    assert said in lines[0]


def test_a_folder_without_a_pipeline_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProjectError, match="no pipeline here"):
        called("3b")


def test_options_may_stand_anywhere_and_snakemake_s_own_follow_dashes(monkeypatch):
    monkeypatch.chdir(ROOT)
    local, slurm = "workflow/profiles/local", "workflow/profiles/slurm"
    assert called() == ["--profile", local]
    assert called("3b") == ["--profile", local, "--config", "profiles=3b"]
    asked = called("--cores", "2", "3b", "-n", "verify.seed=1", "--profile", "slurm", "name=x")
    typed = request.of_words("3b", ["verify.seed=1", "name=x"]).arguments()
    assert asked == ["--profile", slurm, "--cores", "2", "--dry-run", "--config", *typed]
    assert called("3b", "--", "figures", "--until", "verify", "--", "x") == [
        *("--profile", local, "figures", "--until", "verify"),
        *("--config", "profiles=3b", "--", "x"),
    ]
    assert called("verify.seed=1")[-1].startswith("typed=")
    with pytest.raises(ConfigError, match="write key=value"):
        called("3b", "7b")


@pytest.mark.parametrize("arguments", [["run", "--foo"], ["init", "a", "b"], ["gpus", "x"]])
def test_what_the_parser_does_not_know_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_cluster_s_jobs_get_the_words_encoded(made):
    """The generic executor writes the command line of each job, which goes through a shell."""
    (made / "submit.sh").write_text('cp "$1" job-of-cluster.sh; bash "$1" > job.log 2>&1; echo 1')
    words_typed = ["name=x", 'report.title=it\'s "$HOME" `id` #1']
    options = ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", "bash submit.sh"]
    options += ["--cluster-generic-status-cmd", "echo success; :", "--jobs", "1"]
    call = ["run", "smollm2-135m", *words_typed, "--", "results/x/estimate.h5", *options]
    done = theloom(made, *call)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = request.of_words("smollm2-135m", words_typed).arguments()
    assert "--config '{}' '{}'".format(*asked) in (made / "job-of-cluster.sh").read_text()
    assert (made / "results/x/estimate.h5").is_file()
