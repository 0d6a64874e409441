"""The memory and the disk of a run, from its config alone: no weights, no GPU. What `estimate.h5`
holds.

Since the job that will run may find less memory free than was thought of, forward passes of several
shapes are predicted, among which `plan` chooses. They come in closed form where that holds, else
from traces; what is planned in the end is traced, and measured, by `load_model`.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from theloom import terminal
from theloom.config.auto import store_precision, traceable_attention
from theloom.config.frozen import to_plain
from theloom.config.model_dims import dims_of_profile, numbers
from theloom.config.schema import Config
from theloom.errors import MemoryPlanError, ModelError
from theloom.hooks.points import HookPoint, deepest_block
from theloom.memory import closed_form
from theloom.memory.estimators import ClosedForm, Estimator, Traced, config_of, row_bytes
from theloom.memory.sizes import PeakBytes, Workload, by_category, with_device_overhead
from theloom.model import weight_format
from theloom.model.files import hf_config
from theloom.model.weight_format import WEIGHT_FORMATS, WeightFormat, quantization_of
from theloom.precision import BYTES
from theloom.store import file_format, provenance
from theloom.store.ring_buffer import RING_BYTES, bytes_on_device

log = logging.getLogger(__name__)

SMALLEST_CHUNK = 64


HOST_PROCESS = (
    450_000_000  # bytes resident in a process that has imported torch, transformers and h5py
)


DEFAULT_CONTEXT = 2048  # tokens, of a model whose config does not say


@dataclass(frozen=True)
class Pass:
    """One window's forward pass: its tokens, those of a step, and its bytes while hook points are
    written as they come.

    More windows side by side take as many times the bytes.
    """

    tokens: int
    chunk_size: int
    parts: PeakBytes


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before anything is loaded. Bytes; by kind of weights: fp32, fp16,
    bf16, int8, int4, …
    """

    model_type: str
    attention: str
    device: str  # cpu or cuda: whose kernels were thought of
    context_length: int  # tokens of the longest window
    chunk_size: int  # requested
    batch_tokens: int | None  # requested; None: the plan's to choose
    cache: str  # where the KV cache of long documents may be: auto, device or offloaded
    blocks: int  # that run: up to the deepest hook point
    hooks: list[str]
    weights: dict[str, int]  # of what is loaded: up to the deepest hook point
    load_peak: dict[str, int]
    passes: dict[str, list[Pass]]
    captured_full: dict[str, int]  # of a token, all hook points of the model
    captured_selected: dict[str, int]  # of a token, those requested
    largest_capture: dict[str, int]  # of a token, the largest one of those, as it is stored
    row_bytes: dict[str, int]  # on disk, of a token, by precision of the store
    host: dict[str, int]  # resident memory of a job that holds the model
    rows: int | None  # tokens of the corpus, where max_tokens bounds them

    def disk_bytes(self, store_precision: str) -> int | None:
        """Bytes of all shards together, where the number of tokens is known."""
        return None if self.rows is None else self.rows * self.row_bytes[store_precision]

    def find(self, kind: str, tokens: int, chunk_size: int) -> PeakBytes:
        """The bytes of one window of `tokens`, in steps of `chunk_size`: of the least pass predicted
        that covers it.
        """
        for candidate in sorted(self.passes[kind], key=lambda p: p.tokens):
            if candidate.tokens >= tokens and candidate.chunk_size == chunk_size:
                return candidate.parts.times(tokens / candidate.tokens)
        one_pass = max(
            (p for p in self.passes[kind] if p.tokens <= p.chunk_size), key=lambda p: p.tokens
        )
        return one_pass.parts.times(tokens / one_pass.tokens)


