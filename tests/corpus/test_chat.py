"""Conversations: whose each token is, by ten templates in the wild, against masks made by hand."""

import json
from pathlib import Path

import h5py
import pyarrow as pa
import pyarrow.parquet
import pytest
import theloom
from corpus_support import byte_tokenizer
from support import build_tiny, stages
from theloom.corpus import tokens
from theloom.corpus.tokens_file import reading
from theloom.errors import CorpusError
from theloom.rows.roles import ROLES
from transformers import AutoTokenizer

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<start_of_turn>")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny model whose tokens are bytes and some special ones."""
    folder = build_tiny("llama", tmp_path_factory.mktemp("chat"), vocab_size=280)
    tokenizer = byte_tokenizer(folder)
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": list(SPECIAL[2:])}
    )
    tokenizer.save_pretrained(folder)
    return folder


def talk(*turns):
    """Turns of the roles of their first letters: s, u, a, t."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[turn[0]], "content": turn[1:]} for turn in turns]


TWO = talk("sBe brief. ", "u Hi user", "aassistant: hello", "uBye 🧵", "aciao")
NO_SYSTEM = TWO[1:]
# what each template writes, piece by piece: who says it, and in which message; "" is the template
HAND_MADE = {
    "chatml": (
        TWO,
        [
            ("", -1, "<|im_start|>system\n"),
            ("s", 0, "Be brief. "),
            ("", -1, "<|im_end|>\n"),
            ("", -1, "<|im_start|>user\n"),
            ("u", 1, " Hi user"),
            ("", -1, "<|im_end|>\n"),
            ("", -1, "<|im_start|>assistant\n"),
            ("a", 2, "assistant: hello<|im_end|>\n"),
            ("", -1, "<|im_start|>user\n"),
            ("u", 3, "Bye 🧵"),
            ("", -1, "<|im_end|>\n"),
            ("", -1, "<|im_start|>assistant\n"),
            ("a", 4, "ciao<|im_end|>\n"),
        ],
    ),
    "llama3": (
        TWO,
        [
            ("", -1, "<s><|start_header_id|>system<|end_header_id|>\n\n"),
            ("s", 0, "Be brief."),
            ("", -1, "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"),
            ("u", 1, "Hi user"),
            ("", -1, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
            ("a", 2, "assistant: hello<|eot_id|>"),
            ("", -1, "<|start_header_id|>user<|end_header_id|>\n\n"),
            ("u", 3, "Bye 🧵"),
            ("", -1, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
            ("a", 4, "ciao<|eot_id|>"),
        ],
    ),
    "gemma": (
        NO_SYSTEM,
        [
            ("", -1, "<s><start_of_turn>user\n"),
            ("u", 0, "Hi user"),
            ("", -1, "<end_of_turn>\n"),
            ("", -1, "<start_of_turn>model\n"),
            ("a", 1, "assistant: hello<end_of_turn>\n"),
            ("", -1, "<start_of_turn>user\n"),
            ("u", 2, "Bye 🧵"),
            ("", -1, "<end_of_turn>\n"),
            ("", -1, "<start_of_turn>model\n"),
            ("a", 3, "ciao<end_of_turn>\n"),
        ],
    ),
    "mistral": (
        NO_SYSTEM,
        [
            ("", -1, "<s>[INST] "),
            ("u", 0, " Hi user"),
            ("", -1, "[/INST]"),
            ("a", 1, " assistant: hello</s>"),
            ("", -1, "[INST] "),
            ("u", 2, "Bye 🧵"),
            ("", -1, "[/INST]"),
            ("a", 3, " ciao</s>"),
        ],
    ),
    "qwen25": (
        NO_SYSTEM,
        [
            ("", -1, "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n"),
            ("u", 0, " Hi user"),
            ("", -1, "<|im_end|>\n<|im_start|>assistant\n"),
            ("a", 1, "assistant: hello<|im_end|>\n"),
            ("", -1, "<|im_start|>user\n"),
            ("u", 2, "Bye 🧵"),
            ("", -1, "<|im_end|>\n<|im_start|>assistant\n"),
            ("a", 3, "ciao<|im_end|>\n"),
        ],
    ),
    "qwen3": (
        talk("uWhy?", "a<think>\nhm\n</think>\n\nSo."),
        [
            ("", -1, "<|im_start|>user\n"),
            ("u", 0, "Why?"),
            ("", -1, "<|im_end|>\n"),
            ("", -1, "<|im_start|>assistant\n"),
            ("a", 1, "<think>\nhm\n</think>\n\nSo.<|im_end|>\n"),
        ],
    ),
    "phi3": (
        TWO,
        [
            ("", -1, "<|system|>\n"),
            ("s", 0, "Be brief. "),
            ("", -1, "<|end|>\n<|user|>\n"),
            ("u", 1, " Hi user"),
            ("", -1, "<|end|>\n<|assistant|>\n"),
            ("a", 2, "assistant: hello<|end|>\n"),
            ("", -1, "<|user|>\n"),
            ("u", 3, "Bye 🧵"),
            ("", -1, "<|end|>\n<|assistant|>\n"),
            ("a", 4, "ciao<|end|>\n"),
        ],
    ),
    "zephyr": (
        TWO,
        [
            ("", -1, "<|system|>\n"),
            ("s", 0, "Be brief. "),
            ("", -1, "</s>\n<|user|>\n"),
            ("u", 1, " Hi user"),
            ("", -1, "</s>\n<|assistant|>\n"),
            ("a", 2, "assistant: hello</s>\n"),
            ("", -1, "<|user|>\n"),
            ("u", 3, "Bye 🧵"),
            ("", -1, "</s>\n<|assistant|>\n"),
            ("a", 4, "ciao</s>\n"),
        ],
    ),
    "deepseek_r1": (
        talk("sBe brief.", "uHi", "a<think>hm</think>hello", "uBye", "aciao"),
        [
            ("", -1, "<s>"),
            ("s", 0, "Be brief."),
            ("", -1, "<｜User｜>"),
            ("u", 1, "Hi"),
            ("", -1, "<｜Assistant｜>"),
            ("a", 2, "hello</s>"),
            ("", -1, "<｜User｜>"),
            ("u", 3, "Bye"),
            ("", -1, "<｜Assistant｜>"),
            ("a", 4, "ciao</s>"),
        ],
    ),
    "generation": (
        TWO,
        [
            ("", -1, "<s><|system|>\n"),
            ("s", 0, "Be brief. "),
            ("", -1, "\n<|user|>\n"),
            ("u", 1, " Hi user"),
            ("", -1, "\n<|assistant|>\n"),
            ("a", 2, "assistant: hello</s>"),
            ("", -1, "\n<|user|>\n"),
            ("u", 3, "Bye 🧵"),
            ("", -1, "\n<|assistant|>\n"),
            ("a", 4, "ciao</s>"),
            ("", -1, "\n"),
        ],
    ),
}
CODES = {"": "template", "s": "system", "u": "user", "a": "assistant", "t": "tool"}


def made(folder, model, conversations, template, overrides="", name="x.jsonl", **more):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"messages": c, **more}) for c in conversations]
    (folder / name).write_text("\n".join(lines))
    path = TEMPLATES / f"{template}.jinja"
    requested = f"corpus=text corpus.path={folder}/{name} corpus.messages=messages {overrides}"
    run = stages(folder / "run", model, f"{requested} corpus.chat_template={path}")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    with h5py.File(run.folder / "tokens.h5") as file:
        return {name: file[f"tokens/{name}"][:].tolist() for name in file["tokens"]}, run


def refused(*arguments, **named):
    with pytest.raises(CorpusError) as caught:
        made(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_hand(model, pieces):
    """Ids, roles and messages of pieces that are tokenised one by one: each token is one byte or a
    special one, so no token lies across two.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, role, message = [], [], []
    for who, number, text in pieces:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        role += [ROLES.index(CODES[who])] * len(found)
        message += [number] * len(found)
    return ids, role, message


