"""Answers that another engine wrote, in a column of the corpus, and answers to conversations."""

import json
from itertools import pairwise

import h5py
import numpy as np
import pytest
from model_folders import byte_tokenizer
from support import ROOT, build_tiny, stages
from theloom.corpus import tokens
from theloom.dataset.activations import open_activations
from theloom.errors import CorpusError
from theloom.planning import estimate
from transformers import AutoTokenizer

HOOK = "blocks.2.hook_resid_post"
PROMPTS = ["The capital", "a", "Once upon a time"]
ONE_HOOK = f"memory.activation_cache_filter=[{HOOK}] extraction.shards=1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=320)
    tokenizer = byte_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def table(folder, rows):
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return f"corpus=text corpus.path={file}"


def prepared(folder, model, asked):
    """A run with its answers, and nothing extracted."""
    run = stages(folder, model, f"{asked} {ONE_HOOK}")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    run.answer()
    return run


def refused(folder, model, rows, more="answers.column=out"):
    with pytest.raises(CorpusError) as error:
        prepared(folder, model, f"{table(folder, rows)} answers.source=column {more}")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_answers_of_vllm_give_the_rows_of_ones_own_sampling(model, tmp_path):
    own = table(tmp_path / "own", [{"text": text} for text in PROMPTS])
    asked = "answers.source=model answers.max_new_tokens=9 answers.temperature=1 answers.samples=2"
    run = stages(tmp_path / "a", model, f"{own} {asked} {ONE_HOOK} rows.keep=generated").all()
    sampled = open_activations(run.activations)
    rows, tokenizer = [], AutoTokenizer.from_pretrained(model)
    with h5py.File(run.documents) as file:
        ids, offset = file["tokens/input_ids"][:].tolist(), file["documents/offset"][:].tolist()
        answers = [ids[a:b] for a, b in pairwise(offset)]
        known = file["answers/log_probability"][:]
    for n, prompt in enumerate(PROMPTS):
        before = tokenizer(prompt)["input_ids"]
        outputs = [
            {"index": i, "text": "?", "token_ids": answers[2 * n + i][len(before) :],
             "finish_reason": "length", "stop_reason": None}
            for i in range(2)
        ]  # fmt: skip
        rows.append({"prompt_token_ids": before, "outputs": outputs, "finished": True})
    given = table(tmp_path / "given", rows)
    other = stages(
        tmp_path / "b",
        model,
        f"{given} corpus.input_ids=prompt_token_ids answers.source=column answers.column=outputs "
        f"{ONE_HOOK} rows.keep=generated",
    ).all()
    other.verify()
    taken = open_activations(other.activations)
    np.testing.assert_array_equal(taken.rows["input_id"], sampled.rows["input_id"])
    np.testing.assert_allclose(taken[HOOK][:], sampled[HOOK][:], atol=1e-5)
    assert set(taken.rows["answer_stop"].tolist()) == {"length"}
    assert np.isfinite(known).all()
    with h5py.File(other.documents) as file:
        assert np.isnan(file["answers/log_probability"][:]).all()


@pytest.mark.parametrize(
    "cell",
    [
        [{"output_ids": [70, 71], "text": "", "meta_info": {"finish_reason": {"type": "stop"}}}],
        {"token_ids": [70, 71], "finish_reason": "stop", "stop_reason": None},
        [70, 71],
        [[70, 71]],
    ],
    ids=["sglang", "vllm", "ids", "lists"],
)
def test_token_ids_are_taken_as_they_are(model, tmp_path, cell):
    asked = f"{table(tmp_path, [{'text': 'Hi', 'out': cell}])} answers.source=column"
    run = prepared(tmp_path / "run", model, f"{asked} answers.column=out")
    expected = [*AutoTokenizer.from_pretrained(model)("Hi")["input_ids"], 70, 71]
    with h5py.File(run.documents) as file:
        assert file["tokens/input_ids"][:].tolist() == expected
        assert file["answers/stop_reason"][0] in (b"eos", b"given")


def test_texts_are_tokenised_behind_their_prompts_and_matched(model, tmp_path):
    rows = [{"text": "Is it?", "out": [" Yes, it is.", " No."], "kind": "a"}]
    asked = f"{table(tmp_path, rows)} answers.source=column answers.column=out"
    keep = "'match(\"it is|it\") & generated'"
    run = prepared(tmp_path / "run", model, f"{asked} rows.keep={keep} corpus.columns=[kind]")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with h5py.File(run.documents) as file:
        ids, kept = file["tokens/input_ids"][:], file["tokens/kept"][:].astype(bool)
        names = file["documents/id"][:].tolist()
        assert tokenizer.decode(ids[kept]) == "it is"
        assert [n.decode().partition("#")[2] for n in names] == ["0", "1"]
        first = slice(*file["documents/offset"][:2])
        assert ids[first].tolist() == tokenizer("Is it? Yes, it is.")["input_ids"]


def test_conversations_get_their_generation_prompt(model, tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    talk.append({"role": "user", "content": "Why?"})
    template = ROOT / "tests/corpus/templates/chatml.jinja"
    asked = (
        f"{table(tmp_path, [{'talk': talk}])} corpus.messages=talk answers.max_new_tokens=5 "
        f"corpus.chat_template={template} answers.source=model"
    )
    folder = tmp_path / "run"
    run = stages(folder, model, f"{asked} {ONE_HOOK} rows.keep='assistant & message(-1)'")
    estimate.run_estimate(run.config("estimate"), folder / "estimate.h5")
    tokens.tokenize(run.config("tokens"), folder / "tokens.h5")
    run.answer()
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = tokenizer.apply_chat_template(
        talk, chat_template=template.read_text(), add_generation_prompt=True, return_dict=False
    )
    with h5py.File(run.documents) as file:
        count = len(expected)
        assert file["tokens/input_ids"][:count].tolist() == expected
        generated = file["tokens/generated"][:]
        assert generated.tolist() == [0] * count + [1] * (len(generated) - count)
        np.testing.assert_array_equal(file["tokens/kept"][:], generated)
        assert (file["tokens/message"][:][generated == 1] == 3).all()


def test_what_cannot_be_an_answer_is_refused_in_one_line(model, tmp_path):
    def of(cell, more="answers.column=out"):
        return refused(tmp_path, model, [{"text": "Hi", "out": cell}], more)

    assert "has no answer in column 'out'" in of(None)
    assert "an answer is empty" in of("")
    assert "an answer is empty" in of([])
    assert "neither token_ids, output_ids nor text" in of([{"logprob": 1}])
    assert "is a number" in of(3)
    assert "not a list of integers" in of([{"token_ids": ["a"]}])
    assert "99999" in of([99999])
    assert "no column 'nowhere'" in of("x", "answers.column=nowhere")
    assert "leaves no room for an answer" in of("x", "answers.column=out corpus.context_length=3")
    assert "more than the context of 8" in of(
        "a long one", "answers.column=out corpus.context_length=8"
    )
