"""Rows of conversations: by role and by message, and pooled by message across windows."""

import json

import numpy as np
import pytest
import torch
from corpus_support import byte_tokenizer
from support import ROOT, build_tiny, plain_residuals, stages
from theloom.dataset.activations import open_activations
from transformers import AutoTokenizer

HOOK, WINDOW = "blocks.1.hook_resid_post", 40
TALKS = [[("user", "Hi"), ("assistant", "Hello you")], [("user", "Why?"), ("assistant", "So.")] * 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("chat"), vocab_size=280)
    tokenizer = byte_tokenizer(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "talks.jsonl"
    rows = [[{"role": role, "content": text} for role, text in talk] for talk in TALKS]
    file.write_text("\n".join(json.dumps({"talk": row, "label": n}) for n, row in enumerate(rows)))
    template = ROOT / "tests/corpus/templates/chatml.jinja"
    return (
        f"corpus=text corpus.path={file} corpus.messages=talk corpus.chat_template={template} "
        f"corpus.columns=[label] corpus.context_length={WINDOW} extraction.shards=1 "
        f"memory.activation_cache_filter=[{HOOK}]"
    )


@pytest.fixture(scope="module")
def by_hand(model):
    """By conversation the states of all tokens, each window by itself, and each token's message."""
    tokenizer, found = AutoTokenizer.from_pretrained(model), []
    for talk in TALKS:
        ids, message = [], []
        for number, (role, text) in enumerate(talk):
            end = "<|im_end|>\n"
            inside = text + end if role == "assistant" else text
            for piece, of in (
                (f"<|im_start|>{role}\n", -1),
                (inside, number),
                ("" if role == "assistant" else end, -1),
            ):
                some = tokenizer(piece)["input_ids"] if piece else []
                ids += some
                message += [of] * len(some)
        parts = [plain_residuals(model, ids[a : a + WINDOW]) for a in range(0, len(ids), WINDOW)]
        states = torch.cat([part[HOOK] for part in parts]).double().numpy()
        found.append((states, np.array(message)))
    return found


@pytest.mark.parametrize(
    "mode", ["", "memory.streaming_chunk_size=8", "extraction.execution=layerwise"]
)
def test_rows_of_a_role_and_a_message_are_those_of_its_tokens(
    model, corpus, by_hand, tmp_path, mode
):
    run = stages(tmp_path, model, f"{corpus} {mode} rows.keep='assistant & message(-1)'").all()
    run.verify()
    acts = open_activations(run.activations)
    expected = [states[message == message.max()] for states, message in by_hand]
    np.testing.assert_allclose(acts[HOOK][:].numpy(), np.concatenate(expected), atol=1e-5)
    assert set(acts.rows["role"].tolist()) == {"assistant"}
    assert acts.xy(HOOK, "label")[1].tolist() == [n for n in (0, 1) for _ in expected[n]]


def test_messages_are_pooled_across_windows(model, corpus, by_hand, tmp_path):
    run = stages(tmp_path, model, f"{corpus} rows.pool=mean rows.by=message").all()
    run.verify()
    acts = open_activations(run.activations)
    expected = [s[m == n].mean(axis=0) for s, m in by_hand for n in range(m.max() + 1)]
    assert any(len(states) > WINDOW for states, _ in by_hand)
    np.testing.assert_allclose(acts[HOOK][:].numpy(), expected, atol=1e-6)
    assert acts.rows["message"].tolist() == [0, 1, 0, 1, 2, 3]
    assert acts.rows["role"].tolist() == ["user", "assistant"] * 3


def test_a_file_of_all_rows_is_selected_by_role(model, corpus, by_hand, tmp_path):
    acts = open_activations(stages(tmp_path, model, corpus).all().activations)
    chosen = acts.select("assistant & ~special")
    assert chosen.rows["role"].tolist() == ["assistant"] * len(chosen)
    assert not chosen.rows["special"].any()
    every = np.concatenate(
        [states[(message > 0) & (message % 2 == 1)] for states, message in by_hand]
    )
    np.testing.assert_allclose(acts.select("assistant")[HOOK][:].numpy(), every, atol=1e-5)
