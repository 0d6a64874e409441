"""Estimate memory and disk of a run from its config alone, without weights or a GPU.

The estimate predicts forward passes of several shapes, since the memory that is free when a job
starts is not known yet; `plan` then chooses among them. Predictions come in closed form where that
holds, else from traces. `load_model` traces and measures the pass that is planned in the end.
"""

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from theloom import terminal
from theloom.config.auto import store_precision
from theloom.config.schema import Config
from theloom.errors import HookError, ModelError
from theloom.hooks.points import EXPERT_INDICES, HookPoint, deepest_block
from theloom.hooks.stages.resolution import check_one_resolution
from theloom.memory import stages
from theloom.memory.estimators import Estimator, row_bytes
from theloom.memory.sizes import Workload, by_category
from theloom.model import files, weight_format
from theloom.model.adapters.files import find_adapters, local_adapters, merging_bytes
from theloom.model.checkpoint.weights import check_stored
from theloom.model.files import hf_config
from theloom.model.weight_format import WEIGHT_FORMATS, WeightFormat
from theloom.planning import answers_plan, disk
from theloom.planning.answers_plan import AnswersSize
from theloom.planning.estimates import estimate_file, run_models
from theloom.planning.estimates.estimate_file import Estimate, Pass
from theloom.precision import BYTES, SCALED, handed
from theloom.rows import expression
from theloom.rows.pooling import ADDED_UP
from theloom.store.ring_buffer import RING_BYTES, bytes_on_device

log = logging.getLogger(__name__)

SMALLEST_CHUNK = 64

# Resident bytes of a process that has imported torch, transformers and h5py.
HOST_PROCESS = 450_000_000
DEFAULT_CONTEXT = 2048  # tokens, if the model's config names no limit


