"""Runs token ids through a model, in one pass or in chunks through its KV cache, with taps."""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

from theloom.config.checks import LEAST_CHUNK
from theloom.hooks.blocks import Architecture
from theloom.hooks.points import residual_points
from theloom.hooks.recurrent import cache_name, check_carried
from theloom.hooks.taps import Taps
from theloom.model.attention_kernels import one_document_a_row
from theloom.model.length_switches import as_long_as, forget_lengths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# count positions from 0 in every chunk unless told; others do not take position ids, or are wrong
# with them (RoBERTa)
RESTARTS_POSITIONS = ("bamba",)


def prefill(
    taps: Taps,
    ids: "torch.Tensor",
    chunk_size: int,
    lengths: Sequence[int] | None = None,
    offloaded: bool = False,
    inputs: "Mapping[str, torch.Tensor] | None" = None,
) -> None:
    """Forward token ids: at once where they fit a chunk, else chunk by chunk through a KV cache.

    A causal model gets no attention mask: padding, if any, is on the right, where no real token
    looks. Any other model goes through in one pass.

    Args:
        taps: the model, whose hook points are read.
        ids: (batch, position).
        chunk_size: tokens of a step.
        lengths: the real tokens of every row, beyond which a model that is not causal gets a mask.
        offloaded: the cache lies in host memory, and a GPU holds that of two blocks.
        inputs: further arguments of the model: those of `steps`, or a decoder's sources.

    Raises:
        HookError: as `steps`.
    """
    for _ in steps(taps, ids, chunk_size, lengths, offloaded, inputs):
        pass


def steps(
    taps: Taps,
    ids: "torch.Tensor",
    chunk_size: int,
    lengths: Sequence[int] | None = None,
    offloaded: bool = False,
    inputs: "Mapping[str, torch.Tensor] | None" = None,
) -> Iterator[int]:
    """Forward token ids as `prefill` does, step by step. Taps need be open during a step only.

    The model starts without memory of earlier passes, and computes each chunk as a part of its
    document.

    Args:
        taps: the model, whose hook points are read.
        ids: (batch, position).
        chunk_size: tokens of a step.
        lengths: the real tokens of every row.
        offloaded: the cache lies in host memory.
        inputs: further arguments of the model, (batch, position) as the ids are.

    Yields:
        After each step, the position of its first token.

    Raises:
        HookError: a state is requested that the model does not hand on from chunk to chunk.
    """
    import torch

    model = taps.architecture.model
    start_afresh(taps.architecture)
    everything = {"input_ids": ids, **(inputs or {})}
    named = {name: value.to(model.device, non_blocking=True) for name, value in everything.items()}
    if lengths is not None:
        real = torch.tensor(list(lengths), device=model.device)[:, None]
        mask = torch.arange(ids.shape[1], device=model.device) < real
        named |= told_padding(model, named["input_ids"], mask.long())
    if lengths is not None or ids.shape[1] <= chunk_size:
        own = "position_ids" in named
        with torch.inference_mode(), nullcontext() if own else one_document_a_row():
            taps.run(**named, **no_cache(model))
        yield 0
        return
    check_carried(model, taps.states)
    cache: dict[str, Any] = {
        cache_name(model): PrefillCache(config=model.config, offloading=offloaded)
    }
    for start, end in spans(ids.shape[1], chunk_size):
        chunk = {name: value[:, start:end] for name, value in named.items()}
        if model.config.model_type in RESTARTS_POSITIONS:
            chunk.setdefault("position_ids", torch.arange(start, end, device=model.device)[None])
        forget_lengths(model)  # the caller may have used the model since the last chunk
        # not while the caller has the turn: it would be the caller's mode too
        with torch.inference_mode(), as_long_as(model, ids.shape[1]):
            taps.run(**chunk, use_cache=True, **cache)
        yield start


