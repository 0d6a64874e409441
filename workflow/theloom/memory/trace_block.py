"""The memory of a forward pass through one block, predicted as that of a whole model is: on tensors
without bytes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from theloom.hooks.locate import Anatomy
from theloom.hooks.points import HookPoint
from theloom.hooks.taps import Taps
from theloom.memory import trace
from theloom.memory.cuda_allocator import Event
from theloom.memory.sizes import PeakBytes, Workload
from theloom.memory.storages import LiveStorages
from theloom.model import block_calls
from theloom.model.attention_kernels import traced_as_cuda
from theloom.model.block_calls import BlockCache, Call, Frame
from theloom.model.fake import FakeModel
from theloom.model.without_bytes.shapes_only import shapes_only


@dataclass(frozen=True)
class BlockPass:
    """The bytes of the most demanding block at its peak, weights apart, and of the arguments of all
    blocks. `events` are the births and ends of storages, pass by pass.
    """

    parts: PeakBytes
    recorded: int
    events: tuple[Sequence[Event], ...] = ()


class _MarkedBlockCache(BlockCache):
    """A block's KV cache that says which storages are its own."""

    live: LiveStorages

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for tensor in updated:
            self.live.mark(tensor, trace.KV_CACHE)
        return updated


def trace_block(
    fake: FakeModel, workload: Workload, points: Sequence[HookPoint], device: str = "cpu"
) -> BlockPass:
    """Trace one workload through each kind of block that the model has.

    Args:
        fake: the model without storage.
        workload: windows, tokens of each, and tokens of a step.
        points: hook points, whose values are written as they come.
        device: `cpu`, where the residual that goes in is the shard's own, or `cuda`, where it is
            counted.

    Returns:
        The largest pass.

    Raises:
        ModelError: the model cannot run layer by layer.
    """
    frame = Frame(fake.architecture, torch.device("cpu"))
    with fake.mode, shapes_only(), torch.inference_mode():
        block_calls.inspect_calls(frame)
        steps, start = workload.steps, 0
        recorded: dict[int, torch.Tensor] = {}
        passes: list[tuple[PeakBytes, Sequence[Event]]] = []
        first: list[Call] = []
        for number, size in enumerate(steps):
            ids = torch.zeros(workload.windows, size, dtype=torch.int64)
            last = number >= len(steps) - 2
            if last or number == 0:
                calls = frame.record(ids, start, len(steps) > 1)
                first = calls if number == 0 else first
            if last:
                passes += [
                    _pass(frame, first, calls, b, workload, start, size, points, device)
                    for b in _kinds(frame)
                ]
                leaves = tree_leaves([(call.args, call.kwargs) for call in calls])
                recorded |= {
                    x.untyped_storage()._cdata: x for x in leaves if isinstance(x, torch.Tensor)
                }
            start += size
    return BlockPass(
        max((parts for parts, _ in passes), key=lambda parts: parts.total),
        sum(x.untyped_storage().nbytes() for x in recorded.values()),
        tuple(events for _, events in passes),
    )


def _kinds(frame: Frame) -> list[int]:
    """One block of each kind: by class, shapes of weights, and what the KV cache keeps of it."""
    layers = BlockCache(frame.model.config, 0).layers
    found: dict[Any, int] = {}
    for number, block in enumerate(frame.blocks):
        shapes = tuple(tuple(p.shape) for p in block.parameters())
        found.setdefault(
            (type(block), shapes, type(layers[number]) if number < len(layers) else None), number
        )
    return list(found.values())


def _pass(
    frame: Frame,
    first: list[Call],
    calls: list[Call],
    block: int,
    workload: Workload,
    start: int,
    size: int,
    points: Sequence[HookPoint],
    device: str,
) -> tuple[PeakBytes, Sequence[Event]]:
    """The peak of one step over `size` positions from `start`, in one block, and its events."""
    module, hidden = frame.blocks[block], frame.architecture.hidden_size
    live = (
        LiveStorages(inside=trace.CPU_KERNELS)
        if device == "cpu"
        else LiveStorages(whole=trace.CUDA_KERNELS)
    )
    given = tree_leaves([(c.args, c.kwargs) for c in (first[block], calls[block])])
    live.ignore(
        [
            *module.parameters(),
            *module.buffers(),
            *(x for x in given if isinstance(x, torch.Tensor)),
        ]
    )
    read = [p for p in points if p.block == block] or _like(points, block, frame)
    dtype = frame.residual_dtype

    def sink(name: str, value: torch.Tensor) -> None:
        live.mark(value.to(dtype), trace.CAPTURED)

    def residual(tokens: int) -> torch.Tensor:
        return torch.empty(workload.windows, tokens, hidden, dtype=dtype)

    theirs = (residual(workload.chunk_size), residual(size))
    if device == "cpu":
        live.ignore(theirs)
    with live, nullcontext() if device == "cpu" else traced_as_cuda():
        cache = None
        if len(workload.steps) > 1:
            cache = _MarkedBlockCache(frame.model.config, block)
            cache.live = live
            if start:
                first[block].run(module, theirs[0], cache)
                _grow(cache, block, start - workload.chunk_size)
        begun = len(live.events)
        taps = Taps(frame.architecture, read, sink) if read else nullcontext()
        with taps as opened:
            residual_in = theirs[1] if device == "cpu" else residual(size)
            if opened is None:
                output = calls[block].run(module, residual_in, cache)
            else:
                shape = (workload.windows, size)
                output = opened.through(
                    partial(calls[block].run, module, residual_in, cache), shape, start
                )
        peak = live.peak(begun)
        del output
    found = trace.parts(peak)
    if device == "cpu":
        return found, live.events
    arguments = {
        id(x): x
        for x in tree_leaves((calls[block].args, calls[block].kwargs))
        if isinstance(x, torch.Tensor)
    }
    sizes = [x.numel() * x.element_size() for x in arguments.values() if x.numel()]
    free = 1 + max((number for number, _ in live.events), default=-1)
    events = list(enumerate(sizes, free))
    return replace(found, temporaries=found.temporaries + sum(sizes)), [*events, *live.events]


def _like(points: Sequence[HookPoint], block: int, frame: Frame) -> list[HookPoint]:
    """The hook points that are requested in other blocks, as far as this one has them."""
    values = {p.value: p for p in points if p.name.startswith("blocks.")}
    like = [replace(p, name=f"blocks.{block}.{value}", block=block) for value, p in values.items()]
    there = Anatomy.of(frame.architecture).sites
    return [p for p in like if p.name in there]


def _grow(cache: BlockCache, block: int, tokens: int) -> None:
    layer: Any = cache.layers[block]
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if tokens > 0 and isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
        cache.update(trace.longer_tensor(keys, tokens), trace.longer_tensor(values, tokens), block)
