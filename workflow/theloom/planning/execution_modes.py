"""Both ways to run a model beside each other: what each takes of a gpu, the host and the disk, and
for how long.

Times are estimated, not measured: floating-point operations over a GPU's dense 16-bit peak
(NVIDIA's data sheets), of which a prefill is taken to reach `EFFICIENCY`; weights over the disk's
speed; residuals over the bus. A block's reading and computing overlap, so the longer of the two
counts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from theloom.config.model_dims import ModelDims
from theloom.devices import gpu_specs
from theloom.hooks.points import HookPoint
from theloom.memory.estimators import Estimator
from theloom.memory.sizes import BlockSizes, Workload, with_device_overhead
from theloom.model.weight_format import WeightFormat
from theloom.precision import BYTES
from theloom.store import file_format

if TYPE_CHECKING:
    import h5py


EFFICIENCY = 0.4


DISK = 3e9  # bytes a second that a local NVMe drive reads


BUS = 20e9  # bytes a second between pinned host memory and a GPU


SHARD_TOKENS = 250_000  # config.TOKENS_OF_SHARD


# 10^12 floating-point operations a second: dense, 16-bit, sums in 32 bits
PEAK = {
    "T4": 65,
    "V100 16 GB": 112,
    "V100 32 GB": 112,
    "L4": 121,
    "A10": 125,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX A6000": 155,
    "L40S": 362,
    "A100 40 GB": 312,
    "A100 80 GB": 312,
    "H100": 989,
    "H200": 989,
}


@dataclass(frozen=True)
class Layerwise:
    """A model layer by layer. Bytes: of the gpu, of host memory, and of a sweep's reading."""

    kind: str  # of the weights (`memory.WeightFormat.name`)
    parameters: int  # of the blocks that a sweep runs
    sizes: BlockSizes
    working_set: int
    device: int
    host: int  # beside the process: residuals of a shard, buffers, embeddings at most, arguments
    residuals: int  # of a shard, the most of `host`
    read: int  # of the disk for each shard
    shard_tokens: int


@dataclass(frozen=True)
class GPUModes:
    """One gpu: hours for a million and for ten million tokens in both modes, None where the model
    does not fit.
    """

    name: str
    usable_bytes: int
    resident: tuple[float, float] | None
    layerwise: tuple[float, float] | None
    reads_hidden: bool


def layerwise(
    estimator: Estimator,
    kind: WeightFormat,
    workload: Workload,
    points: Sequence[HookPoint],
    shard_tokens: int = SHARD_TOKENS,
) -> Layerwise:
    """What a sweep takes on a GPU, where a shard has so many tokens.

    Raises ModelError for a model that does not go layer by layer.
    """
    sizes = estimator.block_sizes(kind, points)
    parts, recorded = estimator.block_forward(kind, workload, points)
    whole = with_device_overhead(0, parts, "cuda").total
    residuals = shard_tokens * estimator.size.hidden_size * BYTES[kind.precision]
    plain = (
        sizes
        if kind.quantization is None
        else estimator.block_sizes(WeightFormat(kind.precision), points)
    )
    return Layerwise(
        kind=kind.name,
        parameters=plain.read // BYTES[kind.precision],
        sizes=sizes,
        working_set=parts.total,
        device=sizes.on_device + sizes.kept + whole,
        host=residuals + sizes.on_host + sizes.embeddings + recorded,
        residuals=residuals,
        read=sizes.read,
        shard_tokens=shard_tokens,
    )


def operations(size: ModelDims, blocks: int, parameters: int, tokens: int) -> float:
    """Floating-point operations of a token through so many blocks with their parameters, in windows
    of `tokens`.

    Two for each weight, and 4·q·t/2 for each block's attention over t/2 keys on average. Experts
    that a token does not meet are counted too: an upper bound for mixtures of experts.
    """
    return 2 * parameters + 2 * blocks * size.num_heads * size.head_dim * tokens


def gpu_modes(
    estimator: Estimator,
    kind: WeightFormat,
    tokens: int,
    resident_bytes: int,
    found: Layerwise,
    blocks: int,
) -> list[GPUModes]:
    """Both modes on every GPU whose speed is known, with windows of so many tokens."""
    each = operations(estimator.size, blocks, found.parameters, tokens)
    answered = []
    for gpu in gpu_specs.gpus():
        if gpu.name not in PEAK:
            continue
        able = gpu.computes(kind.name)
        speed = PEAK[gpu.name] * 1e12 * EFFICIENCY
        resident, swept = None, None
        hidden = found.shard_tokens * each / blocks / speed >= found.read / blocks / DISK
        if able and resident_bytes <= gpu.usable_bytes:
            resident = (_hours(1e6 * each / speed), _hours(1e7 * each / speed))
        if able and found.device <= gpu.usable_bytes:
            swept = (
                _swept(1e6, each, speed, found, blocks),
                _swept(1e7, each, speed, found, blocks),
            )
        answered.append(GPUModes(gpu.name, gpu.usable_bytes, resident, swept, hidden))
    return answered


def write(
    file: "h5py.File",
    resident: int,
    host: int,
    found: "Layerwise | str",
    answered: Sequence[GPUModes],
) -> None:
    """Write both modes beside each other to `/modes` of `estimate.h5`; `found` is why it does not
    go layer by layer.
    """
    group = file.create_group("modes")
    file_format.set_attributes(group.create_group("resident"), {"device": resident, "host": host})
    one = group.create_group("layerwise")
    if isinstance(found, str):
        file_format.set_attributes(one, {"refused": found})
        return
    plain = {name: value for name, value in asdict(found).items() if name != "sizes"}
    file_format.set_attributes(one, plain | asdict(found.sizes))
    group["GPUs"] = file_format.fixed_strings([gpu.name for gpu in answered])
    never = (np.nan, np.nan)
    for mode in ("resident", "layerwise"):  # hours for a million and for ten million tokens
        group[f"{mode}/hours"] = np.array(
            [getattr(gpu, mode) or never for gpu in answered]
        ).reshape(-1, 2)
    file_format.set_attributes(group, {"efficiency": EFFICIENCY, "disk_bytes_a_second": DISK})


def _swept(tokens: float, each: float, speed: float, found: Layerwise, blocks: int) -> float:
    """Hours layer by layer: for each shard and block the longer of reading and computing, and the
    residuals' way.
    """
    shard = min(tokens, found.shard_tokens)
    block = max(shard * each / blocks / speed, found.read / blocks / DISK)
    moved = 2 * found.residuals * shard / found.shard_tokens / BUS
    sweeps = -(-tokens // found.shard_tokens)
    return _hours(sweeps * (blocks * (block + moved) + found.read / blocks / DISK))


def _hours(seconds: float) -> float:
    return seconds / 3600
