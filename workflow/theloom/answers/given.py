"""Answers that another engine wrote: what a cell of `answers.column` holds.

A cell is an answer or a list of them. An answer is a text, a list of token ids, or an output of
vLLM (`token_ids`, `finish_reason`) or SGLang (`output_ids`, `meta_info`); token ids are taken as
they are where there are any.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from theloom.corpus import rows
from theloom.errors import CorpusError

_IDS, _LOG_PROBABILITIES = ("token_ids", "output_ids"), ("logprobs", "output_token_logprobs")
_REASONS = {"stop": "eos", "length": "length"}


@dataclass(frozen=True)
class Given:
    """An answer as a cell has it: ids or, where these are None, a text."""

    ids: list[int] | None
    text: str
    stop_reason: str
    log_probabilities: list[float] | None = None


def answers_in(cell: Any, where: str) -> list[Given]:
    """The answers in a cell.

    Args:
        cell: What the column holds for a document.
        where: The document and the column, for messages.

    Returns:
        The answers in their order, none of them empty.

    Raises:
        CorpusError: It holds none.
    """
    if isinstance(cell, Mapping) and isinstance(cell.get("outputs"), list):  # vLLM's whole output
        cell = cell["outputs"]
    several = isinstance(cell, list) and not all(type(i) is int for i in cell)
    found = [_answer(entry, where) for entry in (cell if several else [cell])]
    if any(not (given.ids if given.ids is not None else given.text) for given in found):
        raise CorpusError(f"{where}: an answer is empty; give it a token, or leave it out")
    return found


def _answer(entry: Any, where: str) -> Given:
    if isinstance(entry, str):
        return Given(None, str(entry), "given")
    if isinstance(entry, list):
        return Given(_ids(entry, where), "", "given")
    if not isinstance(entry, Mapping):
        raise CorpusError(
            f"{where}: is {rows.kind(entry)}, not a text, token ids or an output with token_ids or "
            "text; set answers.column to the column that holds the answers"
        )
    about = entry.get("meta_info") or {}
    reason = entry.get("finish_reason", about.get("finish_reason"))
    reason = reason.get("type") if isinstance(reason, Mapping) else reason
    stopped = _REASONS.get(str(reason), "given")
    if stopped == "eos" and entry.get("stop_reason") is not None:  # vLLM: the text or token
        stopped = "stop"
    for name in _IDS:
        if entry.get(name) is not None:
            ids = _ids(entry[name], where)
            return Given(ids, "", stopped, _log_probabilities({**about, **entry}, ids))
    if not isinstance(entry.get("text"), str):
        raise CorpusError(
            f"{where}: an output has neither token_ids, output_ids nor text; it has "
            f"{', '.join(map(str, entry)) or 'nothing'}"
        )
    return Given(None, entry["text"], stopped)


def _ids(found: Any, where: str) -> list[int]:
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise CorpusError(f"{where}: an answer's token ids are not a list of integers")
    return found


def _log_probabilities(entry: Mapping[str, Any], ids: list[int]) -> list[float] | None:
    """Log-probabilities of the tokens in an output; None where it has none, or no such for all."""
    found = next((entry[n] for n in _LOG_PROBABILITIES if isinstance(entry.get(n), list)), None)
    if found is None or len(found) != len(ids):
        return None
    read: Callable[[Any, int], Any] = _of_vllm if isinstance(found[0], Mapping) else _of_sglang
    values = [read(one, token) for one, token in zip(found, ids, strict=True)]
    known = all(isinstance(v, int | float) and not math.isnan(v) for v in values)
    return [float(v) for v in values] if known else None


def _of_vllm(one: Any, token: int) -> Any:
    chosen = one.get(str(token), one.get(token)) if isinstance(one, Mapping) else None
    return chosen.get("logprob") if isinstance(chosen, Mapping) else chosen


def _of_sglang(one: Any, token: int) -> Any:
    if isinstance(one, list):
        return one[0] if len(one) > 1 and one[1] == token else None
    return one