def takes_lengths(model: "PreTrainedModel") -> bool:
    """Whether a model reads from its token ids how long documents are, unless it is told.

    Args:
        model: of transformers.

    Returns:
        True for XLM and Flaubert, which count the ids that are not of padding.
    """
    return "lengths" in inspect.signature(model.forward).parameters


def told_padding(
    model: "PreTrainedModel", ids: "torch.Tensor", mask: "torch.Tensor"
) -> dict[str, "torch.Tensor"]:
    """How a model is told which tokens of a batch are padding.

    Args:
        model: of transformers.
        ids: (batch, position) on its device.
        mask: (batch, position) integers, 0 where there is padding.

    Returns:
        Arguments of its forward: the mask; or the lengths that the model itself would count in each
        document alone, where padding tokens of the text count as none.
    """
    if not takes_lengths(model):
        return {"attention_mask": mask}
    return {"lengths": (mask * (ids != model.config.pad_token_id)).sum(dim=1)}


def spans(length: int, chunk_size: int) -> list[tuple[int, int]]:
    """Find where chunks begin and end. Where they may have three tokens or more, none is of one:
    models compute a step of one token by other code, whose rows are not always those of a pass.

    Args:
        length: tokens in all.
        chunk_size: tokens of a chunk at most.

    Returns:
        The first token of each, and that behind its last.

    Examples:
        >>> spans(9, 4)
        [(0, 4), (4, 7), (7, 9)]
    """
    starts = list(range(0, length, chunk_size))
    if chunk_size >= LEAST_CHUNK and len(starts) > 1 and length - starts[-1] == 1:
        starts[-1] -= 1
    return list(pairwise([*starts, length]))


def start_afresh(architecture: Architecture) -> None:
    """Make a model forget what earlier passes left in it: what it computes next depends on its
    inputs alone.

    Args:
        architecture: of the model.
    """
    architecture.pass_state.restore()
    forget_lengths(architecture.model)


def no_cache(model: "PreTrainedModel") -> dict[str, Any]:
    """How a model's forward is told not to keep a cache, where it knows of any.

    Args:
        model: of transformers.

    Returns:
        Arguments for its forward; empty where it knows of no cache.
    """
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )


def forward_residuals(
    architecture: Architecture,
    ids: "torch.Tensor",
    chunk_size: int,
    lengths: Sequence[int] | None = None,
    values: Collection[str] = ("hook_resid_post",),
) -> dict[str, "torch.Tensor"]:
    """Compute the residual after every loaded block, as `prefill` does.

    Args:
        architecture: the model with its blocks.
        ids: (batch, position).
        chunk_size: tokens of a step.
        lengths: the real tokens of every row.
        values: names of the values that are read of each block.

    Returns:
        By hook point, (batch, position, hidden size) in FP32 on the CPU.
    """
    import torch

    everything = residual_points(
        len(architecture.loaded), architecture.hidden_size, architecture.side
    )
    points = [p for p in everything if p.value in values]
    seen: dict[str, list[torch.Tensor]] = {p.name: [] for p in points}
    with Taps(
        architecture, points, lambda name, value: seen[name].append(value.float().cpu())
    ) as taps:
        prefill(taps, ids, chunk_size, lengths)
    return {name: torch.cat(chunks, dim=1) for name, chunks in seen.items()}


class PrefillCache(DynamicCache):
    """A DynamicCache whose sliding-window layers hold their window alone.

    Theirs is a view of window and chunk together, which keeps the whole alive: a prefill's first
    chunk, however long, would stay on the device until the next one. Here a layer's window is a
    tensor of its own.
    """

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As of `DynamicCache`; a layer then holds no more than its window.

        Args:
            key_states: (batch, heads, position, head size).
            value_states: (batch, heads, position, head size).
            layer_idx: the number of the layer.
            *args: of transformers.
            **kwargs: of transformers.

        Returns:
            Keys and values of all tokens that the layer sees.
        """
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if held is not None and held.untyped_storage().nbytes() > held.nbytes:
                setattr(layer, name, held.clone())
        return updated
