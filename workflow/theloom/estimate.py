"""The memory and the disk that a run needs, from its config alone: no weights, no GPU.

Weights are counted on the model's own classes, built without storage; the KV cache, the captured hidden states and the
output are exact products of shapes. The working set of a forward pass is the closed form for Llama-like blocks with
fused attention, n·e·(3·I + 4·h) bytes for n tokens of e bytes, MLP width I and hidden size h, which tracing such models
op by op gives to 0.1%; other architectures may differ, and `load_model` measures what it really is.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import h5py

from theloom import architecture, layout, provenance
from theloom.architecture import Numbers
from theloom.config import plain
from theloom.errors import MemoryPlanError
from theloom.hooks import HookPoint, catalogue, select
from theloom.model import hf_config
from theloom.precision import BYTES
from theloom.schema import ArchitectureConfig, Config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

# Bytes of one weight of a linear layer inside the blocks; all other weights stay in 16 bits. NF4 keeps a 4-byte scale
# for each 64 weights (bitsandbytes' block size), LLM.int8() one for each output row, which is not counted.
QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 64}
TOKEN_TABLES_BYTES = 12  # input_ids, document and position, 4 bytes each


@dataclass(frozen=True)
class Plan:
    """How the run is cut into forward passes. Tokens, except `batch_windows`."""

    batch_tokens: int
    chunk_size: int
    context_length: int  # longest window; 0: not known
    shards: int

    @property
    def batch_windows(self) -> int:
        """Windows of full chunk size that share a forward pass."""
        return max(1, self.batch_tokens // self.chunk_size)

    @property
    def forward_tokens(self) -> int:
        """Tokens of the largest forward pass."""
        return self.batch_windows * self.chunk_size

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held while the longest window streams; 0 where none is that long."""
        return self.context_length if self.context_length > self.chunk_size else 0


@dataclass(frozen=True)
class Components:
    """Bytes by category at one precision."""

    weights: int
    kv_cache: int
    captured: int  # hidden states of one forward pass, all hook points asked for
    working_set: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.captured + self.working_set


@dataclass(frozen=True)
class Estimate:
    """What `estimate.h5` holds."""

    plan: Plan
    hooks: list[str]
    components: dict[str, Components]  # by precision: fp32, fp16, bf16, int8, int4
    row_bytes: dict[str, int]  # bytes on disk of one token, by precision of the store
    rows: int | None  # tokens of the corpus, where max_tokens bounds them

    def disk_bytes(self, store_precision: str) -> int | None:
        """Bytes of all shards together, where the number of tokens is known."""
        return None if self.rows is None else self.rows * self.row_bytes[store_precision]


@dataclass(frozen=True)
class _Counts:
    total: int
    in_block_linears: int


def config_of(numbers: ArchitectureConfig) -> "PretrainedConfig":
    """A transformers config from the numbers of a profile."""
    from transformers import AutoConfig

    known = {k: v for k, v in cast(Any, numbers).items() if k not in ("model_type", "parameters") and v is not None}
    return AutoConfig.for_model(numbers.model_type, **known)


def skeleton(config: "PretrainedConfig", trust_remote_code: bool = False) -> "torch.nn.Module":
    """The model that extraction loads (no LM head), built without storage."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=trust_remote_code)


def estimate(config: Config, model_config: "PretrainedConfig") -> Estimate:
    """The estimate of a run, from its config and the model's. Raises HookError for hook points it has not."""
    size = architecture.numbers(model_config)
    points = select(config.memory.activation_cache_filter, catalogue(size.num_blocks, size.hidden_size))
    context = config.corpus.context_length or size.context_length
    if config.corpus.max_tokens is not None:
        context = min(context or config.corpus.max_tokens, config.corpus.max_tokens)
    plan = Plan(
        batch_tokens=config.extraction.batch_tokens,
        chunk_size=config.memory.streaming_chunk_size,
        context_length=context,
        shards=config.extraction.shards,
    )
    counts = _count(model_config, config.model.trust_remote_code)
    return Estimate(
        plan=plan,
        hooks=[p.name for p in points],
        components={p: _components(p, counts, size, plan, points) for p in (*BYTES, *QUANTIZED_BYTES)},
        row_bytes={p: BYTES[p] * sum(h.width for h in points) + TOKEN_TABLES_BYTES for p in BYTES},
        rows=config.corpus.max_tokens,
    )


def _count(model_config: "PretrainedConfig", trust_remote_code: bool) -> _Counts:
    import torch

    model: Any = skeleton(model_config, trust_remote_code)
    linears = {
        id(module.weight): module.weight.numel()
        for block in architecture.describe(model).blocks
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    }
    return _Counts(sum(p.numel() for p in model.parameters()), sum(linears.values()))


