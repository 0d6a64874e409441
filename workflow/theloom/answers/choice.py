"""Which token comes next: greedy or drawn, as `generate` of transformers does it for one prompt.

A draw is that of `torch.multinomial` on the CPU: with the probabilities p and numbers q that are
exponentially distributed, the token with the largest p / q. The numbers come from a generator of
the answer's own, so nothing depends on what is sampled beside it.

Scores differ by rounding with what is computed together. `Choice.sure` says whether any scores
that are as near as `tolerance` give the same token.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Largest error of scores, as a share of the largest one, that the order of floating-point sums
# explains. Seen on SmolLM2: 2e-6, 5e-3, 3e-2.
TOLERANCE = {"fp32": 1e-5, "fp16": 8e-3, "bf16": 4e-2}


@dataclass(frozen=True)
class Choice:
    """A token, and whether rounding can have decided it."""

    token: int
    sure: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the settings of `answers`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    @cached_property
    def _warpers(self) -> Any:
        """The processors of transformers, in the order in which `generate` applies them."""
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        found = LogitsProcessorList()
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        return found

    def noise(self, generator: "torch.Generator", size: int) -> "torch.Tensor | None":
        """The random numbers of a step, (1, size) on the CPU; None where nothing is drawn."""
        import torch

        if not self.temperature:
            return None
        return torch.empty(1, size).exponential_(generator=generator)

    def choose(
        self, scores: "torch.Tensor", noise: "torch.Tensor | None", tolerance: float
    ) -> Choice:
        """Choose a token.

        Args:
            scores: The model's logits, (1, vocabulary) in FP32.
            noise: As `noise` gave it.
            tolerance: Their largest error, as a share of the largest one.
        """
        error = 2 * tolerance * float(scores[scores.isfinite()].abs().max())
        if noise is None:
            token = int(scores.argmax(-1))
            values = scores.topk(min(2, scores.shape[-1])).values[0]
            return Choice(token, len(values) < 2 or float(values[0] - values[1]) > error)
        noise = noise.to(scores.device)
        probabilities = self._warpers(None, scores).softmax(-1)
        token = int((probabilities / noise).argmax(-1))
        error /= self.temperature
        may, must = self._bounds(scores[0] / self.temperature, error)
        drawn = (scores[0] / self.temperature - noise[0].log()).masked_fill(~may, -float("inf"))
        best = drawn.topk(min(2, len(drawn)))
        lead = len(drawn) < 2 or float(best.values[0] - best.values[1]) > error
        return Choice(token, lead and int(best.indices[0]) == token and bool(must[token]))

    def _bounds(self, scores: "torch.Tensor", error: float) -> "tuple[torch.Tensor, torch.Tensor]":
        """Which tokens scores that are near these may leave to be drawn, and which they must."""
        import torch

        may = torch.ones_like(scores, dtype=torch.bool)
        must, unclear = may, 0.0
        if self.top_k is not None and self.top_k < len(scores):
            highest = scores.topk(self.top_k + 1).values
            may, must = scores >= highest[-2] - error, scores >= highest[-1] + error
        if self.top_p < 1.0:
            probabilities = scores.masked_fill(~may, -float("inf")).softmax(-1)
            unclear = float(probabilities[may & ~must].sum()) + 2 * error
            ordered, order = probabilities.sort(stable=True)
            tail = torch.empty_like(ordered)
            tail[order] = ordered.cumsum(-1)
            top = scores == scores.max()
            may = may & ((tail > 1 - self.top_p - unclear) | top)
            must = must & ((tail > 1 - self.top_p + unclear) | top)
        return may, must
