"""Which token comes next: greedy or drawn, as `generate` of transformers does it for one prompt.

A draw is that of `torch.multinomial` on the CPU: with the probabilities p and numbers q that are
exponentially distributed, the token with the largest p / q. The numbers come from a generator of
the answer's own, so nothing depends on what is sampled beside it.

Scores differ by rounding with what is computed together. `Sampling.sure` gives the token that all
scores as near as a tolerance have in common, and `Sampling.exact` that of these scores.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isnan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Largest error of scores, as a share of the largest one, that the order of floating-point sums
# explains. Seen on SmolLM2: 2e-6, 5e-3, 3e-2.
TOLERANCE = {"fp32": 1e-5, "fp16": 8e-3, "bf16": 4e-2}


_LIKELIEST = 256  # tokens that a choice looks at first, where top_k or top_p leaves few


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
        """The random numbers of a step.

        Args:
            generator: Of the answer, on the CPU; each call moves it on.
            size: Of the vocabulary.

        Returns:
            (1, size) in FP32 on the CPU, exponentially distributed; None where nothing is drawn.
        """
        import torch

        if not self.temperature:
            return None
        return torch.empty(1, size).exponential_(generator=generator)

    def exact(self, scores: "torch.Tensor", noise: "torch.Tensor | None") -> int:
        """The token that `generate` chooses with these scores.

        Args:
            scores: The model's logits, (1, vocabulary) in FP32.
            noise: As `noise` gave it.

        Returns:
            The token's id.

        Examples:
            >>> import torch
            >>> Sampling().exact(torch.tensor([[0.0, 2.0, 1.0]]), None)
            1
        """
        if noise is None:
            return int(scores.argmax(-1))
        probabilities = self._warpers(None, scores).softmax(-1)
        return int((probabilities / noise.to(scores.device)).argmax(-1))

    def sure(
        self, scores: "torch.Tensor", noise: "torch.Tensor | None", tolerance: float
    ) -> int | None:
        """The token that `exact` gives with any scores that are near these.

        Args:
            scores: The model's logits, (1, vocabulary) in FP32.
            noise: As `noise` gave it.
            tolerance: Their largest error, as a share of the largest one.

        Returns:
            The token's id; None where several tokens could be chosen, or a score is NaN or +inf.

        Examples:
            >>> import torch
            >>> scores = torch.tensor([[0.0, 2.0, 1.9]])
            >>> Sampling().sure(scores, None, 0.01), Sampling().sure(scores, None, 0.1)
            (1, None)
        """
        scores = scores[0]
        nan = float("nan")
        error = 2 * tolerance * float(scores.nan_to_num(nan, nan, 0.0).abs().max())
        if isnan(error):
            return None
        if noise is None:
            best = scores.topk(min(2, len(scores)))
            return _first(best.values.tolist(), best.indices.tolist(), error)
        scores, error = scores / self.temperature, error / self.temperature
        found = self._bounds(scores, error)
        drawn = noise[0].to(scores.device).log()
        if found is None:
            drawn = scores - drawn
            best = drawn.topk(min(2, len(drawn)))
            return _first(best.values.tolist(), best.indices.tolist(), error)
        tokens, values, may, must = found
        drawn = (values - drawn[tokens]).masked_fill(~may, -float("inf"))
        best = drawn.topk(min(2, len(drawn)))
        number = _first(best.values.tolist(), best.indices.tolist(), error)
        return int(tokens[number]) if number is not None and bool(must[number]) else None

    def _bounds(self, scores: "torch.Tensor", error: float) -> "_Bounds | None":
        """Which tokens `top_k` and `top_p` may leave with scores that are near these, and which
        they must; None: all. Tokens that they cannot leave may be missing.
        """
        if self.top_p >= 1.0 and (self.top_k is None or self.top_k >= len(scores)):
            return None
        few = max(_LIKELIEST, 2 * (self.top_k or 0))
        for count in (min(few, len(scores)), len(scores)):
            tokens, values, may, must = self._bounds_among(scores, count, error)
            # a token that is left out is below all that may be left, whatever the rounding
            if count == len(scores) or float(values[-1]) < float(values[may][-1]) - error:
                break
        return tokens, values, may, must

    def _bounds_among(self, scores: "torch.Tensor", count: int, error: float) -> "_Bounds":
        """The bounds among so many of the largest scores."""
        import torch

        values, tokens = scores.topk(count)
        may = torch.ones_like(values, dtype=torch.bool)
        must, whole = may, scores.logsumexp(-1)
        if self.top_k is not None and self.top_k < count:
            may = values >= values[self.top_k - 1] - error
            must = values >= values[self.top_k] + error
            whole = values[may].logsumexp(-1)
        if self.top_p < 1.0:
            # a token is left if those above it have less than top_p of the probability
            shares = (values - whole).exp() * may
            sums = torch.nn.functional.pad(shares.cumsum(-1), (1, 0))
            falling = -values
            least = sums[torch.searchsorted(falling, falling - error)]
            most = sums[torch.searchsorted(falling, falling + error, right=True)] - shares
            unclear = float(shares[may & ~must].sum()) + 2 * error
            first = torch.zeros_like(may)
            first[0] = count < 2 or float(values[0] - values[1]) > error
            may = may & (least < self.top_p + unclear)
            must = must & ((most < self.top_p - unclear) | first)
        return tokens, values, may, must


_Bounds = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Tokens, their scores from the largest on, and which of them may and must be left."""


def _first(values: list[float], tokens: list[int], error: float) -> int | None:
    """The first of tokens if it is ahead by more than an error."""
    return tokens[0] if len(values) < 2 or values[0] - values[1] > error else None
