"""Answers that the run's own model samples, through the stages, against plain `generate`."""

import json

import h5py
import numpy as np
import pytest
import torch
from model_folders import byte_tokenizer
from support import build_tiny, stages
from theloom.answers.answer import seed_of
from theloom.corpus import tokens
from theloom.dataset.activations import open_activations
from theloom.planning import estimate
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
    folder.mkdir(exist_ok=True)
    asked = f"{corpus} answers.source=model answers.max_new_tokens={NEW} {more}"
    run = stages(folder, source, asked)
    estimate.run_estimate(run.config("estimate"), run.folder / "estimate.h5")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    run.answer()
    return run


def answers_of(run):
    """By document id, the tokens of its answer, their log-probabilities, stop reason and seed."""
    found = {}
    with h5py.File(run.documents) as file:
        ids, generated = file["tokens/input_ids"][:], file["tokens/generated"][:].astype(bool)
        offset, part = file["documents/offset"][:], file["answers/offset"][:]
        for n, name in enumerate(file["documents/id"][:].tolist()):
            own = slice(offset[n], offset[n + 1])
            found[name.decode()] = (
                ids[own][generated[own]].tolist(),
                file["answers/log_probability"][part[n] : part[n + 1]],
                file["answers/stop_reason"][n].decode(),
                int(file["answers/seed"][n]),
            )
    return found


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


def decode_loop(plain, block, ids, answer):
    """What a hook on a block sees of each token of an answer while it is decoded with a KV cache:
    a token's state comes with the step that takes it as input, the last one's with one step more.
    """
    seen = []
    hook = block.register_forward_hook(
        lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1:])
    )
    with torch.no_grad():
        out = plain(torch.tensor([ids]), use_cache=True)
        seen.clear()
        for token in answer:
            out = plain(torch.tensor([[token]]), past_key_values=out.past_key_values)
    hook.remove()
    return torch.cat([s.reshape(1, -1) for s in seen])
