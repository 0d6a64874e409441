"""A model is tried on a few tokens before rows are taken from it.

What TheLoom relies on (its taps read what the model calls its hidden states, padding on the right
changes nothing, chunks through the KV cache give the rows of one pass) is shown to hold for the
model at hand, or it is not relied on.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from theloom.errors import HookError, ModelError
from theloom.hooks.blocks import Architecture
from theloom.hooks.failures import MODEL_ERRORS, why
from theloom.hooks.layouts.chunked import sees_whole_pass
from theloom.hooks.layouts.trial import cannot_run
from theloom.hooks.points import RESIDUALS
from theloom.model.forward import forward_residuals, no_cache, takes_lengths
from theloom.model.length_switches import (
    LengthSwitch,
    as_long_as,
    length_switches,
    rotary_modules,
)
from theloom.model.reference import reference_residuals

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


Residuals = dict[str, "torch.Tensor"]  # by hook point, (batch, position, hidden size)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfCheck:
    """What a model showed on 24 tokens: errors as shares of the largest absolute value; whether it
    can be streamed.

    A model that is not causal gets the padding mask of every batch, and cannot be streamed. Where
    padding changes rows all the same, every document goes by itself, without a mask: `alone`. One
    with switches in its length is streamed beyond the first of them only if it can be told how long
    a document is: `streams_up_to` is the longest document that streams, None where there is no such
    limit.
    """

    states_error: float
    padding_error: float
    chunk_error: float
    causal: bool
    streams: bool
    not_streamed: str = ""  # the reason
    switches: tuple[LengthSwitch, ...] = ()
    streams_up_to: int | None = None
    alone: bool = False


class Streams(Protocol):
    """What says of a model whether its documents may go in chunks."""

    @property
    def streams(self) -> bool:
        """Whether documents may go in chunks."""
        ...

    @property
    def streams_up_to(self) -> int | None:
        """Tokens of the longest document that may; None: all may."""
        ...


def may_stream(shown: Streams, tokens: int) -> bool:
    """Whether documents of up to so many tokens may go in chunks.

    Args:
        shown: What a trial of the model showed, or `model.h5` records of it.
        tokens: Length of the longest document.

    Returns:
        False where they must go in one pass.
    """
    return shown.streams and (shown.streams_up_to is None or tokens <= shown.streams_up_to)


def self_check(architecture: Architecture, tolerance: float) -> SelfCheck:
    """Show that taps read the model's own hidden states, and whether padding and chunks leave rows
    alone.

    Args:
        architecture: Of a loaded model.
        tolerance: The error, as a share of the largest value, that rounding explains.

    Returns:
        What was found, with errors as shares of the largest value.

    Raises:
        ModelError: Rows would not be what the model computes; with the reason.
    """
    name, limit = type(architecture.model).__name__, 10 * tolerance
    ids, switches = tokens_of(architecture.model), length_switches(architecture.model.config)
    try:
        whole = _residuals(architecture, ids[:1], 24)
        states = reference_residuals(
            architecture,
            input_ids=ids[:1].to(architecture.model.device),
            **no_cache(architecture.model),
        )
        alone = _residuals(architecture, ids[1:, :16], 16)
    except MODEL_ERRORS as error:
        raise ModelError(f"{cannot_run(architecture.model)}: {why(error)}") from None
    except HookError as error:
        raise ModelError(f"{name}: {error}") from None
    if gap := next((n for n, v in whole.items() if not v.isfinite().all()), None):
        log.warning(
            "%s: %s is not finite for random tokens: its weights are damaged, or %s has too little "
            "range for it",
            name,
            gap,
            str(getattr(architecture.model, "dtype", "its precision")).removeprefix("torch."),
        )
    states_error = largest_error({n: states[n] for n in whole}, whole)
    if not states_error <= limit:
        raise ModelError(
            f"{name}: the residual stream that is read differs from its own output_hidden_states "
            f"(by {states_error:.2g} of the largest value): its blocks are not one stream"
        )
    padding, by_itself = _padding_error(architecture, ids, whole, alone, None), False
    told = takes_lengths(architecture.model)
    if told or not padding <= limit:
        masked = _padding_error(architecture, ids, whole, alone, (24, 16))
        if masked <= limit:
            reason = "it takes the lengths of whole documents" if told else "it is not causal"
            log.info("%s: %s: batches get them, or a mask, and go in one pass", name, reason)
            return SelfCheck(
                states_error,
                masked,
                math.inf,
                False,
                False,
                reason,
                switches,
                alone=sees_whole_pass(architecture.model),
            )
        by_itself = True
        log.warning(
            "%s: padding changes rows, by %.2g of the largest value without a mask and %.2g with "
            "one: every document goes by itself",
            name,
            padding,
            masked,
        )
    chunks, reason = _in_chunks(architecture, ids[:1], whole, limit)
    if reason:
        log.warning("%s cannot be streamed: %s", name, reason)
    up_to = streams_up_to(architecture.model, switches)
    if not reason and up_to is None:
        for switch in switches:
            chunks = max(chunks, _beyond(architecture, ids[:1], switch))
        reason = "" if chunks <= limit else other_in_chunks(chunks)
    return SelfCheck(
        states_error,
        padding,
        chunks,
        True,
        not reason,
        reason,
        switches,
        up_to,
        by_itself or picks_keys(architecture) or sees_whole_pass(architecture.model),
    )


def picks_keys(architecture: Architecture) -> bool:
    """Whether attention sees a few keys only, the best by an indexer's score.

    Keys of the same score are picked by their place among all, so that chunks, and padding, change
    which ones a token sees.

    Args:
        architecture: Of a model.

    Returns:
        True where a block has an indexer.
    """
    return any(
        "indexer" in part for block in architecture.blocks for part, _ in block.named_modules()
    )


def streams_up_to(model: "PreTrainedModel", switches: Sequence[LengthSwitch]) -> int | None:
    """Find the longest document that may go in chunks; a limit is logged.

    Args:
        model: A loaded model.
        switches: The lengths beyond which it computes otherwise, shortest first.

    Returns:
        Tokens; None where all may.
    """
    if not switches or rotary_modules(model):
        return None
    log.warning(
        "%s computes documents of more than %d tokens otherwise (%s), and its code cannot be told "
        "how long a document is: these go in one pass",
        type(model).__name__,
        switches[0].beyond,
        switches[0].name,
    )
    return switches[0].beyond


def _beyond(architecture: Architecture, ids: "torch.Tensor", switch: LengthSwitch) -> float:
    """The error of chunks against one pass, computed as in a document beyond a switch."""
    with as_long_as(architecture.model, switch.beyond + 1):
        whole = _residuals(architecture, ids, 24)
        return largest_error(whole, _residuals(architecture, ids, 7))


def _in_chunks(
    architecture: Architecture, ids: "torch.Tensor", whole: Residuals, limit: float
) -> tuple[float, str]:
    """The error of chunks of 7 tokens against one pass, and why the model is not to be streamed, if
    so.
    """
    if architecture.side:
        return math.inf, f"the {architecture.side} of an encoder-decoder goes in one pass"
    if picks_keys(architecture):
        return math.inf, "it picks keys by a top-k, whose ties fall otherwise in chunks"
    try:
        error = largest_error(whole, _residuals(architecture, ids, 7))
    except (*MODEL_ERRORS, HookError) as caught:
        return math.inf, f"it does not take a KV cache ({why(caught)})"
    return error, "" if error <= limit else other_in_chunks(error)


def other_in_chunks(error: float) -> str:
    """Say why a model is not streamed.

    Args:
        error: Of chunks against one pass, as a share of the largest value.

    Returns:
        Words for messages and records.
    """
    return (
        f"chunks through a KV cache give other rows than one pass (by {error:.2g} of the "
        "largest value)"
    )


def _residuals(
    architecture: Architecture,
    ids: "torch.Tensor",
    chunk_size: int,
    lengths: tuple[int, ...] | None = None,
) -> dict[str, "torch.Tensor"]:
    return forward_residuals(architecture, ids, chunk_size, lengths, RESIDUALS)


def _padding_error(
    architecture: Architecture,
    ids: "torch.Tensor",
    whole: Residuals,
    alone: Residuals,
    lengths: tuple[int, int] | None,
) -> float:
    """Two windows of 24 and 16 tokens side by side against each by itself; infinite where they
    cannot be run so.
    """
    try:
        both = _residuals(architecture, padded(ids), 24, lengths)
    except (*MODEL_ERRORS, HookError) as error:
        log.warning(
            "%s cannot be run on a padded batch: %s",
            type(architecture.model).__name__,
            why(error),
        )
        return math.inf
    return side_by_side(whole, alone, both)


def side_by_side(whole: Residuals, alone: Residuals, both: Residuals) -> float:
    """The error of two windows in one padded batch against each by itself.

    Args:
        whole: Residuals of the first window by itself, (1, positions, hidden size) each.
        alone: Residuals of the second one by itself, 16 positions.
        both: Residuals of the padded batch.

    Returns:
        The largest error, as a share of the largest value.
    """
    first = largest_error(whole, {k: v[:1] for k, v in both.items()})
    return max(first, largest_error(alone, {k: v[1:, :16] for k, v in both.items()}))


def tokens_of(model: "PreTrainedModel") -> "torch.Tensor":
    """Random tokens of a model's vocabulary, the same at every call.

    Args:
        model: Whose config tells its vocabulary.

    Returns:
        (2, 24) int64.
    """
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (2, 24), generator=generator)


def padded(ids: "torch.Tensor") -> "torch.Tensor":
    """The same tokens with padding behind 16 tokens of the second window.

    Args:
        ids: (2, positions) int64.

    Returns:
        A copy, padded with 0.
    """
    shorter = ids.clone()
    shorter[1, 16:] = 0
    return shorter


def largest_error(expected: Residuals, found: Residuals) -> float:
    """The largest error of residuals.

    Args:
        expected: Tensors by name.
        found: Tensors by the same names, on the CPU.

    Returns:
        A share of the largest value of `expected`; infinite where anything is of another shape, or
        finite in one of both alone.
    """
    import torch

    errors = []
    for name, value in expected.items():
        other = found[name]
        if other.shape != value.shape:
            return math.inf
        value = value.float().cpu()
        if not torch.equal(value.isfinite(), other.isfinite()):
            return math.inf
        value, other = value.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
        errors.append(float((other - value).abs().max() / value.abs().max().clamp_min(1e-30)))
    return max(errors)
