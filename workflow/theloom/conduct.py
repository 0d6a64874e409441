"""How a model behaves, shown by itself on a few tokens, once: is it causal, can it be streamed."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from theloom import precision
from theloom.architecture import Architecture
from theloom.errors import ModelError
from theloom.precision import TOLERANCE


@dataclass
class _Shown:
    """What a model has shown on a few tokens: `None` where it has not been asked."""

    causal: bool | None = None
    no_streams: str | None = None


_shown: WeakKeyDictionary[torch.nn.Module, _Shown] = WeakKeyDictionary()


def _tolerance(described: Architecture) -> float:
    model: Any = described.model
    by_dtype = {precision.torch_dtype(name): error for name, error in TOLERANCE.items()}
    rounding = by_dtype.get(model.dtype, TOLERANCE["fp32"])
    return max(rounding, TOLERANCE["bf16"]) if getattr(model, "is_quantized", False) else rounding


def causal(described: Architecture) -> bool:
    """Whether a token's rows are free of the tokens after it."""
    from theloom.flow import evaluating
    from theloom.forward import residuals

    shown = _shown.setdefault(described.model, _Shown())
    if shown.causal is None:
        ids = _some_tokens(described)
        with evaluating(described.model):
            whole, part = residuals(described, ids, 24), residuals(described, ids[:, :16], 16)
        error = max(float((part[n] - v[:, :16]).abs().max() / v.abs().max()) for n, v in whole.items())
        shown.causal = error <= 10 * _tolerance(described)
    return shown.causal


def _some_tokens(described: Architecture) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(described.model.config.get_text_config().vocab_size, (1, 24), generator=seeded)


def check_streams(described: Architecture) -> None:
    """Raises ModelError where chunks through the KV cache give other rows than one pass, with the reason."""
    from theloom.flow import evaluating
    from theloom.trial import try_out

    shown = _shown.setdefault(described.model, _Shown())
    if shown.no_streams is None:
        with evaluating(described.model):
            try:
                tried = try_out(described, _tolerance(described))
                shown.no_streams = tried.not_streamed
            except ModelError as error:
                shown.no_streams = str(error)
    if shown.no_streams:
        name = type(described.model).__name__
        raise ModelError(
            f"{name} cannot be streamed: {shown.no_streams.removeprefix(f'{name}: ')}; "
            "use extract_hidden_states, or a chunk_size as long as the tokens"
        )
