"""Memory of layerwise execution on device, host and disk, and the batches that fit.

The device holds two blocks of weights, the weights outside blocks and embeddings, and one batch's
pass through one block. The host holds the residuals of the shard, the arguments of the blocks, the
embeddings' pages, and for a GPU two staging buffers for weights. On the CPU both are the same
memory. With quantization the device holds two quantized blocks and the buffers that quantize one
tensor; the host holds that tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from theloom import terminal
from theloom.corpus.batching import Lengths
from theloom.devices.host import DeviceMemory
from theloom.devices.pinned import host_bytes, pinned_bytes
from theloom.devices.workspace import Capability
from theloom.errors import MemoryPlanError
from theloom.memory.sizes import BlockSizes, PeakBytes, Workload, with_device_overhead
from theloom.planning.plan import Plan, smaller_plans
from theloom.store.ring_buffer import IN_FLIGHT, WRITER_BYTES, bytes_on_device, ring_bytes

# Bytes of a mapped file that Linux maps around a page fault if they are in its page cache
# (fault_around_bytes).
FAULT_AROUND = 65_536


@dataclass(frozen=True)
class Need:
    """Bytes that a sweep takes at its peak."""

    buffers: int  # two blocks, and what is being converted or quantized
    host_buffers: int  # the part of them on the host of a GPU
    kept: int
    working_set: int  # one batch through one block, with its KV cache and hook points
    residuals: int  # of the shard, in host memory; of one batch, twice, if they are on disk
    recorded: int
    embeddings: int  # upper bound: pages of the rows that are looked up
    writer: int = 0  # of the file, in a job's own memory
    fixed: int = 0  # CUDA's context and workspace, and its allocator's fragmentation

    @property
    def device(self) -> int:
        """Bytes that a GPU must have free."""
        return self.buffers + self.kept + self.working_set + self.fixed

    @property
    def host(self) -> int:
        """Bytes that the host of a GPU must have free, in addition to the process itself."""
        return self.host_buffers + self.residuals + self.recorded + self.embeddings

    @property
    def cpu(self) -> int:
        """Bytes of a job on the CPU; embeddings are released before the first block is loaded."""
        common = self.kept + self.residuals + self.recorded + self.writer
        return common + max(self.embeddings, self.buffers + self.working_set)


@dataclass(frozen=True)
class LayerwisePlan:
    """How a shard is swept.

    Args:
        plan: batches and chunks.
        spilled: residuals between blocks are on disk, not in host memory.
        need: bytes at the peak.
        changes: differences from the requested plan, one sentence each.
    """

    plan: Plan
    spilled: bool
    need: Need
    changes: tuple[str, ...] = ()


# Bytes of one pass through one block, and of the arguments recorded for all blocks.
PassOf = Callable[[Workload], tuple[PeakBytes, int]]


def need(
    sizes: BlockSizes,
    pass_of: PassOf,
    workloads: Sequence[Workload],
    residuals: int,
    residual_row: int,
    device: str,
    spilled: bool,
    *,
    largest: int = 0,
    capability: Capability = (8, 0),
) -> Need:
    """Compute the bytes of a sweep.

    Args:
        sizes: of the model's blocks.
        pass_of: bytes of a pass through one block.
        workloads: the largest passes of the sweep.
        residuals: bytes of the residuals of all tokens.
        residual_row: bytes of the residual of one token.
        device: `cpu`, or the type of a GPU.
        spilled: residuals are on disk.
        largest: bytes of the largest value on its way to the file; 0: none is written.
        capability: compute capability of the device.

    Returns:
        The bytes by purpose.
    """
    passes = [pass_of(workload) for workload in workloads]
    widest = max(w.windows * w.tokens for w in workloads)
    working = max((parts for parts, _ in passes), key=lambda p: p.total)
    step = max(w.windows * min(w.tokens, w.chunk_size) for w in workloads)
    common = Need(
        buffers=sizes.on_device,
        host_buffers=sizes.on_host,
        kept=sizes.kept,
        working_set=working.total,
        residuals=min(residuals, 2 * widest * residual_row) if spilled else residuals,
        recorded=sum(recorded for _, recorded in passes),
        embeddings=min(sizes.embeddings, residuals // residual_row * (residual_row + FAULT_AROUND)),
        writer=bytes_on_device(device, largest) if largest or device == "cpu" else 0,
    )
    if device == "cpu":
        return common
    # next to the pass: residuals of the next one, those that leave, and rows on their way
    moving = (1 + IN_FLIGHT) * step * residual_row + IN_FLIGHT * largest
    ring = pinned_bytes(ring_bytes(device, largest)) + WRITER_BYTES if largest else 0
    buffers = sizes.tensor or sizes.converted + 2 * pinned_bytes(sizes.block)
    return replace(
        common,
        writer=0,
        host_buffers=buffers + ring,
        residuals=common.residuals if spilled else host_bytes(residuals),
        working_set=working.total + moving,
        fixed=with_device_overhead(0, working, device, capability).total - working.total,
    )


def choose(
    sizes: BlockSizes,
    pass_of: PassOf,
    requested: Plan,
    residuals: int,
    residual_row: int,
    device: str,
    memory: DeviceMemory,
    host: DeviceMemory,
    *,
    threshold: float,
    overhead: int = 0,
    one_pass: bool = False,
    windows: Lengths | None = None,
    streams: bool = True,
    row_bytes: int = 0,
    of_window: int | None = None,
    capability: Capability = (8, 0),
) -> LayerwisePlan:
    """Choose the largest batch that fits, with residuals in host memory if possible, else on disk.

    Args:
        sizes: of the model's blocks.
        pass_of: bytes of a pass through one block.
        requested: the plan that the config asks for.
        residuals: bytes of the residuals of the shard.
        residual_row: bytes of the residual of one token.
        device: `cpu`, or the type of a GPU.
        memory: of the device.
        host: the host's memory.
        threshold: share of either memory that may be in use.
        overhead: bytes that a process was measured to take beyond the prediction.
        one_pass: long documents take one pass if that fits, as in a resident model.
        windows: lengths of the corpus' windows, as for `plan.choose`.
        streams: long documents may go in chunks.
        row_bytes: of a token at the largest hook point.
        of_window: the most rows that are kept of a window; None: all of them.
        capability: compute capability of the device.

    Returns:
        The plan.

    Raises:
        MemoryPlanError: not even the smallest batch fits.
    """
    cuts = [cut.over(windows) for cut in smaller_plans(requested, "device", one_pass, streams)]
    least: tuple[Need, bool] | None = None
    budget = (
        memory.free - int((1 - threshold) * memory.total),
        host.free - int((1 - threshold) * host.total),
    )
    for free, host_free in (budget, (memory.free, host.free)):
        for spilled in (False, True):
            for cut in cuts:
                needed = need(
                    sizes,
                    pass_of,
                    cut.passes,
                    residuals,
                    residual_row,
                    device,
                    spilled,
                    largest=row_bytes * cut.copied_rows(of_window),
                    capability=capability,
                )
                fits = needed.cpu + overhead <= free
                if device != "cpu":
                    fits = needed.device + overhead <= free and needed.host <= host_free
                if fits:
                    return LayerwisePlan(
                        cut, spilled, needed, _changes(requested, cut, spilled, residuals)
                    )
                least = (needed, spilled)
    assert least is not None
    raise MemoryPlanError(_refusal(least[0], device, memory, host))


def _changes(requested: Plan, cut: Plan, spilled: bool, residuals: int) -> tuple[str, ...]:
    changes = []
    if spilled:
        changes.append(
            f"the residuals between blocks ({terminal.format_bytes(residuals)}) wait on disk, "
            "not in host memory"
        )
    if cut.chunk_size != requested.chunk_size:
        changes.append(
            f"long documents go in chunks of {cut.chunk_size} tokens, not {requested.chunk_size}"
        )
    if cut.batch_tokens != requested.batch_tokens:
        changes.append(f"batches of {cut.batch_tokens} tokens, not {requested.batch_tokens}")
    return tuple(changes)


def _refusal(least: Need, device: str, memory: DeviceMemory, host: DeviceMemory) -> str:
    limit = f", limited by {memory.limited_by}" if memory.limited_by else ""
    text = terminal.format_bytes
    if device == "cpu":
        return (
            f"layer by layer the run needs at least {text(least.cpu)} "
            f"(two blocks {text(least.buffers)}, one batch {text(least.working_set)}, "
            f"embeddings at most {text(least.embeddings)}) "
            f"and cpu has {text(memory.free)} free{limit}"
        )
    return (
        f"layer by layer the run needs at least {text(least.device)} of the GPU and "
        f"{text(least.host)} of the host, which have {text(memory.free)} and {text(host.free)} free"
    )
