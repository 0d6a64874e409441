"""What memory is counted in: workloads, categories of bytes, and the kinds of weights that a model
can have.

All sizes are bytes. GB are 10⁹ of them, GiB 2³⁰.
"""

from dataclasses import dataclass, replace

from theloom.devices.workspace import CUDA_CONTEXT, Capability, cublas_workspace
from theloom.memory.cuda_allocator import LARGE_SEGMENT
from theloom.terminal import format_bytes

# What the caching allocator holds beyond what it gives out, as a share of what is not weights, and
# at least. In replays of models of 1 to 8 billion parameters expandable segments left 8 to 13%;
# others 34% after a pass, and more after batches of many lengths or long chunks, which the
# allocator gives back to the driver before it fails. `load_model` replays its own run.
FRAGMENTATION = 0.35
LEAST_FRAGMENTATION = 2 * LARGE_SEGMENT


@dataclass(frozen=True)
class Workload:
    """One forward pass: windows side by side, tokens of each, and tokens of one step through the KV
    cache.
    """

    windows: int
    tokens: int
    chunk_size: int

    @property
    def steps(self) -> list[int]:
        """Tokens of each step; one step where the window is no longer than a chunk."""
        whole, rest = divmod(self.tokens, self.chunk_size)
        return [self.chunk_size] * whole + [rest] * bool(rest)


@dataclass(frozen=True)
class PeakBytes:
    """Bytes of a forward pass at its peak, weights apart."""

    kv_cache: int
    captured: int
    temporaries: int
    logits: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.kv_cache + self.captured + self.temporaries + self.logits

    def times(self, factor: float) -> "PeakBytes":
        """The same for another number of windows: every part grows with them.

        Args:
            factor: how many times as many.

        Returns:
            Bytes, rounded down.

        Examples:
            >>> PeakBytes(kv_cache=100, captured=20, temporaries=3).times(2).total
            246
        """
        return PeakBytes(
            *(
                int(n * factor)
                for n in (self.kv_cache, self.captured, self.temporaries, self.logits)
            )
        )


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of a model's weights as they are read layer by layer.

    `block`: the largest, as it lies in a buffer, or quantised; `converted`: what the largest takes
    beside it where the file has another precision or layout, or while it is quantised; `kept`: what
    is in no block and no embedding; `embeddings`, mapped; `read`: all blocks that a sweep reads, as
    they are on disk; `tensor`: the largest one on the host while it is quantised for a GPU, 0 where
    whole blocks come through buffers.
    """

    block: int
    converted: int
    kept: int
    embeddings: int
    read: int
    tensor: int = 0

    @property
    def on_device(self) -> int:
        """Two blocks, and what comes beside them."""
        return 2 * self.block + self.converted

    @property
    def on_host(self) -> int:
        """What the host of a GPU holds of the weights."""
        return self.tensor or self.on_device


@dataclass(frozen=True)
class Components:
    """Bytes of a device by category, at the peak of a run."""

    weights: int
    kv_cache: int = 0
    captured: int = 0  # hidden states that hook points hold
    temporaries: int = 0
    logits: int = 0
    on_their_way: int = 0  # hidden states between the model and the file
    workspace: int = 0
    fragmentation: int = 0
    context: int = 0
    overhead: int = 0  # what a process was seen to take beside all of these

    def on(self, capability: Capability) -> "Components":
        """Give the same on a GPU of another compute capability.

        Args:
            capability: the compute capability; None for what is not NVIDIA's.

        Returns:
            A copy with that GPU's workspace of cuBLAS, in bytes.
        """
        return replace(self, workspace=cublas_workspace(capability))

    @property
    def allocated(self) -> int:
        """What `max_memory_allocated` counts."""
        tensors = self.weights + self.kv_cache + self.captured + self.temporaries + self.logits
        return tensors + self.on_their_way + self.workspace

    @property
    def reserved(self) -> int:
        """What `max_memory_reserved` counts."""
        return self.allocated + self.fragmentation

    @property
    def total(self) -> int:
        """What the device must have free before the process starts."""
        return self.reserved + self.context + self.overhead


def with_device_overhead(
    weights: int,
    parts: PeakBytes,
    device: str,
    capability: Capability = (8, 0),
    fragmentation: float = FRAGMENTATION,
) -> Components:
    """Add to a pass what a run takes of a device beside it.

    Args:
        weights: bytes.
        parts: bytes of the pass at its peak.
        device: `cpu`, or the type of a GPU.
        capability: compute capability of the GPU; None: not known, or not NVIDIA's.
        fragmentation: what the allocator holds and gives to nobody, as a share of `parts`.

    Returns:
        Bytes by category.
    """
    components = Components(
        weights, parts.kv_cache, parts.captured, parts.temporaries, parts.logits
    )
    if device == "cpu":
        return components
    return replace(
        components,
        workspace=0 if device == "mps" else cublas_workspace(capability),
        fragmentation=max(LEAST_FRAGMENTATION, int(fragmentation * parts.total)),
        context=0 if device == "mps" else CUDA_CONTEXT,
    )


def by_category(sizes: "PeakBytes | Components") -> str:
    """Put the sizes that are not 0 into words, each with its name.

    Args:
        sizes: bytes by category.

    Returns:
        Such as `kv cache 1.2 MB, temporaries 0.31 GB`.
    """
    return ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}"
        for name, size in vars(sizes).items()
        if size
    )
