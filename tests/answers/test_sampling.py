"""Answers that the run's own model samples, through the stages, against plain `generate`."""

import json

import numpy as np
import pytest
import torch
from answers_support import answered as sampled
from answers_support import answers_of, decode_loop
from model_folders import byte_tokenizer
from support import build_tiny
from theloom.answers.answer import seed_of
from theloom.dataset.activations import open_activations
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital",
    "a",
    "Once upon a time there",
    "x = 1",
    "jumps over",
    "Why?",
    "to be",
    "Z",
]
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=320)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "prompts.jsonl"
    lines = [{"text": text, "id": f"p{n}", "kind": n % 2} for n, text in enumerate(PROMPTS)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return f"corpus=text corpus.path={file} corpus.id_column=id corpus.columns=[kind]"


def answered(folder, source, corpus, more=""):
    return sampled(folder, source, corpus, f"answers.max_new_tokens={NEW} {more}")


def generated(folder, prompt, seed=0, **options):
    """The oracle: `generate` of transformers, one prompt alone."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]])
    torch.manual_seed(seed)
    with torch.no_grad():
        found = plain.generate(ids, max_new_tokens=NEW, pad_token_id=0, **options)
    return found[0, ids.shape[1] :].tolist()


DRAWN = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
SET = " ".join(f"answers.{name}={value}" for name, value in DRAWN.items())


def test_greedy_answers_are_those_of_generate(model, corpus, tmp_path):
    run = answered(tmp_path, model, corpus, "answers.batch=3 extraction.shards=2")
    found = answers_of(run)
    for n, prompt in enumerate(PROMPTS):
        assert found[f"p{n}#0"][0] == generated(model, prompt, do_sample=False)


def test_drawn_answers_are_those_of_generate_with_their_seed(model, corpus, tmp_path):
    more = f"{SET} answers.samples=2 answers.seed=7 extraction.shards=2"
    found = answers_of(answered(tmp_path, model, corpus, more))
    for n, prompt in enumerate(PROMPTS):
        for sample in range(2):
            ids, _, _, seed = found[f"p{n}#{sample}"]
            assert seed == seed_of(7, f"p{n}", sample)
            assert ids == generated(model, prompt, seed, do_sample=True, **DRAWN)
    assert found["p0#0"][0] != found["p0#1"][0]


def test_answers_do_not_depend_on_batches_shards_and_order(model, corpus, tmp_path):
    whole = f"{SET} answers.samples=2"
    cuts = ("answers.batch=1 extraction.shards=4", "answers.batch=16 extraction.shards=1")
    runs = [answered(tmp_path / str(n), model, corpus, f"{whole} {c}") for n, c in enumerate(cuts)]
    one, other = map(answers_of, runs)
    assert {n: a[0] for n, a in one.items()} == {n: a[0] for n, a in other.items()}
    for name in one:
        np.testing.assert_allclose(one[name][1], other[name][1], atol=1e-4)


def test_log_probabilities_are_the_models_own(model, corpus, tmp_path):
    found = answers_of(answered(tmp_path, model, corpus, f"{SET} extraction.shards=1"))
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for n, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        answer, log_probabilities, *_ = found[f"p{n}#0"]
        with torch.no_grad():
            scores = plain(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
        expected = [float(scores[len(ids) - 1 + i, token]) for i, token in enumerate(answer)]
        np.testing.assert_allclose(log_probabilities, expected, atol=1e-4)


def test_states_of_answers_are_those_of_a_decode_loop(model, corpus, tmp_path):
    run = answered(tmp_path, model, corpus, "extraction.shards=2 rows.keep=generated")
    run.all()
    run.verify()
    acts = open_activations(run.activations)
    hook = "blocks.1.hook_resid_post"
    assert set(acts.rows["role"].tolist()) == {"assistant"}
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    for n, prompt in enumerate(PROMPTS):
        ids = AutoTokenizer.from_pretrained(model)(prompt)["input_ids"]
        answer = answers_of(run)[f"p{n}#0"][0]
        seen = decode_loop(plain, plain.model.layers[1], ids, answer)
        number = acts.rows["answer_prompt"] == f"p{n}"
        stored = acts[hook][:].float()[torch.tensor(number)]
        assert (stored - seen).abs().max() <= 1e-4 * seen.abs().max()
    assert acts.rows["kind"].tolist() == [int(p[1:]) % 2 for p in acts.rows["answer_prompt"]]
