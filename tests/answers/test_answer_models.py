"""Answers of SmolLM2's first blocks and of other architectures against plain `generate` and a
decode loop.
"""

import json

import pytest
import torch
from answers_support import answered, answers_of, decode_loop
from theloom.answers.answer import seed_of
from theloom.answers.choice import Sampling
from theloom.answers.sampler import PADDED, Generation, Row
from theloom.dataset.activations import open_activations
from theloom.extraction import extract_generated
from theloom.pipeline import load_model
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "One",
    "def add(a, b):\n    return",
    "My sister said that we",
]
NEW = 10
DRAWN = {"temperature": 0.9, "top_p": 0.9, "top_k": 40}
HOOKS = {f"blocks.{n}.hook_resid_post": n for n in (1, 4)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "prompts.jsonl"
    lines = [{"text": text, "id": f"p{n}"} for n, text in enumerate(PROMPTS)]
    file.write_text("\n".join(map(json.dumps, lines)))
    hooks = f"memory.activation_cache_filter=[{','.join(HOOKS)}] extraction.shards=1"
    return f"corpus=text corpus.path={file} corpus.id_column=id {hooks}"


@pytest.fixture(scope="module")
def plain(smollm2_part):
    return AutoModelForCausalLM.from_pretrained(smollm2_part.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2_part):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_part.folder)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def generated(plain, ids, seed=0, **options):
    """The oracle: `generate` of transformers, one prompt alone, with the global generator."""
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "pad_token_id": 0} | options
    with torch.no_grad():
        found = plain.generate(torch.tensor([ids]), **options)
    return found[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def greedy(corpus, smollm2_part, tmp_path_factory):
    """Greedy answers in batches of three prompts that differ in length."""
    asked = f"answers.max_new_tokens={NEW} answers.batch=3 rows.keep=generated"
    folder = tmp_path_factory.mktemp("greedy") / "run"
    return answered(folder, smollm2_part.folder, corpus, asked)


def test_greedy_answers_of_smollm2_are_those_of_generate(greedy, plain, prompts):
    found = answers_of(greedy)
    for n, ids in enumerate(prompts):
        assert found[f"p{n}#0"][0] == generated(plain, ids, do_sample=False)


@pytest.fixture(scope="module")
def drawn(plain, prompts):
    seeds = [seed_of(0, f"p{n}", 0) for n in range(len(prompts))]
    return [
        generated(plain, ids, seed, do_sample=True, **DRAWN)
        for ids, seed in zip(prompts, seeds, strict=True)
    ]


@pytest.mark.parametrize("together", [1, 4])
def test_drawn_answers_of_smollm2_are_those_of_generate(
    corpus, smollm2_part, drawn, prompts, tmp_path, together
):
    asked = " ".join(f"answers.{name}={value}" for name, value in DRAWN.items())
    asked += f" answers.max_new_tokens={NEW} answers.batch={together}"
    found = answers_of(answered(tmp_path, smollm2_part.folder, corpus, asked))
    for n in range(len(prompts)):
        tokens, _, _, seed = found[f"p{n}#0"]
        assert seed == seed_of(0, f"p{n}", 0)
        assert tokens == drawn[n]


def test_states_of_smollm2s_answers_are_those_of_a_decode_loop(greedy, plain, prompts):
    files = (greedy.folder / name for name in ("estimate.h5", "answers.h5", "model.h5"))
    load_model.record(greedy.config("model"), *files)
    greedy.extract()
    greedy.merge()
    acts, found = open_activations(greedy.activations), answers_of(greedy)
    for hook, block in HOOKS.items():
        for n, ids in enumerate(prompts):
            seen = decode_loop(plain, plain.model.layers[block], ids, found[f"p{n}#0"][0])
            stored = acts[hook][:][torch.tensor(acts.rows["answer_prompt"] == f"p{n}")]
            assert stored.shape == seen.shape
            assert (stored - seen).abs().max() <= 1e-4 * seen.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "mamba2"])
def test_answers_and_their_states_are_those_of_generate(kind):
    model = random_model(kind)
    drawn = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [Row(ids[:n], 5 + n, 16) for ids, n in zip(drawn, (20, 3, 11), strict=True)]
    generation = Generation(model, Sampling(0.9, 0.95, 50), frozenset(), None, "fp32")
    assert generation.ways() == PADDED
    generation.answer(rows)
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_new_tokens": 16}
    for row in rows:
        expected = generated(
            model, row.prompt, row.seed, do_sample=True, eos_token_id=None, **options
        )
        assert row.ids == expected
    hook, prompts = "blocks.1.hook_resid_post", [row.prompt for row in rows]
    found = extract_generated(model, prompts, 16, hooks=[hook])
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for n, ids in enumerate(prompts):
        answer = found.tokens[n][len(ids) :].tolist()
        assert answer == generated(model, ids, do_sample=False, max_new_tokens=16)
        seen = decode_loop(model, blocks[1], ids, answer)
        assert found[hook][n].shape == seen.shape
        assert (found[hook][n] - seen).abs().max() <= 1e-4 * seen.abs().max()


def random_model(kind):
    """A tiny model with weights that are scaled by 1/√fan-in; windows are of 8 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
