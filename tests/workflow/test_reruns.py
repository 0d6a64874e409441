"""What a changed key runs again, what an edit during a run leaves alone, and what a dry run
imports.
"""

import json
import re
import subprocess
import sys
import time

import preloading
import pytest
import theloom
from support import copy_project
from theloom.verification import recorded


@pytest.fixture
def tiny(project, tiny_profile):
    tiny_profile(project)
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_profile):
    project = copy_project(tmp_path_factory.mktemp("finished"))
    tiny_profile(project)
    done = project.snakemake(profiles="tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def edited(project, before, after):
    """Change a text in the profile; returns a function that changes it back."""
    path = project.folder / "config/profile/tiny.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    return lambda: path.write_text(text)


REST = {"merge_shards": 1, "verify": 1}
EXTRACTION = {"estimate_memory": 1, "extract_shard": 2, **REST}


@pytest.mark.parametrize(
    ("before", "after", "jobs"),
    [
        (
            "streaming_chunk_size: 64",
            "streaming_chunk_size: 32",
            {"freeze_config": 1, "estimate_memory": 1},  # rounding alone: all rows are kept
        ),
        ("extraction:", "extraction: # a remark", {}),
        ("extraction:", "verify: {documents: 3}\nextraction:", {"freeze_config": 1, "verify": 1}),
        (
            "extraction:",
            "verify: {jobs: 2}\nextraction:",
            {"check_rows": 2, "recompute_documents": 2, "verify": 1},
        ),
        ("extraction:", "store: {merge: physical}\nextraction:", {"freeze_config": 1, **REST}),
        ("extraction:", "resources: {mem_mb: 999, tokenize_jobs: 3}\nextraction:", {}),
        (
            "max_tokens: 3000",
            "max_tokens: 2000",
            {"freeze_config": 2, "tokenize_corpus": 1, **EXTRACTION},
        ),
    ],
)
def test_a_changed_key_runs_again_what_depends_on_it_and_nothing_before(
    finished, before, after, jobs
):
    back = edited(finished, before, after)
    try:
        assert finished.jobs(profiles="tiny") == jobs
    finally:
        back()


def test_with_the_old_keys_there_is_nothing_to_do(finished):
    assert finished.jobs(profiles="tiny") == {}


def test_an_unfinished_run_goes_on_with_other_resources(finished):
    folder = finished.results("tiny")
    files = [
        folder / name for name in ("shards/00000-of-00002.h5", "activations.h5", "verification.h5")
    ]
    kept = {file: file.rename(file.with_suffix(".kept")) for file in files}
    back = edited(finished, "extraction:", "resources: {mem_mb: 999}\nextraction:")
    try:
        assert finished.jobs(profiles="tiny") == {"extract_shard": 1, **REST}
    finally:
        back()
        for file, other in kept.items():
            other.rename(file)


def test_a_shard_that_is_deleted_is_made_anew(finished):
    shard = finished.results("tiny") / "shards/00001-of-00002.h5"
    kept = shard.rename(shard.with_suffix(".kept"))
    try:
        assert finished.jobs(profiles="tiny") == {"extract_shard": 1, **REST}
    finally:
        kept.rename(shard)


def test_an_edit_during_a_run_changes_nothing_in_it(tiny):
    command = tiny.command(profiles="tiny", overrides="verify.jobs=2")
    running = subprocess.Popen(
        command,
        cwd=tiny.folder,
        env=preloading.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun = tiny.results("tiny") / "config/estimate.json"
    while not begun.exists() and running.poll() is None:
        time.sleep(0.01)
    for file in ("default.yaml", "profile/tiny.yaml"):
        path = tiny.folder / "config" / file
        path.write_text(
            re.sub(r"streaming_chunk_size: \d+", "streaming_chunk_size: 16", path.read_text())
        )
    (tiny.folder / "config/corpus/python-docs.yaml").write_text("kind: [this is, no corpus")
    printed, _ = running.communicate(timeout=1800)
    assert running.returncode == 0, printed
    frozen = json.loads((tiny.results("tiny") / "config/estimate.json").read_text())
    assert frozen["config"]["memory"]["streaming_chunk_size"] == 64
    acts = theloom.open(tiny.results("tiny") / "activations.h5")
    assert acts.attributes["chunk_size"] == "[64, 64]"
    assert len(acts) == 3000
    assert recorded.read(tiny.results("tiny") / "verification.h5").documents == 3
    assert not list(tiny.results("tiny").glob("verification/*/*.h5"))  # gathered


def test_planning_imports_neither_torch_nor_transformers(project):
    spy = (
        "import sys; from snakemake.cli import main\n"
        "try: main(['--dry-run', '--quiet', 'all'])\n"
        "except SystemExit as done: code = done.code\n"
        "names = ('torch', 'transformers', 'datasets', 'matplotlib')\n"
        "heavy = [m for m in names if m in sys.modules]\n"
        "print(code or 0, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", spy], cwd=project.folder, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_a_failed_run_of_a_sweep_does_not_stop_the_others(tiny):
    texts = tiny.folder / "texts"
    texts.mkdir()
    (texts / "bad.txt").write_bytes(b"\xff\xff")
    (texts / "good.txt").write_text("some good text " * 20)
    requested = f"corpus=text corpus.path={texts}/bad.txt,{texts}/good.txt"
    done = tiny.snakemake(profiles="tiny", overrides=requested)
    assert done.returncode != 0
    (finished,) = (tiny.folder / "results").glob("*/verification.h5")
    assert "bad.txt, line 1: not utf-8" in done.stdout + done.stderr
    assert len(theloom.open(finished.parent / "activations.h5").documents) == 1
