"""Have a loaded model answer prompts, and extract the hidden states of prompts and answers.

Answers are sampled first; then one pass over prompt and answer gives the states. For a causal model
they are those of the decoding, up to rounding, and the last token's is among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from theloom.answers.answer import seed_of
from theloom.answers.choice import TOLERANCE, Sampling
from theloom.answers.sampler import ONE_BY_ONE, PADDED, Generation, Row, end_ids
from theloom.errors import InputError, ModelError
from theloom.extraction.api import extract_hidden_states
from theloom.extraction.padding import Tokens
from theloom.extraction.request import ask
from theloom.hooks.layouts.trial import evaluating
from theloom.precision import precision_of
from theloom.rows import expression
from theloom.rows.document import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class GeneratedStates:
    """Answers of a model, with hidden states. Each list has an entry for each prompt.

    Attributes:
        tokens: The token ids of prompt and answer.
        prompt_lengths: How many of them are the prompt's.
        log_probabilities: Of each token of the answer, as the model gives them (FP32).
        stop_reasons: `eos` where the model ended the answer, `length` at `max_new_tokens`.
        rows: The places of the tokens whose states are kept, counted from the first of the prompt.
        states: By hook name, the states of these tokens, (rows, …).
    """

    tokens: list[torch.Tensor]
    prompt_lengths: list[int]
    log_probabilities: list[torch.Tensor]
    stop_reasons: list[str]
    rows: list[torch.Tensor]
    states: dict[str, list[torch.Tensor]]

    def __getitem__(self, hook: str) -> list[torch.Tensor]:
        return self.states[hook]


def extract_generated(
    model: "PreTrainedModel",
    tokens: Tokens,
    max_new_tokens: int = 256,
    hooks: Sequence[str] | None = None,
    rows: str = "generated",
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> GeneratedStates:
    """Sample an answer to each prompt, and extract hidden states of prompt and answer.

    An answer is that of `model.generate` for its prompt alone: greedy at temperature 0, else with
    a seed of its own, which follows from `seed` and the number of its prompt.

    Args:
        model: A causal LM of `transformers`, with its LM head.
        tokens: Token ids [batch, position] or [position], lists of them, or a tokenizer's output.
        max_new_tokens: Tokens of an answer at most.
        hooks: Hook points, by name or glob; default: the residual after every block.
        rows: The tokens whose states are kept, as `rows.keep` has it: `generated`, `last`, `all`.
        layers: Blocks whose `hook_resid_post` is requested.
        attention_mask: [batch, position], 0 where a column is padding.
        temperature: 0: the most probable token; else tokens are drawn.
        top_p: Draw from the most probable tokens that have this probability together.
        top_k: Draw from so many of the most probable tokens.
        seed: Of all draws.

    Returns:
        Tokens, log-probabilities and states.

    Raises:
        InputError: The tokens or the mask cannot be a batch, or a number is out of its range.
        HookError: The model lacks a requested hook point, or it has a row for each pair of tokens.
        ModelError: The model writes no text.
        ConfigError: `rows` does not parse, or asks for what is not known of these tokens.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> found = extract_generated(model, torch.tensor([[1, 5, 4]]), 4, layers=[-1])
        >>> found["blocks.1.hook_resid_post"][0].shape[1]
        16
    """
    keep = expression.parse(rows, "rows")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or (top_k or 1) < 1:
        raise InputError(
            "max_new_tokens and top_k must be at least 1, temperature at least 0, and top_p above "
            "0 and at most 1"
        )
    asked = ask(model, tokens, hooks, layers, attention_mask)
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no LM head, so it writes no text; load it with "
            "AutoModelForCausalLM"
        )
    if over := [p.name for p in asked.points if p.over_keys]:
        raise InputError(f"hooks: {over[0]} has a row over keys; use extract_hidden_states for it")
    prompts = [asked.rows.ids[n, :length].tolist() for n, length in enumerate(asked.rows.lengths)]
    answers = [Row(ids, seed_of(seed, "", n), max_new_tokens) for n, ids in enumerate(prompts)]
    with evaluating(model):
        _sample(model, answers, Sampling(temperature, top_p, top_k))
    whole = [[*row.prompt, *row.ids] for row in answers]
    states: dict[str, list[torch.Tensor]] = {point.name: [] for point in asked.points}
    places = []
    for row, ids in zip(answers, whole, strict=True):
        kept = keep.mask(_document(row, len(ids))).nonzero()[0]
        places.append(torch.from_numpy(kept))
        found = extract_hidden_states(model, [ids], hooks=[*states])
        for name, values in states.items():
            values.append(found[name][0][places[-1].to(found[name].device)])
    return GeneratedStates(
        [torch.tensor(ids) for ids in whole],
        [len(ids) for ids in prompts],
        [torch.tensor(row.log_probabilities) for row in answers],
        [row.ended for row in answers],
        places,
        states,
    )


def _sample(model: "PreTrainedModel", answers: list[Row], sampling: Sampling) -> None:
    precision = precision_of(model.dtype)
    if precision not in TOLERANCE:
        raise ModelError(f"{type(model).__name__} is in {model.dtype}; load it in fp32 or 16 bits")
    own: Any = model.generation_config.eos_token_id if model.generation_config else None
    generation = Generation(model, sampling, end_ids(own), None, precision)
    way = generation.ways()  # also for one, whose answer is the same beside others
    for together in [answers] if way == PADDED else [[row] for row in answers]:
        generation.answer(together, alone=way == ONE_BY_ONE)


def _document(row: Row, tokens: int) -> Document:
    """What an expression sees of a prompt and its answer."""
    return Document("tokens", tokens, generated=np.arange(tokens) >= len(row.prompt))
