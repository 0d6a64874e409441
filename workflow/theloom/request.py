"""What a call of the functions of `extraction` asks for, checked before anything runs."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from theloom import architecture, conduct, padding
from theloom.architecture import Architecture
from theloom.errors import HookError, InputError, ModelError
from theloom.hooks import HookPoint
from theloom.padding import Rows, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A model, the hook points to read, and the rows to read them of."""

    architecture: Architecture
    points: list[HookPoint]
    rows: Rows

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is given beside the ids: a mask where padding on the right could reach a token."""
        masked = self.rows.uneven and not conduct.causal(self.architecture)
        return self.rows.others | ({"attention_mask": self.rows.mask().long()} if masked else {})


def ask(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None,
    layers: Sequence[int] | None,
    attention_mask: Any,
) -> Request:
    """What a call asks for, checked. Raises InputError, HookError, ModelError."""
    from transformers import PreTrainedModel

    from theloom.catalogue import catalogue

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a model of transformers is needed, found {type(model).__name__}")
    described = architecture.describe(model)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    rows = padding.rows_of(tokens, attention_mask, pad if isinstance(pad, int) and pad >= 0 else 0)
    rows = _that_the_model_takes(model, rows)
    points = catalogue(described).select(_entries(hooks, layers, len(described.blocks)))
    _check_length(described, rows.ids.shape[1])
    return Request(described, points, rows)


def _entries(hooks: Sequence[str] | None, layers: Sequence[int] | None, blocks: int) -> list[str]:
    if isinstance(hooks, str):
        hooks = [hooks]
    if hooks is None and layers is None:
        return ["blocks.*.hook_resid_post"]
    if hooks is not None and not hooks:
        return []
    if hooks is None and not layers:
        raise HookError("layers is empty: name at least one, or leave it out for all of them")
    for layer in layers or ():
        if not -blocks <= layer < blocks:
            raise HookError(f"layers: {layer} is not in this model, which has {blocks} blocks, 0 to {blocks - 1}")
    return [*(hooks or ()), *(f"blocks.{layer}.hook_resid_post" for layer in layers or ())]


def _that_the_model_takes(model: "PreTrainedModel", rows: Rows) -> Rows:
    """Rows without further inputs that the model does not know; zeros (token types, mostly) say nothing."""
    known = inspect.signature(model.forward).parameters
    for name in [n for n in rows.others if n not in known]:
        if rows.others[name].any():
            raise InputError(f"tokens: {type(model).__name__} does not take {name!r}")
        del rows.others[name]
    return rows


def _check_length(described: Architecture, tokens: int) -> None:
    from theloom.anatomy import Anatomy

    name, limit = type(described.model).__name__, architecture.numbers(described.model.config).context_length
    if limit and tokens > limit:
        if "hook_pos_embed" in Anatomy.of(described).sites:
            raise InputError(f"tokens: {tokens} in a row, and {name} has {limit} positions; give it shorter rows")
        log.warning("%s was made for %d tokens, and a row has %d", name, limit, tokens)
