"""Token ids through a model, in one pass or chunk by chunk through its KV cache, while taps read."""

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
    import torch

    from theloom.kv_cache import PrefillCache

    with torch.inference_mode():
        model = taps.architecture.model
        ids = ids.to(model.device, non_blocking=True)
        if ids.shape[1] <= chunk_size:
            taps.run(input_ids=ids, use_cache=False)
            return
        cache = PrefillCache(config=model.config, offloading=offloaded)
        for start in range(0, ids.shape[1], chunk_size):
            taps.run(input_ids=ids[:, start : start + chunk_size], past_key_values=cache, use_cache=True)


def residuals(architecture: Architecture, ids: "torch.Tensor", chunk_size: int) -> dict[str, "torch.Tensor"]:
    """The residual after every loaded block, (batch, position, hidden size) in FP32 on the CPU, chunk by chunk."""
    import torch

    everything = hooks.residuals(len(architecture.blocks), architecture.hidden_size)
    points = [p for p in everything if p.value == "hook_resid_post"][: len(architecture.loaded)]
    seen: dict[str, list[torch.Tensor]] = {p.name: [] for p in points}
    with Taps(architecture, points, lambda name, value: seen[name].append(value.float().cpu())) as taps:
        prefill(taps, ids, chunk_size)
    return {name: torch.cat(chunks, dim=1) for name, chunks in seen.items()}
