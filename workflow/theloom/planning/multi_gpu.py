"""Several GPUs for one model: how many it needs, and the estimate of the fullest one.

Blocks stay in order and undivided, so that a token's residual stream crosses each border once. The
first GPU also holds the embeddings. The GPUs of a job compute at the same time, each at a batch of
its own, but for the first and last batches. This is for models that no single GPU holds; shards are
for speed.
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from theloom import terminal
from theloom.corpus.batching import Lengths
from theloom.devices import gpu_lease
from theloom.devices.gpu import available_memory, compute_capability
from theloom.devices.host import DeviceMemory
from theloom.devices.workspace import Capability
from theloom.errors import MemoryPlanError
from theloom.memory.sizes import with_device_overhead
from theloom.model.weight_format import WeightFormat
from theloom.planning import plan
from theloom.planning.estimates.estimate_file import Estimate, Pass
from theloom.planning.plan import Correction, Planned
from theloom.store.ring_buffer import RING_BYTES, bytes_ahead

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)
MAX_GPUS = 16  # of one machine

# Tokens of a batch on several GPUs at most. Each works at one, so more batches keep them busy from
# start to end; so many tokens are enough for the rate of a GPU's products.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Share:
    """Share of a model on the fullest of several GPUs: of its weights and blocks, from 0 to 1."""

    weights: float
    blocks: float
    gpus: int = 1


def share(blocks: int, gpus: int, overhead: float = 0.0) -> Share:
    """Compute the share of the fullest GPU.

    Args:
        blocks: blocks of the model.
        gpus: number of equal GPUs.
        overhead: share of the weights that is in no block.

    Returns:
        The shares of weights and blocks.

    Examples:
        >>> share(32, 2)
        Share(weights=0.5, blocks=0.5, gpus=2)
    """
    most = math.ceil(blocks / gpus) / blocks
    return Share(most * (1 - overhead) + overhead, most, gpus) if gpus > 1 else Share(1.0, 1.0)


def of_one(estimate: Estimate, part: Share) -> Estimate:
    """Reduce an estimate to one GPU's share.

    The KV cache is split with the blocks; temporaries are of one block, so each GPU needs them all.
    What goes to the next GPU stays until it is copied: the residual stream and masks, together no
    more than a quarter of the temporaries, of as many batches as there are GPUs.

    Args:
        estimate: of the whole model.
        part: the GPU's share.

    Returns:
        The estimate of that GPU.
    """
    passes = {kind: [_part(p, part) for p in own] for kind, own in estimate.passes.items()}
    weights = {kind: int(size * part.weights) for kind, size in estimate.weights.items()}
    return replace(estimate, weights=weights, passes=passes)


def _part(whole: Pass, part: Share) -> Pass:
    parts = whole.parts
    kept = part.gpus * parts.temporaries // 4 if part.gpus > 1 else 0
    kv_cache, temporaries = int(parts.kv_cache * part.blocks), parts.temporaries + kept
    return replace(whole, parts=replace(parts, kv_cache=kv_cache, temporaries=temporaries))


def least(estimate: Estimate, kind: str, capability: Capability = None) -> int:
    """Compute what a GPU must have free for the smallest pass that a plan can choose.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        capability: compute capability of the GPU; None: not known.

    Returns:
        Bytes.
    """
    smallest = min((p.parts for p in estimate.passes[kind]), key=lambda parts: parts.total)
    return with_device_overhead(estimate.weights[kind], smallest, "cuda", capability).total


def gpus_for(
    estimate: Estimate,
    kind: str,
    blocks: int,
    overhead: float,
    budget: float,
    capability: Capability = None,
) -> int:
    """Compute the fewest equal GPUs that hold a model.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        blocks: blocks of the model.
        overhead: share of the weights that is in no block.
        budget: bytes of each GPU that may be in use.
        capability: compute capability of each; None: not known.

    Returns:
        The number of GPUs.

    Raises:
        MemoryPlanError: the model does not fit `MAX_GPUS` of them.
    """
    for count in range(1, min(MAX_GPUS, blocks) + 1):
        part = of_one(estimate, share(blocks, count, overhead))
        if least(part, kind, capability) <= budget:
            return count
    needed, each = (terminal.format_bytes(n) for n in (estimate.weights[kind], budget))
    raise MemoryPlanError(
        f"the model's {kind} weights ({needed}) do not fit {MAX_GPUS} GPUs of {each} each; "
        "set memory.quantization, or resources.gpu_memory_gb to the size of your GPUs"
    )


def on_leased(estimated: Estimate) -> Estimate:
    """Reduce an estimate to the fullest of the GPUs that this job has leased, and its batches to
    such that all of them are busy.

    Args:
        estimated: of the whole model.

    Returns:
        The estimate of that GPU; unchanged if the job has leased fewer than two.
    """
    count, requested = len(gpu_lease.held()), estimated.batch_tokens
    if count < 2:
        return estimated
    if requested is not None and requested > BATCH_TOKENS:
        log.info(
            "batches of %d tokens, not %d: each of %d GPUs works at one",
            BATCH_TOKENS,
            requested,
            count,
        )
    part = of_one(estimated, share(estimated.blocks, count))
    return replace(part, batch_tokens=_batch_tokens(estimated))


def ring_growth(estimated: Estimate, row_bytes: int, gpus: int) -> int:
    """Compute the host memory for rows on their way while all of several GPUs are busy, beyond what
    one takes.

    Args:
        estimated: of the run.
        row_bytes: of a token as it is copied off a GPU, all hook points.
        gpus: of a job.

    Returns:
        Bytes; 0 for one GPU.
    """
    step = row_bytes * max(_batch_tokens(estimated), estimated.chunk_size)
    return max(0, bytes_ahead(step, gpus) - RING_BYTES["cuda"])


def _batch_tokens(estimated: Estimate) -> int:
    """Tokens of a batch on several GPUs."""
    return min(estimated.batch_tokens or BATCH_TOKENS, BATCH_TOKENS)


def available(device: "torch.device") -> tuple[DeviceMemory, str]:
    """Measure the memory of the leased GPU with the least free, or of the device.

    Args:
        device: the job's device, used if fewer than two GPUs are leased.

    Returns:
        The memory, and who else uses it (as `gpu.available_memory`).
    """
    import torch

    if len(gpu_lease.held()) < 2:
        return available_memory(device)
    memories = [
        available_memory(torch.device("cuda", number)) for number in range(len(gpu_lease.held()))
    ]
    return min(memories, key=lambda one: one[0].free)


def fit_plan(
    estimated: Estimate,
    kind: WeightFormat,
    device: "torch.device",
    threshold: float,
    windows: Lengths,
    correction: Correction | None = None,
    streams: bool = True,
    room: tuple[DeviceMemory, str] | None = None,
) -> Planned:
    """Choose the plan that fits the device's free memory, before anything is loaded.

    Args:
        estimated: of the run.
        kind: format of the weights.
        device: the job's device.
        threshold: share of the memory that may be in use.
        windows: lengths of the corpus' windows.
        correction: from a measurement on this device, if there is one.
        streams: long documents may go in chunks.
        room: what `available` gave before anything was loaded; None: it is asked now.

    Returns:
        The plan.

    Raises:
        MemoryPlanError: no plan fits.
    """
    memory, others = room or available(device)
    planned = plan.choose(
        on_leased(estimated),
        kind.name,
        device.type,
        memory,
        threshold=threshold,
        windows=windows,
        correction=correction or Correction(),
        others=others,
        streams=streams,
        capability=compute_capability(device),
    )
    log.info(
        "plan: batches of %d tokens, chunks of %d; %s of %s free",
        planned.plan.batch_tokens,
        planned.plan.chunk_size,
        terminal.format_bytes(planned.components.total),
        terminal.format_bytes(memory.free),
    )
    return planned
