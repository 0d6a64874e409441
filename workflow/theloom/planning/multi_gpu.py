"""Several GPUs for one model: how many it takes, and which blocks go to which of them.

Blocks stay in order and whole, so that a token's residual stream crosses each border once. The
first GPU has the embeddings too. Nothing runs at the same time on two GPUs of a job: for speed
there are shards, and this is for models that no single GPU holds.
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from theloom import terminal
from theloom.corpus.batching import Lengths
from theloom.devices import gpu_lease
from theloom.devices.gpu import available_memory
from theloom.devices.host import DeviceMemory
from theloom.errors import MemoryPlanError
from theloom.memory.sizes import with_device_overhead
from theloom.model.weight_format import WeightFormat
from theloom.planning import plan
from theloom.planning.estimate import Estimate, Pass
from theloom.planning.plan import Correction, Planned

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


MOST_GPUS = 16  # of one machine


@dataclass(frozen=True)
class Share:
    """What the fullest of several GPUs has of a model: of its weights, and of its blocks. Both at
    most 1.
    """

    weights: float
    blocks: float


def share(blocks: int, gpus: int, overhead: float = 0.0) -> Share:
    """The share of the fullest of `gpus` alike GPUs; `beside` is the share of the weights that is
    in no block.
    """
    most = math.ceil(blocks / gpus) / blocks
    return Share(most * (1 - overhead) + overhead, most) if gpus > 1 else Share(1.0, 1.0)


def of_one(estimate: Estimate, part: Share) -> Estimate:
    """The estimate of that GPU alone: the KV cache is with the blocks, temporaries are those of one
    block anywhere.
    """
    passes = {kind: [_part(p, part) for p in found] for kind, found in estimate.passes.items()}
    weights = {kind: int(size * part.weights) for kind, size in estimate.weights.items()}
    return replace(estimate, weights=weights, passes=passes)


def _part(found: Pass, part: Share) -> Pass:
    return replace(
        found, parts=replace(found.parts, kv_cache=int(found.parts.kv_cache * part.blocks))
    )


def least(estimate: Estimate, kind: str) -> int:
    """Bytes that a GPU must have free for the smallest pass that a plan can choose."""
    smallest = min((p.parts for p in estimate.passes[kind]), key=lambda parts: parts.total)
    return with_device_overhead(estimate.weights[kind], smallest, "cuda").total


def gpus_for(estimate: Estimate, kind: str, blocks: int, overhead: float, budget: float) -> int:
    """The fewest alike GPUs that hold a model, with `budget` bytes of each in use. Raises
    MemoryPlanError.
    """
    for count in range(1, min(MOST_GPUS, blocks) + 1):
        if least(of_one(estimate, share(blocks, count, overhead)), kind) <= budget:
            return count
    needed = terminal.format_bytes(estimate.weights[kind])
    raise MemoryPlanError(
        f"the model's {kind} weights ({needed}) do not fit {MOST_GPUS} GPUs of {terminal.format_bytes(budget)} each; "
        "set memory.quantization, or resources.gpu_memory_gb to the size of your GPUs"
    )


def on_leased(estimated: Estimate) -> Estimate:
    """The estimate by which a job plans: of its fullest GPU where it has leased several, else as it
    is.
    """
    count = len(gpu_lease.held())
    return of_one(estimated, share(estimated.blocks, count)) if count > 1 else estimated


def available(device: "torch.device") -> tuple[DeviceMemory, str]:
    """`gpu.available`, of the leased GPU with the least free where there are several, all of which
    take part.
    """
    import torch

    if len(gpu_lease.held()) < 2:
        return available_memory(device)
    found = [
        available_memory(torch.device("cuda", number)) for number in range(len(gpu_lease.held()))
    ]
    return min(found, key=lambda one: one[0].free)


def fit_plan(
    estimated: Estimate,
    kind: WeightFormat,
    device: "torch.device",
    threshold: float,
    windows: Lengths,
    correction: Correction | None = None,
) -> Planned:
    """The plan that fits the device's free memory, before anything is loaded. Raises
    MemoryPlanError.
    """
    found, others = available(device)
    planned = plan.choose(
        on_leased(estimated),
        kind.name,
        device.type,
        found,
        threshold=threshold,
        windows=windows,
        correction=correction or Correction(),
        others=others,
    )
    log.info(
        "plan: batches of %d tokens, chunks of %d; %s of %s free",
        planned.plan.batch_tokens,
        planned.plan.chunk_size,
        terminal.format_bytes(planned.components.total),
        terminal.format_bytes(found.free),
    )
    return planned
