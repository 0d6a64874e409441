"""A model is tried on a few tokens before rows are taken from it.

What TheLoom relies on (padding on the right changes nothing, chunks through the KV cache give the rows of one pass) is
shown to hold for the model at hand, or it is not relied on.
"""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from theloom.architecture import Architecture
from theloom.errors import ModelError
from theloom.forward import residuals

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Residuals = dict[str, "torch.Tensor"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriedOut:
    """What a model showed on 24 tokens: errors as shares of the largest absolute value; whether it can be streamed."""

    padding_error: float
    chunk_error: float
    streams: bool


def try_out(architecture: Architecture, tolerance: float) -> TriedOut:
    """Show that padding on the right leaves this model's rows alone, and whether chunks through its KV cache do.

    `tolerance` is the error, as a share of the largest value, that rounding explains. Raises ModelError where a token's
    row depends on what is to its right, as for an encoder.
    """
    ids = tokens_of(architecture.model)
    name = type(architecture.model).__name__
    whole, shorter = residuals(architecture, ids, chunk_size=24), residuals(architecture, ids[:, :16], 16)
    try:
        chunked = residuals(architecture, ids, chunk_size=7)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        log.warning("%s does not take a KV cache: %s", name, error)
        chunked = None
    return judge(name, whole, shorter, chunked, tolerance)


def judge(name: str, whole: Residuals, shorter: Residuals, chunked: "Residuals | None", tolerance: float) -> TriedOut:
    """What residuals by hook point show: of 24 tokens, of the first 16 alone, in chunks (None: not to be had).

    Raises ModelError where a token's row depends on what is to its right.
    """
    limit = 10 * tolerance
    padding = _largest_error({k: v[:, :16] for k, v in whole.items()}, shorter)
    if not padding <= limit:
        raise ModelError(
            f"{name}: a token's hidden state depends on the tokens after it (by {padding:.2g} of the largest value): "
            "not a causal model; only decoders can be extracted"
        )
    chunks = math.inf if chunked is None else _largest_error(whole, chunked)
    if not chunks <= limit:
        log.warning("%s cannot be streamed: chunks give other rows than one pass (error %.2g)", name, chunks)
    return TriedOut(padding, chunks, chunks <= limit)


def _largest_error(expected: dict[str, "torch.Tensor"], found: dict[str, "torch.Tensor"]) -> float:
    return max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())


def tokens_of(model: "PreTrainedModel") -> "torch.Tensor":
    """24 random tokens of a model's vocabulary, (1, 24)."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, 24), generator=torch.Generator().manual_seed(0))