@pytest.mark.parametrize("template", HAND_MADE)
def test_masks_are_those_made_by_hand(tmp_path, model, template):
    conversation, pieces = HAND_MADE[template]
    found, _ = made(tmp_path, model, [conversation], template)
    ids, role, message = by_hand(model, pieces)
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = tokenizer.apply_chat_template(
        conversation, chat_template=(TEMPLATES / f"{template}.jinja").read_text(), tokenize=True
    )
    assert found["input_ids"] == ids == list(plain["input_ids"])
    assert found["role"] == role
    assert found["message"] == message
    bos = tokenizer.bos_token_id
    assert found["input_ids"].count(bos) == (
        "bos_token" in (TEMPLATES / f"{template}.jinja").read_text()
    )
    special = set(tokenizer.all_special_ids)
    assert found["special"] == [i in special for i in ids]


def test_marks_of_generation_are_those_of_transformers(tmp_path, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    found, run = made(tmp_path, model, [TWO, NO_SYSTEM], "generation")
    masks = []
    for conversation in (TWO, NO_SYSTEM):
        plain = tokenizer.apply_chat_template(
            conversation,
            chat_template=(TEMPLATES / "generation.jinja").read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        masks += plain["assistant_masks"]
    assert [int(r == ROLES.index("assistant")) for r in found["role"]] == masks
    assert reading.attributes(run.folder / "tokens.h5")["assistant_tokens"] == "generation marks"


THOUGHTS = talk("uWhy?", "a<think>\nhm\n</think>\n\nSo.", "uAnd?", "aNo.")


@pytest.mark.parametrize(("template", "messages"), [("qwen3", THOUGHTS), ("mistral", TWO)])
def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, model, template, messages):
    said = refused(tmp_path, model, [talk("uHi", "aYo"), messages], template)
    assert "x.jsonl, line 2" in said
    assert f"message {2 if template == 'qwen3' else 3} of {len(messages)}" in said
    assert "rewrites earlier turns" in said
    assert "{% generation %}" in said


TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
CALL = [
    {"role": "user", "content": "1+1?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "name": "sum", "content": "2"},
    {"role": "assistant", "content": "Two."},
]
CALL_PIECES = [
    ("", -1, "<|im_start|>system\nYou are Qwen.\n\n# Tools\n\n<tools>\n" + json.dumps(TOOLS[0])),
    ("", -1, "\n</tools><|im_end|>\n<|im_start|>user\n"),
    ("u", 0, "1+1?"),
    ("", -1, "<|im_end|>\n<|im_start|>assistant\n"),
    ("a", 1, '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'),
    ("", -1, "<|im_start|>user\n<tool_response>\n"),
    ("t", 2, "2"),
    ("", -1, "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
    ("a", 3, "Two.<|im_end|>\n"),
]


def test_tools_and_their_calls_are_the_assistant_s_and_the_tool_s(tmp_path, model):
    found, _ = made(tmp_path, model, [CALL], "qwen25", tools=TOOLS)
    assert (found["input_ids"], found["role"], found["message"]) == by_hand(model, CALL_PIECES)
    # a table gives every message all keys of all messages, null where it has none
    parquet = tmp_path / "x.parquet"
    table = pa.table({"messages": [CALL], "tools": [json.dumps(TOOLS)]})
    pyarrow.parquet.write_table(table, parquet)
    requested = f"corpus=text corpus.path={parquet} corpus.messages=messages"
    template = TEMPLATES / "qwen25.jinja"
    run = stages(tmp_path / "p", model, f"{requested} corpus.chat_template={template}")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    with h5py.File(run.folder / "tokens.h5") as file:
        assert file["tokens/input_ids"][:].tolist() == found["input_ids"]
        assert file["tokens/role"][:].tolist() == found["role"]


def test_calls_of_tools_as_llama_3_1_writes_them(tmp_path, model):
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    pieces = [
        ("", -1, "<s>" + header("user")),
        ("u", 0, "1+1?"),
        ("", -1, "<|eot_id|>" + header("assistant")),
        ("a", 1, '{"name": "sum", "parameters": {"a": 1}}<|eot_id|>'),
        ("", -1, header("ipython") + '"'),
        ("t", 2, "2"),
        ("", -1, '"<|eot_id|>' + header("assistant")),
        ("a", 3, "Two.<|eot_id|>"),
    ]
    found, _ = made(tmp_path, model, [CALL], "llama31_tools")
    assert (found["input_ids"], found["role"], found["message"]) == by_hand(model, pieces)


def test_from_and_value_are_role_and_content(tmp_path, model):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [{"from": names[m["role"]], "value": m["content"]} for m in TWO]
    assert (
        made(tmp_path / "a", model, [other], "chatml")[0]
        == made(tmp_path / "b", model, [TWO], "chatml")[0]
    )


def test_roles_reach_the_merged_file_and_its_tables(tmp_path, model):
    lines = [{"messages": c, "label": n} for n, c in enumerate([TWO, [], NO_SYSTEM, None])]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    requested = (
        f"corpus=text corpus.path={tmp_path}/x.jsonl corpus.messages=messages extraction.shards=2 "
        f"corpus.columns=[label] corpus.chat_template={TEMPLATES}/chatml.jinja"
    )
    run = stages(tmp_path / "run", model, requested).all()
    run.verify()
    acts = theloom.open(run.activations)
    frame = acts.to_dataframe("tokens")
    whole = HAND_MADE["chatml"][1]
    _, role, message = by_hand(model, whole)
    first = frame[frame["document"] == 0]
    assert first["role"].tolist() == [ROLES[r] for r in role]
    assert first["message"].tolist() == message
    assert frame["label"].unique().tolist() == [0, 2]
    assert acts.attributes["empty_documents"] == 2
    text = "".join(piece for _, _, piece in whole)
    spans = zip(first["char_start"], first["char_end"], strict=True)
    assert all(text[a:b] for a, b in spans)


@pytest.mark.parametrize(
    ("conversation", "template", "words"),
    [
        ([{"role": "user"}, {"content": "x"}], "chatml", "message 2: its role is missing"),
        ([{"role": "narrator", "content": "x"}], "chatml", "its role is 'narrator'; give one of"),
        (["x"], "chatml", "message 1: is a text, not an object"),
        ([{"role": "user", "content": 7}], "chatml", "its content is a number"),
        ("x", "chatml", "column 'messages' is a text, not a list of messages"),
        (talk("uHi", "uHo", "aYo"), "gemma", "roles must alternate"),
        (talk("sBe", "uHi", "aYo"), "gemma", "System role not supported"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "chatml", "fails on"),
        (talk("u\ud800"), "chatml", "lone surrogate"),
        (talk("uHi", "a"), "generation_of_none", "gives the assistant no token"),
        (talk("uHi", "aYo"), "bos_twice", "begins with the token that begins a text twice"),
        (talk("uHi", "aYo"), "broken", "the chat template of"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(
    tmp_path, model, monkeypatch, conversation, template, words
):
    own = {
        "generation_of_none": "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        "bos_twice": "{{ bos_token * 2 }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "broken": "{% for m in messages %}{{ m.content",
    }
    if template in own:
        (tmp_path / f"{template}.jinja").write_text(own[template])
        monkeypatch.setattr("test_chat.TEMPLATES", tmp_path)
    said = refused(tmp_path, model, [talk("uA", "aB"), conversation], template)
    assert words in said


def test_a_tokenizer_without_a_template_is_refused(tmp_path, model):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TWO}))
    run = stages(
        tmp_path / "run", model, f"corpus=text corpus.path={tmp_path} corpus.messages=messages"
    )
    with pytest.raises(CorpusError, match=r"has no chat template; set corpus\.chat_template"):
        tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
