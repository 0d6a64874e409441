"""What a sweep layer by layer takes of a device, of the host and of the disk, and which batches
fit.

On the device: two blocks of weights, what is in no block and no embedding, one batch's pass through
one block. On the host: the residuals of the shard, the arguments of the blocks, the embeddings'
pages, and for a GPU the two buffers that weights come through. On the CPU both are one memory. Of
quantised weights the device holds two blocks as they are quantised and what it takes to quantise
one tensor, and the host that tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from theloom import terminal
from theloom.corpus.batching import Lengths
from theloom.devices.host import DeviceMemory
from theloom.errors import MemoryPlanError
from theloom.memory.sizes import BlockSizes, PeakBytes, Workload, with_device_overhead
from theloom.planning.plan import Plan, smaller_plans
from theloom.store.ring_buffer import WRITER_BYTES

# Bytes of a mapped file that Linux brings in around one that is read, where they are in its cache
# (fault_around_bytes)
FAULT_AROUND = 65_536


@dataclass(frozen=True)
class Need:
    """Bytes that a sweep takes at its peak."""

    buffers: int  # two blocks, and what is converted or quantised
    host_buffers: int  # what a GPU's host holds of them
    kept: int
    working_set: (
        int  # one batch's pass through one block, its KV cache and what hook points make included
    )
    residuals: int  # of the shard, in host memory; of one batch, twice, where they are on disk
    recorded: int
    embeddings: int  # at most: the pages of the rows that are looked up
    writer: int = 0  # of the file, in a job's own memory
    fixed: int = 0  # CUDA's context and workspace, and what its allocator holds beyond

    @property
    def device(self) -> int:
        """What a GPU must have free."""
        return self.buffers + self.kept + self.working_set + self.fixed

    @property
    def host(self) -> int:
        """What the host must have free for a GPU's job, beside the process itself."""
        return self.host_buffers + self.residuals + self.recorded + self.embeddings

    @property
    def cpu(self) -> int:
        """What a job on the CPU takes: the embeddings are let go before the first block comes."""
        common = self.kept + self.residuals + self.recorded + self.writer
        return common + max(self.embeddings, self.buffers + self.working_set)


@dataclass(frozen=True)
class LayerwisePlan:
    """How a shard is swept: the cut into batches and chunks, where the residuals wait, and the
    bytes it takes.
    """

    plan: Plan
    spilled: bool
    need: Need
    changes: tuple[str, ...] = ()


# the bytes of one pass through one block, and of the arguments recorded for all blocks
PassOf = Callable[[Workload], tuple[PeakBytes, int]]


def need(
    sizes: BlockSizes,
    pass_of: PassOf,
    workloads: Sequence[Workload],
    residuals: int,
    residual_row: int,
    device: str,
    spilled: bool,
) -> Need:
    """The bytes of a sweep. `workloads`: its largest passes; `residuals`: of all tokens;
    `residual_row`: of one.
    """
    passes = [pass_of(workload) for workload in workloads]
    widest = max(w.windows * w.tokens for w in workloads)
    working = max((parts for parts, _ in passes), key=lambda p: p.total)
    fixed = (
        with_device_overhead(0, working, "cuda").total - working.total if device == "cuda" else 0
    )
    return Need(
        buffers=sizes.on_device,
        host_buffers=sizes.on_host,
        kept=sizes.kept,
        working_set=working.total,
        residuals=min(residuals, 2 * widest * residual_row) if spilled else residuals,
        recorded=sum(recorded for _, recorded in passes),
        embeddings=min(sizes.embeddings, residuals // residual_row * (residual_row + FAULT_AROUND)),
        writer=WRITER_BYTES if device == "cpu" else 0,
        fixed=fixed,
    )


def choose(
    sizes: BlockSizes,
    pass_of: PassOf,
    requested: Plan,
    residuals: int,
    residual_row: int,
    device: str,
    found: DeviceMemory,
    host: DeviceMemory,
    *,
    threshold: float,
    overhead: int = 0,
    one_pass: bool = False,
    windows: Lengths | None = None,
) -> LayerwisePlan:
    """The largest batch that fits, residuals in host memory if there is room, else on disk. Raises
    MemoryPlanError.

    `found` is what the device has free, `host` what the host has; `beside` what a process was seen
    to take beside what is predicted; `one_pass`: long documents go in one pass where that fits, as
    they would in a resident model; `windows`: as `plan.choose` takes them.
    """
    cuts = [cut.over(windows) for cut in smaller_plans(requested, "device", one_pass)]
    least: tuple[Need, bool] | None = None
    budget = (
        found.free - int((1 - threshold) * found.total),
        host.free - int((1 - threshold) * host.total),
    )
    for free, host_free in (budget, (found.free, host.free)):
        for spilled in (False, True):
            for cut in cuts:
                needed = need(sizes, pass_of, cut.passes, residuals, residual_row, device, spilled)
                fits = needed.cpu + overhead <= free
                if device == "cuda":
                    fits = needed.device + overhead <= free and needed.host <= host_free
                if fits:
                    return LayerwisePlan(
                        cut, spilled, needed, _changes(requested, cut, spilled, residuals)
                    )
                least = (needed, spilled)
    assert least is not None
    raise MemoryPlanError(_refusal(least[0], device, found, host))


def _changes(requested: Plan, cut: Plan, spilled: bool, residuals: int) -> tuple[str, ...]:
    changes = []
    if spilled:
        changes.append(
            f"the residuals between blocks ({terminal.format_bytes(residuals)}) wait on disk, not in host memory"
        )
    if cut.chunk_size != requested.chunk_size:
        changes.append(
            f"long documents go in chunks of {cut.chunk_size} tokens, not {requested.chunk_size}"
        )
    if cut.batch_tokens != requested.batch_tokens:
        changes.append(f"batches of {cut.batch_tokens} tokens, not {requested.batch_tokens}")
    return tuple(changes)


def _refusal(least: Need, device: str, found: DeviceMemory, host: DeviceMemory) -> str:
    limit = f", limited by {found.limited_by}" if found.limited_by else ""
    if device == "cpu":
        return (
            f"layer by layer the run needs at least {terminal.format_bytes(least.cpu)} (two blocks "
            f"{terminal.format_bytes(least.buffers)}, one batch {terminal.format_bytes(least.working_set)}, embeddings at most "
            f"{terminal.format_bytes(least.embeddings)}) and cpu has {terminal.format_bytes(found.free)} free{limit}"
        )
    return (
        f"layer by layer the run needs at least {terminal.format_bytes(least.device)} of the GPU and "
        f"{terminal.format_bytes(least.host)} of the host, which have {terminal.format_bytes(found.free)} and "
        f"{terminal.format_bytes(host.free)} free"
    )