def chunk_sizes(largest: int) -> list[int]:
    """The chunk sizes that a plan can choose from: the one requested, a quarter of it, and so on."""
    sizes = [largest]
    while sizes[-1] // 4 >= SMALLEST_CHUNK:
        sizes.append(sizes[-1] // 4)
    return sizes


def estimate(config: Config, estimator: Estimator, device: str = "cpu") -> Estimate:
    """The estimate of a run. `device` is cpu or cuda. Raises HookError for hook points that the
    model has not.
    """
    size = estimator.size
    catalog = estimator.catalog()
    points = catalog.select(config.memory.activation_cache_filter)
    context = config.corpus.context_length or size.context_length or DEFAULT_CONTEXT
    if config.corpus.max_tokens is not None:
        context = min(context, config.corpus.max_tokens)
    chunk_size = min(config.memory.streaming_chunk_size, context)
    passes = {}
    for kind in _wanted(config, estimator.own):
        try:
            passes[kind.name] = _passes(estimator, kind, points, context, chunk_size, device)
        except ModelError as error:
            if config.memory.quantization or not kind.quantization:
                raise
            log.info(
                "not offered in %s: %s", kind.name, error
            )  # Mamba's own kernels take no quantised weights
    weights = {name: estimator.weights(kind, points) for name, kind in WEIGHT_FORMATS.items()}
    return Estimate(
        model_type=size.model_type,
        attention=getattr(estimator, "attention", "sdpa"),
        device=device,
        context_length=context,
        chunk_size=chunk_size,
        batch_tokens=config.extraction.batch_tokens,
        cache=config.extraction.cache.name,
        blocks=min(max(deepest_block(points), 0) + 1, size.num_blocks),
        hooks=[p.name for p in points],
        weights=weights,
        load_peak={
            name: _load_peak(estimator, kind, weights[name])
            for name, kind in WEIGHT_FORMATS.items()
        },
        passes=passes,
        captured_full={
            name: _captured(catalog.points, kind, context) for name, kind in WEIGHT_FORMATS.items()
        },
        captured_selected={
            name: _captured(points, kind, context) for name, kind in WEIGHT_FORMATS.items()
        },
        largest_capture={
            name: _largest(points, store_precision(config, kind.precision), context)
            for name, kind in WEIGHT_FORMATS.items()
        },
        row_bytes={precision: row_bytes(points, precision, context) for precision in BYTES},
        rows=config.corpus.max_tokens,
        host={
            name: _host(estimator, WEIGHT_FORMATS[name], weights[name], found, chunk_size, device)
            for name, found in passes.items()
        },
    )


def _wanted(config: Config, own: str | None) -> list[WeightFormat]:
    """The kinds that the run can have, and those that it is offered where it does not fit."""
    requested = config.memory.precision_mode.name
    precisions = {"fp32": ["fp32", "bf16"], "fp16": ["fp16", "fp32"]}.get(
        requested, ["bf16", "fp16", "fp32"]
    )
    kinds = [weight_format.weight_format_of(config, precision, own) for precision in precisions]
    offered = [WeightFormat("bf16"), WeightFormat("bf16", "int8"), WeightFormat("bf16", "int4")]
    return list({kind.name: kind for kind in [*kinds, *offered]}.values())


def _passes(
    estimator: Estimator,
    kind: WeightFormat,
    points: list[HookPoint],
    context: int,
    chunk_size: int,
    device: str,
) -> list[Pass]:
    """One pass and streamed, for every chunk size that a plan may choose, and one pass over the
    whole context.
    """
    shapes = [Workload(1, context, context)]
    for size in chunk_sizes(chunk_size):
        shapes += [Workload(1, min(size, context), size), Workload(1, context, size)]
    twin = (
        WeightFormat("bf16", kind.quantization) if kind.precision == "fp16" else kind
    )  # of the same sizes
    return [
        Pass(shape.tokens, shape.chunk_size, estimator.forward(twin, shape, points, device=device))
        for shape in dict.fromkeys(shapes)
    ]


def _load_peak(estimator: Estimator, kind: WeightFormat, weights: int) -> int:
    """Weights, and where they are quantised the largest as it comes: that is made int8 or int4 on
    the device.
    """
    return weights + (estimator.largest_weight(kind) if kind.quantization else 0)


def _host(
    estimator: Estimator,
    kind: WeightFormat,
    weights: int,
    passes: list[Pass],
    chunk_size: int,
    device: str,
) -> int:
    """On the CPU all of it; for a GPU, the largest tensor on its way there (CUDA's own libraries
    not counted).
    """
    if device != "cpu":
        return HOST_PROCESS + estimator.largest_weight(kind) + RING_BYTES["cuda"]
    requested = max(p.parts.total for p in passes if p.chunk_size == chunk_size)
    return HOST_PROCESS + weights + requested + bytes_on_device("cpu", 0)


def _captured(points: list[HookPoint], kind: WeightFormat, keys: int) -> int:
    return BYTES[kind.precision] * sum(p.width(keys) for p in points)


def _largest(points: list[HookPoint], precision: str, keys: int) -> int:
    return BYTES[precision] * max(p.width(keys) for p in points)


def check_disk(folder: Path, needed: int, free: int) -> None:
    """The output fits the disk. Raises MemoryPlanError."""
    if needed > free:
        raise MemoryPlanError(
            f"the run writes {needed / 1e9:.3f} GB and {folder} has {free / 1e9:.3f} GB free; "
            "ask for fewer tokens (corpus.max_tokens), fewer hook points or a smaller store.dtype"
        )


def run_estimate(config: Config, output: Path) -> None:
    """The estimate_memory stage: write `estimate.h5`. Raises HookError, MemoryPlanError."""
    estimator = estimator_of(config)
    log.info("by %s", estimator.method)
    found = estimate(config, estimator, "cpu" if config.extraction.device == "cpu" else "cuda")
    precision = likely_precision(config)
    needed = found.disk_bytes(store_precision(config, precision))
    if needed is not None:
        check_disk(output.parent, needed, shutil.disk_usage(output.parent).free)
        log.info("disk: %s", terminal.format_bytes(needed))
    write(found, config, output)
    chosen = weight_format.weight_format_of(config, precision, estimator.own)
    _write_modes(found, estimator, config, chosen, output)
    kind = chosen.name
    log.info(
        "%s weights: %s; host: %s",
        kind,
        terminal.format_bytes(found.weights[kind]),
        terminal.format_bytes(found.host[kind]),
    )
    for candidate in found.passes[kind]:
        total, parts = terminal.format_bytes(candidate.parts.total), by_category(candidate.parts)
        log.info(
            "%d tokens in steps of %d: %s (%s)",
            candidate.tokens,
            candidate.chunk_size,
            total,
            parts,
        )


def _write_modes(
    found: Estimate, estimator: Estimator, config: Config, kind: WeightFormat, output: Path
) -> None:
    """What resident and layerwise execution take, and for how long, into `estimate.h5`."""
    from theloom.planning import execution_modes

    points = estimator.catalog().select(config.memory.activation_cache_filter)
    tokens = found.context_length
    shape = Workload(1, tokens, min(found.chunk_size, tokens))
    resident = with_device_overhead(
        found.weights[kind.name], found.find(kind.name, tokens, found.chunk_size), found.device
    )
    shard = (
        execution_modes.SHARD_TOKENS
        if found.rows is None
        else -(-found.rows // (config.extraction.shards or 1))
    )
    swept: execution_modes.Layerwise | str
    answered: list[execution_modes.GPUModes] = []
    try:
        swept = execution_modes.layerwise(estimator, kind, shape, points, shard)
        run = min(deepest_block(points) + 1, estimator.size.num_blocks)
        answered = execution_modes.gpu_modes(estimator, kind, tokens, resident.total, swept, run)
        read, host = terminal.format_bytes(swept.read), terminal.format_bytes(swept.host)
        log.info(
            "layer by layer: %s of a GPU, host %s, %s read a shard",
            terminal.format_bytes(swept.device),
            host,
            read,
        )
    except ModelError as error:
        swept = str(error)
        log.info("%s", error)
    with h5py.File(output, "r+") as file:
        execution_modes.write(file, resident.total, found.host[kind.name], swept, answered)


def estimator_of(
    config: Config, trace: bool = False, filters: Sequence[str] | None = None, held: bool = False
) -> Estimator:
    """The closed form where it holds for the model and its hook points, else (or if `trace` asks
    for it) the trace.

    `filters`: hook filter, where it is not the config's; `held`: the hook points stay on the
    device. Raises HookError for those that the model has not.
    """
    declared, attention = config.model.architecture, config.extraction.attention.name
    own = None
    if declared is None:
        found = hf_config(config.model)
        size, own = numbers(found), quantization_of(config, found)
    else:
        size = dims_of_profile(declared)
    if own is None and closed_form.covers(size) and attention != "eager" and not trace:
        closed = ClosedForm(size)
        requested = config.memory.activation_cache_filter if filters is None else filters
        if closed.covers(closed.catalog().select(requested), held):
            return closed
    return Traced(
        found if declared is None else config_of(declared),
        traceable_attention(attention),
        config.model.trust_remote_code,
    )


def likely_precision(config: Config) -> str:
    """What precision_mode will give, said without a look at the device: the job may run on another
    machine.
    """
    requested = config.memory.precision_mode.name
    if requested == "auto":
        return "fp32" if config.extraction.device == "cpu" else "bf16"
    return requested


_BY_KIND = (
    "weights",
    "load_peak",
    "host",
    "captured_full",
    "captured_selected",
    "largest_capture",
    "row_bytes",
)


_SINGLE = ("model_type", "attention", "device", "context_length", "chunk_size", "cache", "blocks")


_OPTIONAL = ("rows", "batch_tokens")


_PASS = np.dtype(
    [(name, "<i8") for name in ("tokens", "chunk_size", *(f.name for f in fields(PeakBytes)))]
)


def write(estimate: Estimate, config: Config, output: Path) -> None:
    """Write `estimate.h5`."""
    with h5py.File(output, "w") as file:
        values = {name: getattr(estimate, name) for name in _SINGLE}
        file_format.set_attributes(
            file,
            provenance.attributes(
                "estimate", config=to_plain(config), hooks=estimate.hooks, **values
            ),
        )
        file_format.set_attributes(
            file, {n: v for n in _OPTIONAL if (v := getattr(estimate, n)) is not None}
        )
        for name in _BY_KIND:
            file_format.set_attributes(file.create_group(name), getattr(estimate, name))
        for kind, passes in estimate.passes.items():
            file[f"passes/{kind}"] = np.array(
                [(p.tokens, p.chunk_size, *astuple(p.parts)) for p in passes], _PASS
            )


def read(path: Path) -> Estimate:
    """Read `estimate.h5`."""
    with file_format.open_h5(path, "estimate") as file:
        single: dict[str, Any] = {
            name: _plain(file.attrs.get(name)) for name in (*_SINGLE, *_OPTIONAL)
        }
        by_kind: dict[str, Any] = {
            name: {kind: int(value) for kind, value in file[name].attrs.items()}
            for name in _BY_KIND
        }
        passes = {
            kind: [
                Pass(int(row[0]), int(row[1]), PeakBytes(*(int(n) for n in list(row)[2:])))
                for row in rows[:]
            ]
            for kind, rows in file["passes"].items()
        }
        return Estimate(hooks=json.loads(file.attrs["hooks"]), passes=passes, **single, **by_kind)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | None) else int(value)