def chunk_sizes(largest: int) -> list[int]:
    """Chunk sizes that a plan can choose from: the requested one, a quarter of it, and so on.

    Args:
        largest: tokens of the requested chunk.

    Returns:
        Sizes in descending order, none below `SMALLEST_CHUNK` but the first.

    Examples:
        >>> chunk_sizes(1024)
        [1024, 256, 64]
    """
    sizes = [largest]
    while sizes[-1] // 4 >= SMALLEST_CHUNK:
        sizes.append(sizes[-1] // 4)
    return sizes


def estimate(config: Config, estimator: Estimator, device: str = "cpu") -> Estimate:
    """Estimate a run.

    Args:
        config: the run's config.
        estimator: of its model.
        device: `cpu` or `cuda`.

    Returns:
        The estimate.

    Raises:
        HookError: the model lacks a requested hook point.
    """
    size = estimator.size
    catalog = estimator.catalog()
    points = catalog.select(config.memory.activation_cache_filter)
    check_one_resolution(points)
    _check_pooled(config, points)
    context = config.corpus.context_length or size.context_length or DEFAULT_CONTEXT
    if config.corpus.max_tokens is not None:
        context = min(context, config.corpus.max_tokens + disk.answer_tokens(config))
    chunk_size = min(config.memory.streaming_chunk_size, context)
    passes = {}
    likely = weight_format.weight_format_of(
        config, run_models.likely_precision(config), estimator.own
    )
    for kind in _wanted(config, estimator.own):
        try:
            passes[kind.name] = _passes(estimator, kind, points, context, chunk_size, device)
        except ModelError as error:
            if kind == likely:
                raise
            # for example Mamba, whose code takes no quantized weights
            log.info("not offered in %s: %s", kind.name, error)
    weights = {name: estimator.weights(kind, points) for name, kind in WEIGHT_FORMATS.items()}
    # bf16 is what `largest_weight` counts in
    largest = estimator.largest_weight(WeightFormat("bf16")) // BYTES["bf16"]
    merging = merging_bytes(find_adapters(config.model), largest)
    answers = _of_answers(config, estimator, passes, context, device)
    return Estimate(
        model_type=size.model_type,
        attention=getattr(estimator, "attention", "sdpa"),
        device=device,
        context_length=context,
        chunk_size=chunk_size,
        batch_tokens=config.extraction.batch_tokens,
        cache=config.extraction.cache.name,
        threshold=config.memory.memory_warning_threshold,
        blocks=min(max(deepest_block(points), 0) + 1, size.num_blocks),
        hooks=[p.name for p in points],
        weights=weights,
        load_peak={
            name: _load_peak(estimator, kind, weights[name]) + merging
            for name, kind in WEIGHT_FORMATS.items()
        },
        passes=passes,
        largest_capture={
            name: _largest(points, copied_precision(config, kind.precision), context)
            for name, kind in WEIGHT_FORMATS.items()
        },
        row_bytes={
            precision: row_bytes(points, precision, context) for precision in (*BYTES, *SCALED)
        },
        rows=disk.most_rows(config),
        token_bytes=disk.token_bytes(config),
        table_bytes=disk.table_bytes(config, points, context),
        store=config.store.dtype.name,
        kept_of_window=expression.parse(config.rows.keep).most,
        answers=answers,
        answers_batch=config.answers.batch,
        answers_tokens=disk.most_sampled(config) if answers else None,
        answers_disk=disk.most_answers_bytes(config) if answers else None,
        answers_seconds=_seconds_of_answers(config, answers, device),
        host={
            name: _host(
                estimator, WEIGHT_FORMATS[name], weights[name], own, chunk_size, device, merging
            )
            for name, own in passes.items()
        },
    )


def _of_answers(
    config: Config,
    estimator: Estimator,
    passes: dict[str, list[Pass]],
    context: int,
    device: str,
) -> dict[str, AnswersSize]:
    """Bytes of sampling in each weight format that passes are predicted in."""
    if config.answers.source is None or config.answers.source.name != "model":
        return {}
    longest = answers_plan.longest_prompt(config, context)
    tied = tied_head(config)
    return {
        name: answers_plan.size_of(estimator, WEIGHT_FORMATS[name], tied, longest, device)
        for name in passes
    }


def _seconds_of_answers(
    config: Config, answers: dict[str, AnswersSize], device: str
) -> dict[str, int]:
    """The least seconds of sampling all answers in one job, where their number is bounded."""
    answered, sampled = disk.most_documents(config), disk.most_sampled(config)
    if not answered or not sampled:
        return {}
    side_by_side = min(config.answers.batch or answers_plan.MOST, answered)
    return {
        name: math.ceil(size.seconds(sampled, side_by_side, device))
        for name, size in answers.items()
    }


def tied_head(config: Config) -> bool:
    """Whether a model's LM head is its token embedding.

    Args:
        config: the run's config.

    Returns:
        As the profile declares it, else as the model's own config does.

    Raises:
        ModelError: the model's own config cannot be read.
    """
    declared = config.model.architecture
    if declared is not None:
        return bool(declared.tie_word_embeddings)
    return bool(getattr(hf_config(config.model).get_text_config(), "tie_word_embeddings", False))


def _wanted(config: Config, own: str | None) -> list[WeightFormat]:
    """Weight formats that the run can resolve to, and those offered if it does not fit."""
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
    """Single and streamed passes of every chunk size, and one pass over the whole context."""
    shapes = [Workload(1, context, context)]
    for size in chunk_sizes(chunk_size):
        shapes.append(Workload(1, min(size, context), size))
        if not (estimator.size.side or estimator.size.senses):  # these go in one pass
            shapes.append(Workload(1, context, size))
    # FP16 has the sizes of BF16: one trace serves both
    twin = WeightFormat("bf16", kind.quantization) if kind.precision == "fp16" else kind
    passes = []
    for shape in dict.fromkeys(shapes):
        try:
            parts = estimator.forward(twin, shape, points, device=device)
        except (ModelError, HookError) as error:
            if len(shape.steps) == 1:
                raise
            # a model that takes no KV cache; `Estimate.find` takes a longer pass instead
            log.info("in chunks of %d tokens: %s", shape.chunk_size, error)
            continue
        passes.append(Pass(shape.tokens, shape.chunk_size, parts))
    return passes


def _load_peak(estimator: Estimator, kind: WeightFormat, weights: int) -> int:
    """Weights; plus the largest unquantized one, which is quantized on the device."""
    return weights + (estimator.largest_weight(kind) if kind.quantization else 0)


def _host(
    estimator: Estimator,
    kind: WeightFormat,
    weights: int,
    passes: list[Pass],
    chunk_size: int,
    device: str,
    merging: int,
) -> int:
    """Host bytes: on the CPU everything; for a GPU the largest tensor in transit, without CUDA.

    `merging`: bytes of adapters while they are merged, before the first pass.
    """
    if device != "cpu":
        return HOST_PROCESS + estimator.largest_weight(kind) + merging + RING_BYTES["cuda"]
    requested = max(p.parts.total for p in passes if p.chunk_size == chunk_size)
    return HOST_PROCESS + weights + max(requested, merging) + bytes_on_device("cpu", 0)


def copied_precision(config: Config, computed: str) -> str:
    """Find the precision of what is copied off the device: pooled rows are added up in FP32, and
    rows get their scales on the host.

    Args:
        config: the run's config.
        computed: the precision that the model computes in.

    Returns:
        `fp32`, `fp16` or `bf16`.
    """
    added_up = config.rows.pool.name in ADDED_UP
    return "fp32" if added_up else handed(store_precision(config, computed), computed)


def _check_pooled(config: Config, points: Sequence[HookPoint]) -> None:
    """Raise HookError where rows are pooled that have no common shape."""
    over_keys = [p.name for p in points if p.over_keys]
    pool = config.rows.pool.name
    states = [p.name for p in points if p.of_document]
    keep, by = config.rows.keep.strip(), config.rows.by.name
    last = (pool == "last" and by == "document" and keep == "all") or (
        pool == "none" and keep == "last"
    )
    if states and not last:
        raise HookError(
            f"{states[0]} is one state of a document, after its last token, and rows.keep={keep} "
            f"rows.pool={pool} stores other rows; set rows.keep=last and rows.pool=none"
        )
    experts = [p.name for p in points if p.value == EXPERT_INDICES]
    if pool in ("mean", "max", "sum") and experts:
        raise HookError(
            f"rows.pool={pool}: {experts[0]} are numbers of experts, which are not added up or "
            "compared; take it out of memory.activation_cache_filter, or keep rows alone"
        )
    if pool != "none" and over_keys:
        raise HookError(
            f"rows.pool={pool}: a row of {over_keys[0]} is over the keys of its own window, and "
            "cannot be pooled; take it out of memory.activation_cache_filter, or keep rows alone"
        )


def _largest(points: list[HookPoint], precision: str, keys: int) -> int:
    return BYTES[precision] * max(p.width(keys) for p in points)


def run_estimate(config: Config, output: Path) -> None:
    """Run the estimate_memory stage.

    Args:
        config: the run's config.
        output: path of `estimate.h5`.

    Raises:
        ModelError: files of the model are broken, or are not of one model.
        HookError: the model lacks a requested hook point.
        MemoryPlanError: the output does not fit the disk.
    """
    files.check_local(config.model)
    if (folder := files.local_weights(config.model)) is not None:
        check_stored(hf_config(config.model), folder, config.model)
        if adapters := local_adapters(config.model):
            from theloom.model.adapters.merging import check_adapters

            check_adapters(hf_config(config.model), adapters, config.model.trust_remote_code)
    device = "cpu" if config.extraction.device == "cpu" else "cuda"
    try:
        estimator = run_models.estimator_of(config)
        log.info("by %s", estimator.method)
        result = estimate(config, estimator, device)
    except (ModelError, HookError) as error:
        raise stages.instead(config, error) from None
    precision = run_models.likely_precision(config)
    needed = result.disk_bytes(store_precision(config, precision))
    if needed is not None:
        needed += result.answers_disk or 0
        disk.check_disk(output.parent, needed, shutil.disk_usage(output.parent).free)
        more = f"; {result.token_bytes} bytes for the tables of each further token"
        unbounded = config.corpus.max_tokens is None
        log.info("disk: %s%s", terminal.format_bytes(needed), more if unbounded else "")
    estimate_file.write(result, config, output)
    chosen = weight_format.weight_format_of(config, precision, estimator.own)
    kind = chosen.name
    log.info(
        "%s weights: %s; host: %s",
        kind,
        terminal.format_bytes(result.weights[kind]),
        terminal.format_bytes(result.host[kind]),
    )
    if sampled := result.answers.get(kind):
        prompt = answers_plan.longest_prompt(config, result.context_length)
        one = sampled.of(1, prompt, config.answers.max_new_tokens)
        log.info(
            "sampling: weights %s; an answer to a prompt of %d tokens: %s (%s)",
            terminal.format_bytes(sampled.weights),
            prompt,
            terminal.format_bytes(one.total),
            by_category(one),
        )
        if (seconds := result.answers_seconds.get(kind)) is not None:
            log.info(
                "sampling at most %s tokens: %s of disk, at least %d minutes in one job",
                f"{result.answers_tokens:,}",
                terminal.format_bytes(result.answers_disk or 0),
                math.ceil(seconds / 60),
            )
    for candidate in result.passes[kind]:
        total, parts = terminal.format_bytes(candidate.parts.total), by_category(candidate.parts)
        log.info(
            "%d tokens in steps of %d: %s (%s)",
            candidate.tokens,
            candidate.chunk_size,
            total,
            parts,
        )