def _components(precision: str, counts: _Counts, size: Numbers, plan: Plan, points: list[HookPoint]) -> Components:
    element = BYTES.get(precision, 2)
    weights: float = counts.total * element
    if precision in QUANTIZED_BYTES:
        weights -= counts.in_block_linears * (element - QUANTIZED_BYTES[precision])
    running_blocks = 1 + max(p.block for p in points)
    tokens = plan.forward_tokens
    return Components(
        weights=int(weights),
        kv_cache=2 * running_blocks * size.num_kv_heads * size.head_dim * element * plan.cached_tokens,
        captured=tokens * sum(p.width for p in points) * element,
        working_set=tokens * element * (3 * size.intermediate_size + 4 * size.hidden_size),
    )


def weight_kind(config: Config, precision: str) -> str:
    """Which entry of `Estimate.components` a run has: its quantisation's, else its precision's."""
    quantization = config.memory.quantization
    return precision if quantization is None else {"8bit": "int8", "4bit": "int4"}[quantization.name]


def check_disk(folder: Path, needed: int, free: int) -> None:
    """The output fits the disk. Raises MemoryPlanError."""
    if needed > free:
        raise MemoryPlanError(
            f"the run writes {needed / 1e9:.3f} GB and {folder} has {free / 1e9:.3f} GB free; "
            "ask for fewer tokens (corpus.max_tokens), fewer hook points or a smaller store.dtype"
        )


def check_memory(needed: Components, total: int, free: int, device: str, threshold: float) -> None:
    """The run fits the device's free memory; warns where it takes more than `threshold` of the whole.

    Raises MemoryPlanError.
    """
    parts = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f}" for name, value in asdict(needed).items())
    if needed.total > free:
        raise MemoryPlanError(
            f"the run needs {needed.total / 1e9:.2f} GB ({parts}) and {device} has {free / 1e9:.2f} GB free; lower "
            "memory.precision_mode, set memory.quantization, or lower extraction.batch_tokens and corpus.context_length"
        )
    if needed.total > threshold * total:
        log.warning(
            "the run is planned to take %.2f GB (%s), more than %.0f%% of the %.2f GB of %s",
            needed.total / 1e9,
            parts,
            100 * threshold,
            total / 1e9,
            device,
        )


def run_estimate(config: Config, output: Path) -> None:
    """The estimate_memory stage: write `estimate.h5`. Raises HookError, MemoryPlanError."""
    declared = config.model.architecture
    found = estimate(config, hf_config(config.model) if declared is None else config_of(declared))
    precision = _likely_precision(config)
    store = precision if config.store.dtype.name == "auto" else config.store.dtype.name
    needed = found.disk_bytes(store)
    if needed is not None:
        check_disk(output.parent, needed, shutil.disk_usage(output.parent).free)
    write(found, config, output)
    kind = weight_kind(config, precision)
    log.info("%s: %.3f GB in all; %s", kind, found.components[kind].total / 1e9, found.components[kind])


def _likely_precision(config: Config) -> str:
    """What precision_mode will give, said without a look at the device: the job may run on another machine."""
    asked = config.memory.precision_mode.name
    if asked == "auto":
        return "fp32" if config.extraction.device == "cpu" else "bf16"
    return asked


def write(estimate: Estimate, config: Config, output: Path) -> None:
    """Write `estimate.h5`."""
    with h5py.File(output, "w") as file:
        layout.set_attributes(
            file,
            provenance.attributes("estimate", config=plain(config), hooks=estimate.hooks),
        )
        if estimate.rows is not None:
            file.attrs["rows"] = estimate.rows
        layout.set_attributes(file.create_group("plan"), asdict(estimate.plan))
        layout.set_attributes(file.create_group("row_bytes"), estimate.row_bytes)
        for precision, components in estimate.components.items():
            group = file.create_group(f"components/{precision}")
            layout.set_attributes(group, {**asdict(components), "total": components.total})


def read(path: Path) -> Estimate:
    """Read `estimate.h5`."""
    with layout.open_h5(path, "estimate") as file:
        components = {
            precision: Components(**{k: int(v) for k, v in group.attrs.items() if k != "total"})
            for precision, group in file["components"].items()
        }
        return Estimate(
            plan=Plan(**{k: int(v) for k, v in file["plan"].attrs.items()}),
            hooks=json.loads(file.attrs["hooks"]),
            components=components,
            row_bytes={k: int(v) for k, v in file["row_bytes"].attrs.items()},
            rows=int(file.attrs["rows"]) if "rows" in file.attrs else None,
        )
