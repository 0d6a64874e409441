"""Several GPUs for one model: how many it takes, and which blocks go to which of them.

Blocks stay in order and whole, so that a token's residual stream crosses each border once. The first GPU has the
embeddings too. Nothing runs at the same time on two GPUs of a job: for speed there are shards, and this is for models
that no single card holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from theloom import gpu, lease, memory
from theloom.architecture import Architecture, describe
from theloom.errors import MemoryPlanError
from theloom.estimate import Estimate, Pass
from theloom.host import DeviceMemory
from theloom.memory import Kind
from theloom.precision import BYTES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

MOST_GPUS = 16  # of one machine


@dataclass(frozen=True)
class Share:
    """What the fullest of several GPUs has of a model: of its weights, and of its blocks. Both at most 1."""

    weights: float
    blocks: float


def share(blocks: int, gpus: int, beside: float = 0.0) -> Share:
    """The share of the fullest of `gpus` alike GPUs; `beside` is the share of the weights that is in no block."""
    most = math.ceil(blocks / gpus) / blocks
    return Share(most * (1 - beside) + beside, most) if gpus > 1 else Share(1.0, 1.0)


def of_one(estimate: Estimate, part: Share) -> Estimate:
    """The estimate of that GPU alone: the KV cache is with the blocks, temporaries are those of one block anywhere."""
    passes = {kind: [_part(p, part) for p in found] for kind, found in estimate.passes.items()}
    weights = {kind: int(size * part.weights) for kind, size in estimate.weights.items()}
    return replace(estimate, weights=weights, passes=passes)


def _part(found: Pass, part: Share) -> Pass:
    return replace(found, parts=replace(found.parts, kv_cache=int(found.parts.kv_cache * part.blocks)))


def least(estimate: Estimate, kind: str) -> int:
    """Bytes that a GPU must have free for the smallest pass that a plan can choose."""
    smallest = min((p.parts for p in estimate.passes[kind]), key=lambda parts: parts.total)
    return memory.on_device(estimate.weights[kind], smallest, "cuda").total


def gpus_for(estimate: Estimate, kind: str, blocks: int, beside: float, budget: float) -> int:
    """The fewest alike GPUs that hold a model, with `budget` bytes of each in use. Raises MemoryPlanError."""
    for count in range(1, min(MOST_GPUS, blocks) + 1):
        if least(of_one(estimate, share(blocks, count, beside)), kind) <= budget:
            return count
    needed = memory.in_words(estimate.weights[kind])
    raise MemoryPlanError(
        f"the model's {kind} weights ({needed}) do not fit {MOST_GPUS} GPUs of {memory.in_words(budget)} each; "
        "set memory.quantization, or resources.gpu_memory_gb to the size of your GPUs"
    )


def on_leased(estimated: Estimate) -> Estimate:
    """The estimate by which a job plans: of its fullest GPU where it has leased several, else as it is."""
    count = len(lease.held())
    return of_one(estimated, share(estimated.blocks, count)) if count > 1 else estimated


def available(device: "torch.device") -> tuple[DeviceMemory, str]:
    """`gpu.available`, of the leased GPU with the least free where there are several, all of which take part."""
    import torch

    if len(lease.held()) < 2:
        return gpu.available(device)
    found = [gpu.available(torch.device("cuda", number)) for number in range(len(lease.held()))]
    return min(found, key=lambda one: one[0].free)


def device_map(architecture: Architecture, sizes: Sequence[int], budgets: Sequence[int]) -> dict[str, int]:
    """Which module goes to which GPU (by number), for `from_pretrained`.

    `sizes` are the bytes of each block's weights, `budgets` the bytes that each GPU may give to blocks. Each GPU takes
    blocks in proportion to its budget, and those before the first block and behind the last go with their neighbours.
    Raises MemoryPlanError where they do not fit.
    """
    names = {id(module): name for name, module in architecture.model.named_modules()}
    ends = _cut(sizes, budgets)
    gpu_of = {
        id(block): next(n for n, end in enumerate(ends) if i < end) for i, block in enumerate(architecture.blocks)
    }
    blocks = set(gpu_of)
    found: dict[str, int] = {}

    def walk(module: Any, gpu: int) -> int:
        """Name every module that holds no block, and every block; returns the GPU of the last block seen."""
        if id(module) in blocks:
            found[names[id(module)]] = gpu_of[id(module)]
            return gpu_of[id(module)]
        if not any(id(m) in blocks for m in module.modules()):
            # what comes behind the blocks in the model's own order, such as the final norm, goes with the last of them;
            # the tables of rotary positions are small, and are where the first block is
            stateless = not any(True for _ in module.parameters())
            found[names[id(module)]] = 0 if stateless else gpu
            return gpu
        for child in module.children():
            gpu = walk(child, gpu)
        return gpu

    walk(architecture.model, 0)
    return found


def _cut(sizes: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """The end of each GPU's range of blocks: as even a use of the budgets as whole blocks allow."""
    low, high = 0.0, 1.0
    if (ends := _filled(sizes, budgets, high)) is None:
        raise MemoryPlanError(
            f"{memory.in_words(sum(sizes))} of blocks do not fit {len(budgets)} GPUs with "
            f"{', '.join(memory.in_words(b) for b in budgets)} for them; ask for more with resources.gpu"
        )
    for _ in range(20):
        middle = (low + high) / 2
        if (tried := _filled(sizes, budgets, middle)) is None:
            low = middle
        else:
            high, ends = middle, tried
    return ends


def _filled(sizes: Sequence[int], budgets: Sequence[int], level: float) -> list[int] | None:
    """Fill one GPU after the other up to a share of its budget; None where blocks are left over."""
    ends, block = [], 0
    for budget in budgets:
        used = 0
        while block < len(sizes) and used + sizes[block] <= level * budget:
            used += sizes[block]
            block += 1
        ends.append(block)
    return ends if block == len(sizes) else None


def over_leased(model_config: "PretrainedConfig", kind: Kind, trust_remote_code: bool = False) -> "dict[str, Any]":
    """The `device_map` of a model over the GPUs that this job has leased. Raises MemoryPlanError."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(model_config, trust_remote_code=trust_remote_code)
    free = [gpu.available(torch.device("cuda", number))[0].free for number in range(len(lease.held()))]
    cut = cut_to(describe(model), kind, free)
    return {name: torch.device("cuda", number) for name, number in cut.items()}


def cut_to(architecture: Architecture, kind: Kind, free: Sequence[int]) -> dict[str, int]:
    """The same for GPUs with so many bytes free; `architecture` may be on the meta device.

    The first GPU has the weights that are in no block. A tenth is left for the forward pass, whose plan is made for
    what the fullest has. Raises MemoryPlanError.
    """
    sizes = [_bytes(block, kind) for block in architecture.blocks]
    everything = sum(p.numel() for p in architecture.model.parameters())
    in_blocks = sum(p.numel() for block in architecture.blocks for p in block.parameters())
    budgets = [int(0.9 * room) for room in free]
    budgets[0] = max(0, budgets[0] - BYTES[kind.precision] * (everything - in_blocks))
    return device_map(architecture, sizes, budgets)


def _bytes(block: Any, kind: Kind) -> int:
    """Bytes of a block's weights, matrices quantised: NF4 has a 4-byte scale for each 64 weights."""
    matrix = {None: BYTES[kind.precision], "int8": 1, "int4": 0.5 + 4 / 64}[kind.quantization]
    return int(sum(p.numel() * (matrix if p.ndim > 1 else BYTES[kind.precision]) for p in block.parameters()))
