"""Resident and layerwise execution compared: memory of GPU and host, disk reads, and hours.

Times are estimated, not measured: floating-point operations over a GPU's dense 16-bit peak
(NVIDIA's data sheets), of which a prefill is assumed to reach `EFFICIENCY`; weights over the
disk's speed; residuals over the bus. Reading one block overlaps computing another, so the longer
of the two counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from theloom.config.model_dims import ModelDims
from theloom.config.sharding import TOKENS_OF_SHARD
from theloom.devices import gpu_specs
from theloom.devices.workspace import Capability, cublas_workspace
from theloom.hooks.points import HookPoint
from theloom.memory.estimators import Estimator
from theloom.memory.sizes import BlockSizes, Components, Workload, with_device_overhead
from theloom.model.weight_format import WeightFormat
from theloom.precision import BYTES

EFFICIENCY = 0.4
DISK = 3e9  # bytes a second that a local NVMe drive reads
BUS = 20e9  # bytes a second between pinned host memory and a GPU


@dataclass(frozen=True)
class Layerwise:
    """What layerwise execution takes. Bytes of the GPU, of host memory, and of disk reads."""

    kind: str  # name of the weight format
    parameters: int  # of the blocks that a sweep runs
    sizes: BlockSizes
    working_set: int
    device: int
    workspace: int  # of `device`: what libraries take on a GPU of the capability asked for
    host: int  # without the process: residuals of a shard, buffers, embeddings, arguments
    residuals: int  # of a shard; the largest part of `host`
    read: int  # from the disk, per shard
    shard_tokens: int

    def on(self, capability: Capability) -> int:
        """What it takes of a GPU of another compute capability.

        Args:
            capability: of that GPU; None for what is not NVIDIA's.

        Returns:
            Bytes.
        """
        return self.device - self.workspace + cublas_workspace(capability)


@dataclass(frozen=True)
class GPUModes:
    """Estimated hours of both modes on one GPU.

    Args:
        name: the GPU.
        usable_bytes: its memory that programs can use.
        resident: hours for one and for ten million tokens; None if the model does not fit.
        layerwise: the same, layer by layer.
        io_overlapped: reading a block takes no longer than computing one.
    """

    name: str
    usable_bytes: int
    resident: tuple[float, float] | None
    layerwise: tuple[float, float] | None
    io_overlapped: bool


def layerwise(
    estimator: Estimator,
    kind: WeightFormat,
    workload: Workload,
    points: Sequence[HookPoint],
    shard_tokens: int = TOKENS_OF_SHARD,
    capability: Capability = (8, 0),
) -> Layerwise:
    """Estimate what layerwise execution takes on a GPU.

    Args:
        estimator: of the model.
        kind: format of the weights.
        workload: shape of the largest batch.
        points: hook points that are captured.
        shard_tokens: tokens of a shard.
        capability: compute capability of the GPU.

    Returns:
        Bytes of GPU, host and disk.

    Raises:
        ModelError: the model does not support layerwise execution.
    """
    sizes = estimator.block_sizes(kind, points)
    parts, recorded = estimator.block_forward(kind, workload, points)
    taken = with_device_overhead(0, parts, "cuda", capability)
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
        device=sizes.on_device + sizes.kept + taken.total,
        workspace=taken.workspace,
        host=residuals + sizes.on_host + sizes.embeddings + recorded,
        residuals=residuals,
        read=sizes.read,
        shard_tokens=shard_tokens,
    )


def operations(size: ModelDims, blocks: int, parameters: int, tokens: int) -> float:
    """Floating-point operations per token of a prefill.

    Two for each weight, and 4·q·t/2 for each block's attention over t/2 keys on average, where q
    is heads × head size. All experts are counted: an upper bound for mixtures of experts.

    Args:
        size: dimensions of the model.
        blocks: blocks that run.
        parameters: of those blocks together.
        tokens: tokens of a window, t.

    Returns:
        Operations.
    """
    return 2 * parameters + 2 * blocks * size.num_heads * size.head_dim * tokens


def gpu_modes(
    estimator: Estimator,
    kind: WeightFormat,
    tokens: int,
    resident: Components,
    swept: Layerwise,
    blocks: int,
) -> list[GPUModes]:
    """Estimate the hours of both modes on every GPU whose speed is known.

    Args:
        estimator: of the model.
        kind: format of the weights.
        tokens: tokens of a window.
        resident: what resident execution takes of a GPU.
        swept: what layerwise execution takes.
        blocks: blocks that run.

    Returns:
        One entry per GPU, smallest first.
    """
    each = operations(estimator.size, blocks, swept.parameters, tokens)
    modes = []
    for gpu in gpu_specs.gpus():
        if gpu.name not in gpu_specs.PLANNED or gpu.tflops is None:
            continue
        able = gpu.computes(kind.name)
        speed = gpu.tflops * 1e12 * EFFICIENCY
        in_memory, layered = None, None
        overlapped = swept.shard_tokens * each / blocks / speed >= swept.read / blocks / DISK
        if able and resident.on(gpu.compute_capability).total <= gpu.usable_bytes:
            in_memory = (_hours(1e6 * each / speed), _hours(1e7 * each / speed))
        if able and swept.on(gpu.compute_capability) <= gpu.usable_bytes:
            layered = (
                _layerwise_hours(1e6, each, speed, swept, blocks),
                _layerwise_hours(1e7, each, speed, swept, blocks),
            )
        modes.append(GPUModes(gpu.name, gpu.usable_bytes, in_memory, layered, overlapped))
    return modes


def _layerwise_hours(
    tokens: float, each: float, speed: float, swept: Layerwise, blocks: int
) -> float:
    """Hours of layerwise execution.

    Per shard and block: the longer of reading and computing, and the residuals' way to the GPU and
    back; the first block of a sweep is read while nothing is computed.
    """
    shard = min(tokens, swept.shard_tokens)
    block = max(shard * each / blocks / speed, swept.read / blocks / DISK)
    moved = 2 * swept.residuals * shard / swept.shard_tokens / BUS
    sweeps = -(-tokens // swept.shard_tokens)
    return _hours(sweeps * (blocks * (block + moved) + swept.read / blocks / DISK))


def _hours(seconds: float) -> float:
    return seconds / 3600
