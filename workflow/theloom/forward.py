"""Token ids through a model, in one pass or chunk by chunk through its KV cache, while taps read."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from theloom import hooks
from theloom.architecture import Architecture
from theloom.taps import Taps

if TYPE_CHECKING:
    import torch


def prefill(taps: Taps, ids: "torch.Tensor", chunk_size: int, offloaded: bool = False) -> None:
    """Forward token ids (batch, position): at once where they fit a chunk, else chunk by chunk through a KV cache.

    With `offloaded` the cache lies in host memory, and a GPU holds that of two blocks. No attention mask is passed:
    rows are causal, and padding, if any, is on the right.
    """
    for _ in steps(taps, ids, chunk_size, offloaded):
        pass


def steps(
    taps: Taps,
    ids: "torch.Tensor",
    chunk_size: int,
    offloaded: bool = False,
    inputs: "Mapping[str, torch.Tensor] | None" = None,
) -> Iterator[int]:
    """The same step by step: after each, the position of its first token. Taps need be open during a step only.

    `inputs` are further arguments of the model, (batch, position) as the ids are.
    """
    import torch

    from theloom.kv_cache import PrefillCache

    model = taps.architecture.model
    everything = {"input_ids": ids, **(inputs or {})}
    named = {name: value.to(model.device, non_blocking=True) for name, value in everything.items()}
    if ids.shape[1] <= chunk_size:
        with torch.inference_mode():
            taps.run(**named, use_cache=False)
        yield 0
        return
    cache = PrefillCache(config=model.config, offloading=offloaded)
    for start in range(0, ids.shape[1], chunk_size):
        chunk = {name: value[:, start : start + chunk_size] for name, value in named.items()}
        with torch.inference_mode():  # not while the caller has the turn: it would be the caller's mode too
            taps.run(**chunk, past_key_values=cache, use_cache=True)
        yield start


def residuals(architecture: Architecture, ids: "torch.Tensor", chunk_size: int) -> dict[str, "torch.Tensor"]:
    """The residual after every loaded block, (batch, position, hidden size) in FP32 on the CPU, chunk by chunk."""
    import torch

    everything = hooks.residuals(len(architecture.blocks), architecture.hidden_size)
    points = [p for p in everything if p.value == "hook_resid_post"][: len(architecture.loaded)]
    seen: dict[str, list[torch.Tensor]] = {p.name: [] for p in points}
    with Taps(architecture, points, lambda name, value: seen[name].append(value.float().cpu())) as taps:
        prefill(taps, ids, chunk_size)
    return {name: torch.cat(chunks, dim=1) for name, chunks in seen.items()}
