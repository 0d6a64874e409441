"""Memory of one model for one workload, and the GPUs that it fits on (`theloom estimate`).

Llama-like models have a closed form, which needs no torch; others are traced.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from theloom.config import auto, compose, frozen, locations, words
from theloom.config.model_dims import ModelDims
from theloom.config.schema import Config
from theloom.devices import gpu_specs, nvml
from theloom.errors import ConfigError, ModelError
from theloom.hooks.points import (
    RESIDUALS,
    HookPoint,
    deepest_block,
    residual_points,
)
from theloom.hooks.stages.resolution import check_one_resolution
from theloom.memory import sizes, stages
from theloom.memory.estimators import Estimator, row_bytes
from theloom.memory.sizes import Components, PeakBytes, Workload
from theloom.model import weight_format
from theloom.model.weight_format import WEIGHT_FORMATS, WeightFormat
from theloom.planning import disk, estimate, execution_modes
from theloom.planning.estimates import run_models
from theloom.planning.execution_modes import GPUModes, Layerwise
from theloom.precision import BYTES
from theloom.store.provenance import PACKAGES, package_version

# Share of a GPU's usable memory for its largest batch: the default of memory_warning_threshold.
HEADROOM = 0.85

AMPERE = (8, 0)  # where no GPU is named or at hand


def capability_of(name: str | None) -> tuple[int, int]:
    """Find the compute capability of the GPU that is named, else of the first at hand.

    Args:
        name: such as `h100`; None: not named.

    Returns:
        Major and minor; those of `AMPERE` where none is named and the driver shows none.

    Raises:
        ConfigError: no known GPU has the name.
    """
    if name is None:
        at_hand = (d.compute_capability for d in nvml.read().devices)
        return next((c for c in at_hand if c is not None), AMPERE)
    boards = gpu_specs.find(name)
    if not boards:
        raise ConfigError(f"no known GPU is named {name!r}; theloom gpus --all lists them")
    return boards[0].compute_capability


@dataclass(frozen=True)
class FittingGPU:
    """A GPU with enough memory for the run.

    Args:
        name: the GPU.
        compute_capability: major and minor.
        usable_bytes: its memory that programs can use.
        headroom_bytes: what the run leaves of it.
        largest_batch: windows of the requested length that fit in one batch.
        tokens: of a window.
    """

    name: str
    compute_capability: tuple[int, int]
    usable_bytes: int
    headroom_bytes: int
    largest_batch: int
    tokens: int


@dataclass(frozen=True)
class Forecast:
    """Memory of one model in one weight format, in bytes unless a name states another unit."""

    model: str
    model_type: str
    method: str
    kind: str
    attention: str
    capability: tuple[int, int]  # of the GPU, by which its libraries take memory
    windows: int
    tokens: int
    chunk_size: int
    hooks: list[str]
    versions: dict[str, str]
    weights: int
    lm_head: int  # not loaded
    kv_cache: int  # of all windows, keys and values of every block that runs
    captured_full: int  # every residual, held at once
    captured_every: int  # every hook point of the model, attention patterns included
    captured_selected: int
    temporaries: int
    held_full: Components
    held_selected: Components
    pipeline: Components  # hook points written as they come
    load_peak: int
    host: int
    disk_per_million_tokens: int
    totals: dict[str, int]  # of the pipeline, by kind
    gpus: list[FittingGPU]
    layerwise: Layerwise | None  # None: unsupported
    layerwise_unsupported: str  # the reason, else ""
    layerwise_gpus: list[str]  # with enough memory for layerwise execution, smallest first
    gpu_modes: list[GPUModes]


def forecast(
    target: str,
    precision: str | None = None,
    windows: int = 1,
    tokens: int = 2048,
    filters: Sequence[str] | None = None,
    trace: bool = False,
    capability: tuple[int, int] = AMPERE,
) -> Forecast:
    """Forecast the memory of a profile or a model.

    Args:
        target: a profile, or a model (hub id, folder, `package:NAME`).
        precision: of the weights: fp32, fp16, bf16, int8 or int4; None: the profile's, bf16 for
            `auto`.
        windows: windows in a batch.
        tokens: tokens per window.
        filters: hook filters; None: the profile's.
        trace: trace the model even if there is a closed form.
        capability: compute capability of the GPU, by which its libraries take memory.

    Returns:
        The forecast.

    Raises:
        TheLoomError: the target, a hook point or the precision is unknown or unsupported.

    Examples:
        >>> forecast("7b", "bf16", windows=1, tokens=2048).kv_cache
        268435456
    """
    settings = settings_of(target)
    requested = settings.memory.activation_cache_filter if filters is None else filters
    if (side := auto.side(requested)) and settings.model.side is None:
        settings = run_models.with_side(settings, side)
    settings = run_models.as_it_reads(settings)
    if settings.model.modality is not None:  # the encoder, where nothing names the decoder
        settings = run_models.halves(settings)[0]
    if named := auto.stages(requested):
        settings = stages.with_stages(settings, named)
    estimator = run_models.estimator_of(settings, trace, requested, held=True)
    kind = kind_of(settings, precision, estimator.own)
    residuals = residual_points(estimator.size.num_blocks, estimator.size.hidden_size)
    catalog = estimator.catalog()
    points = catalog.select(requested)
    check_one_resolution(points)
    if named:
        residuals = points  # of one number of rows; others are of other runs
    chunk_size = min(settings.memory.streaming_chunk_size, tokens)
    if settings.model.modality is not None:
        tokens = estimator.size.context_length  # rows of an image or a clip, or a longer target
    if estimator.size.side or estimator.size.senses:
        chunk_size = tokens  # half of a model goes in one pass, and so does a tower
    workload = Workload(windows, tokens, chunk_size)
    written = smaller_pass(estimator, kind, workload, points)
    weights = estimator.weights(kind)
    values = windows * tokens * BYTES[kind.precision]
    pipeline = sizes.with_device_overhead(weights, written, "cuda", capability)
    full, selected = (
        estimator.forward(kind, workload, chosen, held=True) for chosen in (residuals, points)
    )
    swept, unsupported = _layerwise(estimator, kind, workload, points, capability)
    deepest = min(deepest_block(points) + 1, estimator.size.num_blocks)
    able = [gpu for gpu in gpu_specs.gpus() if gpu.computes(kind.name)]
    return Forecast(
        model=settings.model.source,
        model_type=estimator.size.model_type,
        method=estimator.method,
        kind=kind.name,
        attention=getattr(estimator, "attention", "sdpa"),
        capability=capability,
        windows=windows,
        tokens=tokens,
        chunk_size=chunk_size,
        hooks=[p.name for p in points],
        versions={p: v for p in PACKAGES if (v := package_version(p))},
        weights=weights,
        lm_head=_lm_head(settings, estimator.size, kind),
        kv_cache=kv_cache(estimator.size, kind, windows * tokens),
        captured_full=values * _held_width(residuals, tokens),
        captured_every=values * _held_width(catalog.points, tokens),
        captured_selected=values * _held_width(points, tokens),
        temporaries=written.temporaries,
        held_full=sizes.with_device_overhead(weights, full, "cuda", capability),
        held_selected=sizes.with_device_overhead(weights, selected, "cuda", capability),
        pipeline=pipeline,
        load_peak=weights + (estimator.largest_weight(kind) if kind.quantization else 0),
        host=estimate.HOST_PROCESS + weights + written.total,
        disk_per_million_tokens=10**6
        * (row_bytes(points, kind.precision, tokens) + disk.token_bytes(settings)),
        totals={
            name: _total(estimator, other, workload, points, capability)
            for name, other in WEIGHT_FORMATS.items()
            if "+" not in name
        },
        gpus=fitting(estimator, kind, workload, points, pipeline),
        layerwise=swept,
        layerwise_unsupported=unsupported,
        layerwise_gpus=[
            gpu.name
            for gpu in able
            if swept is not None and swept.on(gpu.compute_capability) <= gpu.usable_bytes
        ],
        gpu_modes=[]
        if swept is None
        else execution_modes.gpu_modes(estimator, kind, tokens, pipeline, swept, deepest),
    )


def _layerwise(
    estimator: Estimator,
    kind: WeightFormat,
    workload: Workload,
    points: Sequence[HookPoint],
    capability: tuple[int, int],
) -> tuple[Layerwise | None, str]:
    """Layerwise execution, or why it is unsupported."""
    if estimator.size.senses:
        return None, "a model of images or audio runs on the device as a whole alone"
    if estimator.size.side:
        half = f"the {estimator.size.side} of an encoder-decoder"
        return None, f"{half} runs on the device as a whole alone"
    try:
        return (
            execution_modes.layerwise(estimator, kind, workload, points, capability=capability),
            "",
        )
    except ModelError as error:
        return None, str(error)


def smaller_pass(
    estimator: Estimator, kind: WeightFormat, workload: Workload, points: Sequence[HookPoint]
) -> PeakBytes:
    """Estimate the cheaper of one pass over full windows and chunks through the KV cache.

    Args:
        estimator: of the model.
        kind: format of the weights.
        workload: shape of the streamed pass.
        points: hook points, written as they come.

    Returns:
        Bytes at the peak, without the weights.
    """
    one_pass = Workload(workload.windows, workload.tokens, workload.tokens)
    passes = [
        estimator.forward(kind, shape, points) for shape in dict.fromkeys((one_pass, workload))
    ]
    return min(passes, key=lambda parts: parts.total)


def kv_cache(size: ModelDims, kind: WeightFormat, tokens: int) -> int:
    """Size of the keys and values of every block.

    Args:
        size: dimensions of the model.
        kind: format of the weights.
        tokens: of all windows together.

    Returns:
        Bytes: 2 × blocks × KV heads × head size × bytes per value × tokens.
    """
    return 2 * size.num_blocks * size.num_kv_heads * size.head_dim * BYTES[kind.precision] * tokens


def fitting(
    estimator: Estimator,
    kind: WeightFormat,
    workload: Workload,
    points: Sequence[HookPoint],
    needed: Components,
) -> list[FittingGPU]:
    """List the GPUs that have enough memory and compute in the precision.

    Args:
        estimator: of the model.
        kind: format of the weights.
        workload: shape of the pass.
        points: hook points, written as they come.
        needed: bytes of the whole run.

    Returns:
        GPUs, smallest first.
    """
    one = smaller_pass(estimator, kind, Workload(1, workload.tokens, workload.chunk_size), points)
    gpus = []
    for gpu in gpu_specs.gpus():
        headroom = gpu.usable_bytes - needed.on(gpu.compute_capability).total
        if not gpu.computes(kind.name) or headroom < 0:
            continue
        fixed = sizes.with_device_overhead(
            needed.weights, one.times(0), "cuda", gpu.compute_capability
        ).total
        room = HEADROOM * gpu.usable_bytes - fixed
        batch = max(workload.windows, int(room / ((1 + sizes.FRAGMENTATION) * one.total)))
        gpus.append(
            FittingGPU(
                gpu.name, gpu.compute_capability, gpu.usable_bytes, headroom, batch, workload.tokens
            )
        )
    return gpus


def as_json(result: Forecast) -> dict[str, Any]:
    """Convert a forecast to plain data.

    Args:
        result: the forecast.

    Returns:
        Its fields, with the derived totals of components.
    """
    report = asdict(result)
    for name in ("held_full", "held_selected", "pipeline"):
        components: Components = getattr(result, name)
        report[name] |= {
            part: getattr(components, part) for part in ("allocated", "reserved", "total")
        }
    return report


def _total(
    estimator: Estimator,
    kind: WeightFormat,
    workload: Workload,
    points: Sequence[HookPoint],
    capability: tuple[int, int],
) -> int:
    parts = smaller_pass(estimator, kind, workload, points)
    return sizes.with_device_overhead(estimator.weights(kind), parts, "cuda", capability).total


def _held_width(points: Sequence[HookPoint], tokens: int) -> int:
    """Elements per token that hook points hold; a block's output and the next one's input once."""
    width = {
        p.block + (p.value == "hook_resid_post") if p.value in RESIDUALS else p.name: p.width(
            tokens
        )
        for p in points
    }
    return sum(width.values())


def _lm_head(settings: Config, size: ModelDims, kind: WeightFormat) -> int:
    declared = settings.model.architecture
    if declared is None or declared.tie_word_embeddings:
        return 0
    return size.vocab_size * size.hidden_size * BYTES[kind.precision]


def settings_of(target: str) -> Config:
    """Compose the config of a profile, or of a model with the settings of the profile `custom`.

    Args:
        target: a profile, hub id (owner/name), folder, or `package:NAME`.

    Returns:
        The config.

    Raises:
        ConfigError: the target is none of these.
    """
    folder = locations.config_folder()
    profiles = sorted(path.stem for path in (folder / "profile").glob("*.yaml"))
    if target in profiles and target != "custom":
        (run,) = compose.runs(folder, target).values()
    elif "/" in target or target.startswith("package:") or Path(target).exists():
        named = words.from_words([f"model.source={target}"])
        (run,) = compose.runs(folder, "custom", named).values()
    else:
        raise ConfigError(
            f"{target!r} is neither a profile ({', '.join(profiles)}) nor a model; "
            "give a hub id (owner/name), a folder, or package:NAME"
        )
    return frozen.to_config(run.config)


def kind_of(settings: Config, precision: str | None, own: str | None) -> WeightFormat:
    """The weight format of a forecast.

    Args:
        settings: the config.
        precision: a name of `WEIGHT_FORMATS`, which overrides the config; None: as the config says.
        own: how the checkpoint is quantised, `8bit` or `4bit`; None: it is not.

    Returns:
        The format; `auto` is BF16.
    """
    if precision is not None:
        return WEIGHT_FORMATS[precision]
    requested = settings.memory.precision_mode.name
    return weight_format.weight_format_of(
        settings, "bf16" if requested == "auto" else requested, own
    )
