"""What a call of the functions of `extraction` asks for, checked before anything runs."""

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from theloom import precision
from theloom.config import model_dims
from theloom.errors import HookError, InputError, ModelError
from theloom.extraction import padding
from theloom.extraction.chosen import Chosen
from theloom.extraction.padding import PaddedTokens, Tokens
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.hooks.module_names import token_embedding
from theloom.hooks.points import HookPoint
from theloom.model.length_switches import LengthSwitch, length_switches, ways
from theloom.model.towers.classes import reads
from theloom.precision import TOLERANCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from theloom.model.checks import SelfCheck


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A model, the hook points to read, and the rows of tokens to read them of; `chosen`: which
    rows are kept, where not all are.
    """

    architecture: Architecture
    points: list[HookPoint]
    rows: PaddedTokens
    chosen: Chosen | None = None

    @property
    def switches(self) -> tuple[LengthSwitch, ...]:
        """Lengths beyond which the model computes a row otherwise."""
        return length_switches(self.architecture.model.config)

    def alike(self) -> list[list[int]]:
        """Group the rows by how the model computes rows of their length.

        Returns:
            Numbers of rows; those of a group may go side by side.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        by_length = self.rows.uneven and padding_changes_rows(self.architecture)
        switches = self.switches
        for row, length in enumerate(self.rows.lengths):
            way = (length,) if by_length else ways(switches, length)
            groups.setdefault(way, []).append(row)
        return list(groups.values())

    def only(self, rows: Sequence[int]) -> "Request":
        """The same for some of the rows.

        Args:
            rows: Their numbers.

        Returns:
            A copy with these rows, in this order.
        """
        return replace(self, rows=self.rows.only(rows))

    def check_alike(self) -> None:
        """Raise InputError if the rows cannot go through the model side by side, step by step."""
        if len(self.alike()) < 2:
            return
        name, lengths = type(self.architecture.model).__name__, self.rows.lengths
        switch = next((s for s in self.switches if len({s.way(n) for n in lengths}) > 1), None)
        if switch is None:
            raise InputError(
                f"tokens: padding changes the rows of {name}; give rows of the same length"
            )
        raise InputError(
            f"tokens: {name} computes rows of more than {switch.beyond} tokens otherwise "
            f"({switch.name}), and these have from {min(lengths)} to {max(lengths)}; give the long "
            "and the short ones in calls of their own"
            + (", each length by itself" if switch.every_length else "")
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is given besides the ids.

        Returns:
            Tensors by name of the argument; a mask among them where padding on the right could
            reach a token.
        """
        from theloom.model.forward import told_padding

        masked = self.rows.uneven and not causal(self.architecture)
        mask = self.rows.mask().long() if masked else None
        told = {} if mask is None else told_padding(self.architecture.model, self.rows.ids, mask)
        return self.rows.others | told


def ask(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None,
    layers: Sequence[int] | None,
    attention_mask: Any,
    kept: str | Mapping[str, str] | None = None,
) -> Request:
    """What a call asks for, checked.

    Args:
        model: Of transformers.
        tokens: Token ids [batch, position] or [position], or a tokenizer's output.
        hooks: Names or globs of hook points; None: those of `layers`.
        layers: Numbers of blocks whose output is read, also from the last one (-1); None: those of
            `hooks`, or of every block where these are None too.
        attention_mask: 0 where there is padding; None: the tokens' own.
        kept: The argument `rows` of the call; None: every token is a row.

    Returns:
        The request, of which nothing has run.

    Raises:
        InputError: The tokens, or the mask, are wrong.
        HookError: The model lacks a hook point.
        ModelError: The model is none of transformers, or its blocks are not found.
        ConfigError: `kept` cannot be evaluated.
    """
    from transformers import PreTrainedModel

    from theloom.hooks.catalog import build_catalog

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a model of transformers is needed, found {type(model).__name__}")
    if (sensed := reads(model.config)) is not None:
        raise ModelError(
            f"{type(model).__name__} reads {sensed}, and is given token ids; extract its rows with "
            f"the pipeline: theloom run custom model.source=… corpus={sensed} corpus.path=…"
        )
    described = find_blocks(model)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    known = _known_ids(model)
    filling = pad if isinstance(pad, int) and 0 <= pad < known else 0
    rows = padding.rows_of(tokens, attention_mask, filling)
    _check_ids(model, rows, known)
    rows = _that_the_model_takes(model, rows)
    points = build_catalog(described).select(_entries(hooks, layers, len(described.blocks)))
    if state := next((p.name for p in points if p.of_document), None):
        raise HookError(
            f"{state} is one state of a document, after its last token: extract it with the "
            "pipeline and rows.keep=last"
        )
    _check_length(described, rows.ids.shape[1])
    chosen = None if kept is None else Chosen(kept, rows, points)
    return Request(described, points, rows, chosen)


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
            raise HookError(
                f"layers: {layer} is not in this model, which has {blocks} blocks, 0 to "
                f"{blocks - 1}"
            )
    return [*(hooks or ()), *(f"blocks.{layer}.hook_resid_post" for layer in layers or ())]


def _known_ids(model: "PreTrainedModel") -> int:
    """How many token ids the model has an embedding of; no limit where it has no table of them."""
    embedding = token_embedding(model)
    return embedding.num_embeddings if isinstance(embedding, torch.nn.Embedding) else sys.maxsize


def _check_ids(model: "PreTrainedModel", rows: PaddedTokens, known: int) -> None:
    """Raise InputError for an id that the model has no embedding of: on a GPU it would stop the
    process.
    """
    bad = ((rows.ids < 0) | (rows.ids >= known)).nonzero()
    if len(bad):
        row, position = bad[0].tolist()
        raise InputError(
            f"tokens: id {int(rows.ids[row, position])} (row {row}, token {position}), and the "
            f"embedding of {type(model).__name__} has {known} rows, from 0; use the model's own "
            "tokenizer, or mask what is padding"
        )


def _that_the_model_takes(model: "PreTrainedModel", rows: PaddedTokens) -> PaddedTokens:
    """Rows without further inputs that the model does not know; zeros (token types, mostly) say
    nothing.
    """
    known = inspect.signature(model.forward).parameters
    for name in [n for n in rows.others if n not in known]:
        if rows.others[name].any():
            raise InputError(f"tokens: {type(model).__name__} does not take {name!r}")
        del rows.others[name]
    return rows


def _check_length(described: Architecture, tokens: int) -> None:
    from theloom.hooks.locate import Anatomy

    name, limit = (
        type(described.model).__name__,
        model_dims.numbers(described.model.config).context_length,
    )
    if limit and tokens > limit:
        if "hook_pos_embed" in Anatomy.of(described).sites:
            raise InputError(
                f"tokens: {tokens} in a row, and {name} has {limit} positions; give it shorter rows"
            )
        log.warning("%s was made for %d tokens, and a row has %d", name, limit, tokens)


@dataclass
class _Shown:
    """What a model has shown on a few tokens: `None` where it has not been requested."""

    causal: bool | None = None
    tried: "SelfCheck | ModelError | None" = None


_shown: WeakKeyDictionary[torch.nn.Module, _Shown] = WeakKeyDictionary()


def _tolerance(described: Architecture) -> float:
    model: Any = described.model
    by_dtype = {precision.torch_dtype(name): error for name, error in TOLERANCE.items()}
    rounding = by_dtype.get(model.dtype, TOLERANCE["fp32"])
    return max(rounding, TOLERANCE["bf16"]) if getattr(model, "is_quantized", False) else rounding


def causal(described: Architecture) -> bool:
    """Whether a token's rows are free of the tokens after it: tried once with a few tokens.

    Args:
        described: The model with its blocks.

    Returns:
        True where they are.
    """
    from theloom.hooks.layouts.trial import evaluating
    from theloom.model.forward import forward_residuals

    shown = _shown.setdefault(described.model, _Shown())
    if shown.causal is None:
        ids = _some_tokens(described)
        with evaluating(described.model):
            whole, part = (
                forward_residuals(described, ids, 24),
                forward_residuals(described, ids[:, :16], 16),
            )
        error = max(
            float((part[n] - v[:, :16]).abs().max() / v.abs().max()) for n, v in whole.items()
        )
        shown.causal = error <= 10 * _tolerance(described)
    return shown.causal


def _tried(described: Architecture) -> "SelfCheck | ModelError":
    """What a trial of the model showed, or why it failed: made once a model."""
    from theloom.hooks.layouts.trial import evaluating
    from theloom.model.checks import self_check

    shown = _shown.setdefault(described.model, _Shown())
    if shown.tried is None:
        with evaluating(described.model):
            try:
                shown.tried = self_check(described, _tolerance(described))
            except ModelError as error:
                shown.tried = error
    return shown.tried


def padding_changes_rows(described: Architecture) -> bool:
    """Whether rows of different lengths must not go side by side, with a padding mask or without.

    Where a trial of the model fails, that is so too: each length by itself is right in any case.

    Args:
        described: The model with its blocks.

    Returns:
        True where each length has to go by itself.
    """
    tried = _tried(described)
    return isinstance(tried, ModelError) or tried.alone


def _some_tokens(described: Architecture) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(
        described.model.config.get_text_config().vocab_size, (1, 24), generator=seeded
    )


def check_streams(described: Architecture, tokens: int) -> None:
    """Check that rows have the same values in chunks through the KV cache as in one pass.

    Args:
        described: The model with its blocks.
        tokens: Of the longest row.

    Raises:
        ModelError: They have not, with the reason.
    """
    from theloom.model.checks import may_stream

    tried, name = _tried(described), type(described.model).__name__
    reason = str(tried) if isinstance(tried, ModelError) else tried.not_streamed
    if reason:
        raise ModelError(
            f"{name} cannot be streamed: {reason.removeprefix(f'{name}: ')}; "
            "use extract_hidden_states, or a chunk_size as long as the tokens"
        )
    if not isinstance(tried, ModelError) and not may_stream(tried, tokens):
        raise ModelError(
            f"{name} cannot be streamed beyond {tried.streams_up_to} tokens, where it computes "
            f"otherwise by the length of a pass, and a row has {tokens}; use extract_hidden_states"
        )
