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
    import torch

    ids = torch.randint(architecture.model.config.get_text_config().vocab_size, (1, 24), generator=_seeded())
    limit = 10 * tolerance
    name = type(architecture.model).__name__
    whole = residuals(architecture, ids, chunk_size=24)
    padding = _largest_error({k: v[:, :16] for k, v in whole.items()}, residuals(architecture, ids[:, :16], 16))
    if not padding <= limit:
        raise ModelError(
            f"{name}: a token's hidden state depends on the tokens after it (by {padding:.2g} of the largest value): "
            "not a causal model; only decoders can be extracted"
        )
    try:
        chunks = _largest_error(whole, residuals(architecture, ids, chunk_size=7))
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        log.warning("%s does not take a KV cache: %s", name, error)
        chunks = math.inf
    if not chunks <= limit:
        log.warning("%s cannot be streamed: chunks give other rows than one pass (error %.2g)", name, chunks)
    return TriedOut(padding, chunks, chunks <= limit)


def _largest_error(expected: dict[str, "torch.Tensor"], found: dict[str, "torch.Tensor"]) -> float:
    return max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())


def _seeded() -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(0)
