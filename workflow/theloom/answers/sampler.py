"""Answers to prompts with `generate` of transformers, side by side, each as if it were alone.

`generate` runs the model, and keeps the KV cache; `Sampler` is the processor of scores that
chooses each row's token. Where rounding could have decided a token, because another one is as
near as what is computed beside it may change, the row's scores are computed once more: by one pass
over prompt and answer, alone and without a cache. So an answer does not depend on its neighbours.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

from theloom.answers.choice import TOLERANCE, Sampling
from theloom.errors import ModelError
from theloom.hooks.failures import MODEL_ERRORS, why

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PADDED, EQUAL_LENGTHS, ONE_BY_ONE = "padded", "equal lengths", "one by one"


def end_ids(found: int | Sequence[int] | None) -> frozenset[int]:
    """The token ids that end a text.

    Args:
        found: `eos_token_id` as transformers gives it; None: no token ends a text.

    Returns:
        The ids; empty for None.

    Examples:
        >>> end_ids(None), sorted(end_ids([2, 7]))
        (frozenset(), [2, 7])
    """
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


@dataclass
class Row:
    """An answer that is being sampled.

    Attributes:
        prompt: Its token ids.
        seed: Of its draws.
        most: Tokens of the answer at most.
        ids: Those that it has so far.
        log_probabilities: Of each of them, as the model gives them.
        ended: Why it has ended; empty: it has not. `length` where it has `most` tokens.
        alone: Tokens that were computed once more, alone.
    """

    prompt: Sequence[int]
    seed: int
    most: int
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: str = ""
    alone: int = 0

    def restart(self) -> None:
        """Forget the tokens so far."""
        self.ids, self.log_probabilities, self.alone = [], [], 0


@dataclass(frozen=True)
class Generation:
    """A model, and how it answers.

    Attributes:
        model: A causal LM of transformers, in eval mode.
        sampling: How tokens are chosen.
        ends: Token ids that end an answer.
        stops: Whether the tokens of an answer, prompt first, contain a text that ends it.
        precision: Of the model: fp32, fp16 or bf16.
    """

    model: "PreTrainedModel"
    sampling: Sampling
    ends: frozenset[int]
    stops: Callable[[Sequence[int], Sequence[int]], bool] | None
    precision: str

    def answer(
        self,
        rows: Sequence[Row],
        ended: Callable[[Row], None] = lambda row: None,
        alone: bool = False,
    ) -> None:
        """Sample the answers of rows side by side.

        Args:
            rows: The rows, of which those that have ended are left out.
            ended: Called with each row when it ends.
            alone: The model computes each token in one way alone: none is computed again.
        """
        _Sampler(self, rows, ended, None if alone else TOLERANCE[self.precision]).run()

    def scores_alone(self, ids: Sequence[int]) -> "torch.Tensor":
        """The scores of the token that follows others, by one pass over these alone, without a
        cache.

        Args:
            ids: Token ids of the prompt and of the answer so far.

        Returns:
            Logits, (1, vocabulary) in FP32 on the model's device.
        """
        import torch

        model = self.model
        known = signature(model.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        if "use_cache" in known:
            options["use_cache"] = False
        with torch.inference_mode():
            logits = model(torch.tensor([list(ids)], device=model.device), **options).logits
        return logits[:, -1].float()

    def ways(self) -> str:
        """How answers may go side by side: tried with a few tokens.

        Returns:
            `PADDED`, `EQUAL_LENGTHS` or, after a warning, `ONE_BY_ONE`.

        Raises:
            ModelError: The model cannot generate.
        """
        import torch

        vocabulary = self.model.config.get_text_config().vocab_size
        drawn = torch.randint(
            min(3, vocabulary - 1), vocabulary, (3, 24), generator=torch.Generator().manual_seed(0)
        ).tolist()
        limit = 0.75 * TOLERANCE[self.precision]
        for way, lengths in ((PADDED, (24, 16, 9)), (EQUAL_LENGTHS, (16, 16, 16))):
            rows = [Row(ids[:n], 0, 6) for ids, n in zip(drawn, lengths, strict=True)]
            try:
                error = _Trial(self, rows).error()
            except MODEL_ERRORS as failed:
                if way == EQUAL_LENGTHS:
                    name = type(self.model).__name__
                    raise ModelError(f"{name} cannot generate: {why(failed)}") from None
                log.info("prompts of several lengths side by side: %s", why(failed))
                continue
            log.info("%s side by side: scores differ by %.2g of the largest", way, error)
            if error <= limit:
                return way
        log.warning(
            "%s: a token's scores depend on what is computed beside it: answers are sampled one by "
            "one",
            type(self.model).__name__,
        )
        return ONE_BY_ONE


class _Sampler:
    """Chooses the tokens of rows, as a processor of scores and a criterion of `generate`."""

    def __init__(
        self,
        generation: Generation,
        rows: Sequence[Row],
        ended: Callable[[Row], None],
        tolerance: float | None,
    ) -> None:
        import torch

        self._of, self._rows, self._ended = generation, rows, ended
        self._tolerance = tolerance
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]

    def run(self) -> None:
        """Run `generate` until all rows have ended."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        model, rows = cast(Any, self._of.model), self._rows
        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([[0] * (width - len(r.prompt)) + list(r.prompt) for r in rows])
        real = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows])
        requested = GenerationConfig(
            max_new_tokens=max(row.most for row in rows), do_sample=False, pad_token_id=0
        )
        # what a model's files say of generation, such as penalties, is not asked for
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with torch.inference_mode():
                model.generate(
                    ids.to(model.device),
                    attention_mask=real.to(model.device),
                    generation_config=requested,
                    logits_processor=LogitsProcessorList([self._choose]),
                    stopping_criteria=StoppingCriteriaList([self._done]),
                )
        finally:
            model.generation_config = own

    def _choose(self, ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores that leave each row the token that was chosen for it."""
        import torch

        chosen = torch.zeros(len(self._rows), dtype=torch.long)
        for number, row in enumerate(self._rows):
            if not row.ended:
                chosen[number] = self._next(number, row, scores[number : number + 1])
        forced = torch.full_like(scores, -float("inf"))
        return forced.scatter_(1, chosen[:, None].to(scores.device), 0.0)

    def _next(self, number: int, row: Row, scores: "torch.Tensor") -> int:
        sampling = self._of.sampling
        noise = sampling.noise(self._generators[number], scores.shape[-1])
        token = None
        if self._tolerance is not None:
            token = sampling.sure(scores, noise, self._tolerance)
            if token is None:
                scores = self._of.scores_alone([*row.prompt, *row.ids])
                row.alone += 1
        if token is None:
            token = sampling.exact(scores, noise)
        row.ids.append(token)
        row.log_probabilities.append(float(scores.log_softmax(-1)[0, token]))
        if math.isnan(row.log_probabilities[-1]):
            raise ModelError(
                f"{type(self._of.model).__name__}: its scores after {len(row.prompt)} tokens of a "
                f"prompt and {len(row.ids) - 1} of the answer are not numbers in "
                f"{self._of.precision}; set memory.precision_mode=fp32, or check the weights"
            )
        if token in self._of.ends:
            row.ended = "eos"
        elif self._of.stops is not None and self._of.stops(row.prompt, row.ids):
            row.ended = "stop"
        elif len(row.ids) >= row.most:
            row.ended = "length"
        if row.ended:
            self._ended(row)
        return token

    def _done(self, ids: "torch.Tensor", scores: Any, **_: Any) -> "torch.Tensor":
        import torch

        return torch.tensor([bool(row.ended) for row in self._rows], device=ids.device)


class _Trial(_Sampler):
    """Rows side by side, greedy, each of whose scores is compared to that of a pass alone."""

    def __init__(self, generation: Generation, rows: Sequence[Row]) -> None:
        super().__init__(generation, rows, lambda row: None, None)
        self._error = 0.0

    def error(self) -> float:
        """The largest difference, as a share of the largest score."""
        self.run()
        return self._error

    def _next(self, number: int, row: Row, scores: "torch.Tensor") -> int:
        alone = self._of.scores_alone([*row.prompt, *row.ids])
        error = (scores - alone).abs().max() / alone.abs().max()
        self._error = max(self._error, float(error.nan_to_num(float("inf"))))
        token = int(alone.argmax())
        row.ids.append(token)
        if len(row.ids) >= row.most:
            row.ended = "length"
        return token
