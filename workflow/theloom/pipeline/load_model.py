"""The load_model stage: load a model, try it out, measure, and write `model.h5`."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from theloom import terminal
from theloom.config.auto import traceable_attention
from theloom.config.model_dims import numbers, side_of
from theloom.config.schema import Config
from theloom.corpus.tokens_file import reading
from theloom.devices import accelerator, gpu, host, peak_memory
from theloom.engine.layerwise.model import measure_sweep, opened
from theloom.engine.model_record import model_attributes, write_catalog
from theloom.errors import MemoryPlanError, ModelError
from theloom.hooks.points import check_integers
from theloom.memory.estimators import Traced
from theloom.model import weight_format
from theloom.model.checkpoint.weights import check_stored
from theloom.model.checks import may_stream, self_check
from theloom.model.files import ModelFiles, check_architecture, config_in, hf_config, prepare_files
from theloom.model.loading import Target, load_model, resolve_precision
from theloom.model.towers.check import tower_check
from theloom.planning.estimates import estimate_file
from theloom.planning.estimates.estimate_file import Estimate
from theloom.planning.images import largest_images_pass
from theloom.planning.measure import measure, prepare_measurement
from theloom.planning.multi_gpu import available, fit_plan
from theloom.planning.plan import Correction, Planned
from theloom.planning.replay import replay_of_run, replay_of_sweep
from theloom.rows.modality import CHAT, SENSED, modality_of, senses
from theloom.store import file_format
from theloom.store.hdf5.output import written
from theloom.store.shard_file import bytes_of_window

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from theloom.planning.measure import Measured
    from theloom.planning.replay import Replayed


log = logging.getLogger(__name__)


def record_layerwise(
    config: Config,
    target: Target,
    estimated: Estimate,
    tokens_path: Path,
    output: Path,
    why: str = "",
) -> None:
    """Open a model to run it layer by layer, try it out, measure, and write `model.h5`.

    Args:
        config: The config of the stage.
        target: The device and the precision.
        estimated: What `estimate.h5` holds.
        tokens_path: Path of `tokens.h5`.
        output: Path of `model.h5`.
        why: What speaks against a resident model, for the message where this fails too.

    Raises:
        ModelError: The model cannot be run layer by layer.
        HookError: The model lacks a requested hook point.
        MemoryPlanError: It does not fit.
    """
    files = _checked_files(config)
    prepare_measurement(config.model)
    before = host.resident()  # from where a job's growth is counted (`engine.layerwise.shard`)
    with opened(config, files, target=target) as model:
        catalog = model.loaded.catalog
        points = catalog.select(estimated.hooks)
        check_integers(points, catalog, _store_precision(estimated, target.precision.resolved))
        threshold = estimated.threshold
        try:
            planned = model.fit(
                estimated, points, reading.window_lengths(tokens_path), threshold, 0
            )
        except MemoryPlanError as error:
            raise MemoryPlanError(f"{why}; and {error}" if why else str(error)) from None
        size = terminal.format_bytes(
            planned.need.device if model.loaded.device.type == "cuda" else planned.need.cpu
        )
        log.info("layer by layer: batches of %d tokens, %s", planned.plan.batch_tokens, size)
        for change in planned.changes:
            log.warning("to fit: %s", change)
        tried = model.self_check()
        if planned.plan.streamed and not may_stream(tried, planned.plan.longest):
            windows = reading.window_lengths(tokens_path)
            planned = model.fit(estimated, points, windows, threshold, 0, streams=False)
        measured = measure_sweep(model, planned, before)
        log.info(
            "a sweep over the largest batch: %s predicted, %s measured",
            terminal.format_bytes(measured.predicted),
            terminal.format_bytes(measured.growth),
        )
        overhead = max(0, measured.growth - measured.predicted)
        replayed = replay_of_sweep(
            model.fake(),
            model.sizes(points),
            estimated,
            planned,
            points,
            reading.window_lengths(tokens_path),
            model.residual_row,
            model.kind,
            model.loaded.device,
        )
        with written(output) as file:
            attributes = model_attributes(model.loaded, config)
            file_format.set_attributes(
                file, attributes | asdict(tried) | {"execution": "layerwise"}
            )
            group = file.create_group("memory")
            file_format.set_attributes(
                group, asdict(Correction(overhead=overhead)) | {"changes": list(planned.changes)}
            )
            _write_replayed(group, replayed)
            file_format.set_attributes(
                group.create_group("plan"), asdict(planned.plan) | {"spilled": planned.spilled}
            )
            predicted = asdict(planned.need) | {
                "device": planned.need.device,
                "host": planned.need.host,
            }
            file_format.set_attributes(group.create_group("predicted"), predicted)
            file_format.set_attributes(group.create_group("sizes"), asdict(model.sizes(points)))
            file_format.set_attributes(group.create_group("measured"), asdict(measured))
            write_catalog(file, model.loaded.catalog)


def _checked_files(config: Config) -> ModelFiles:
    """The model's files, whose weights are those of the model. Raises ModelError."""
    files = prepare_files(config.model)
    model_config = config_in(files, config.model.trust_remote_code)
    check_stored(model_config, files.folder, config.model)
    _check_adapters(config, files, model_config)
    if (files.folder / "modules.json").is_file():
        log.info("modules.json: what sentence-transformers runs after the model is not run")
    if config.model.ignore_own_code:
        log.warning("model.ignore_own_code: code of the folder is not run, transformers' own is")
    return files


def _check_adapters(config: Config, files: ModelFiles, model_config: "PretrainedConfig") -> None:
    """Log which adapters are merged. Raises ModelError for one that does not fit the whole model,
    whatever of it is loaded.
    """
    if not files.adapters:
        return
    from theloom.model.adapters.merging import check_adapters

    for adapter, ignored in zip(
        files.adapters,
        check_adapters(model_config, files.adapters, config.model.trust_remote_code),
        strict=True,
    ):
        log.info("adapter: %s (%s) is merged into the model", adapter.source, adapter.kind)
        if ignored:
            log.warning(
                "adapter: %s: what it does to %s is left out: no hook point needs it",
                adapter.source,
                ", ".join(ignored),
            )


def _store_precision(estimated: Estimate, computed: str) -> str:
    """The precision of the rows on disk."""
    return computed if estimated.store in (None, "auto") else estimated.store


def _say_disk(estimated: Estimate, computed: str, tokens_path: Path) -> None:
    """Log what the shards will take, now that the rows are known."""
    precision = _store_precision(estimated, computed)
    there = reading.sizes(tokens_path)
    rows = there.rows * estimated.row_bytes[precision]
    tables = there.tables + there.windows * bytes_of_window(len(estimated.hooks))
    log.info(
        "disk: %s: %s in %s for %d rows, %s for the tables of %d tokens",
        *map(terminal.format_bytes, (rows + tables, rows)),
        precision,
        there.rows,
        terminal.format_bytes(tables),
        there.tokens,
    )


def record(config: Config, estimate_path: Path, tokens_path: Path, output: Path) -> None:
    """The load_model stage: load, try out, measure, and write `model.h5`.

    Args:
        config: The config of the stage.
        estimate_path: Path of `estimate.h5`.
        tokens_path: Path of `tokens.h5`.
        output: Path of `model.h5`.

    Raises:
        ModelError: The model does not load, or not as its profile says.
        MemoryPlanError: It does not fit.
    """
    from theloom.model.pruning import storages

    estimated = estimate_file.read(estimate_path)
    if config.memory.enable_gradient_checkpointing:
        log.warning("enable_gradient_checkpointing has no effect: extraction has no backward pass")
    model_config = hf_config(config.model)
    check_architecture(config.model.architecture, numbers(model_config), config.model.source)
    target = resolve_precision(config)
    device, resolved = target
    kind = weight_format.weight_format_of(
        config, resolved.resolved, weight_format.quantization_of(config, model_config)
    )
    if kind.name not in estimated.passes:
        raise ModelError(
            f"memory.precision_mode: {model_config.model_type} resolves to {kind.name} here, in "
            "which its code does not run without weights; set another precision, as fp32"
        )
    _say_disk(estimated, resolved.resolved, tokens_path)
    threshold = estimated.threshold
    execution = config.extraction.execution.name
    try:
        if execution == "layerwise":
            record_layerwise(config, target, estimated, tokens_path, output)
            return
        windows, room = reading.window_lengths(tokens_path), available(device)
        planned = fit_plan(estimated, kind, device, threshold, windows, room=room)
    except MemoryPlanError as error:
        sensing = modality_of(model_config) in (*SENSED, CHAT)
        if execution != "auto" or sensing or side_of(model_config):  # these run as a whole alone
            raise
        log.warning("%s; extraction.execution=auto: it goes layer by layer", error)
        try:
            record_layerwise(config, target, estimated, tokens_path, output, str(error))
        except ModelError as refused:
            raise MemoryPlanError(f"{error}; nor layer by layer: {refused}") from None
        return
    files = _checked_files(config)
    attention = traceable_attention(config.extraction.attention.name)
    prepare_measurement(config.model)
    with peak_memory.PeakMemory(
        device
    ) as loading:  # from where a job's growth is counted (`engine.resident`)
        traced = Traced(model_config, attention, config.model.trust_remote_code)
        catalog = traced.catalog()  # of the whole model, of which only what is needed is loaded
        points = catalog.select(estimated.hooks)
        check_integers(points, catalog, _store_precision(estimated, resolved.resolved))
        whole = traced.fake(weight_format.WeightFormat(resolved.resolved))
        loaded = load_model(config, files, points, target=target, whole=whole)
    check = tower_check if senses(model_config) else self_check
    tried = check(loaded.architecture, loaded.tolerance)
    if reading.attributes(tokens_path).get("images"):
        tried = replace(
            tried, streams=False, not_streamed="images of a conversation are one pass's"
        )
    if planned.plan.streamed and not may_stream(tried, planned.plan.longest):
        log.info("documents longer than a chunk go in one pass")
        planned = fit_plan(estimated, kind, device, threshold, windows, streams=False, room=room)
    measured = measure(loaded, kind, traced, planned.plan, points, loading)
    images = largest_images_pass(config.model, tokens_path, loaded, traced, kind, points)
    beyond = 0 if images is None else max(0, images.bytes - measured.predicted.total)
    if beyond:  # what the vision part takes beyond the largest pass of texts is left free
        correction = Correction(overhead=beyond)
        planned = fit_plan(
            estimated, kind, device, threshold, windows, correction, streams=False, room=room
        )
    replayed = replay_of_run(
        traced, kind, estimated, planned.plan, points, windows, tried.switches, device
    )
    gpu.warn_above(threshold, device)
    log.info(
        "loaded %s in %s on %s", config.model.source, resolved.resolved, accelerator.name(device)
    )
    _log(measured)
    with written(output) as file:
        attributes = (
            model_attributes(loaded, config)
            | {"parameters": traced.parameters, **asdict(tried)}
            | {"execution": "resident"}
        )
        file_format.set_attributes(file, attributes)
        weights = sum(storages(traced.fake(kind).model, loaded.left_out))
        memory = file.create_group("memory")
        _write_memory(memory, planned, measured, weights, loading.growth, replayed, beyond)
        if images is not None:
            file_format.set_attributes(memory.create_group("images"), asdict(images))
        write_catalog(file, catalog)


def _log(measured: "Measured") -> None:
    """The largest pass, predicted and measured."""
    workload = measured.workload
    log.info(
        "largest pass: %d × %d tokens, steps of %d",
        workload.windows,
        workload.tokens,
        workload.chunk_size,
    )
    result = asdict(measured.found)
    for category, predicted in asdict(measured.predicted).items():
        if predicted or result[category]:
            sizes = terminal.format_bytes(predicted), terminal.format_bytes(result[category])
            log.info("  %s: %s predicted, %s measured", category.replace("_", " "), *sizes)
    log.info(
        "  memory in use grew by %s: tensors %s, pages of files %s, heap %s",
        *map(
            terminal.format_bytes,
            (measured.growth, measured.found.total, measured.files, measured.heap),
        ),
    )


def _write_memory(
    group: h5py.Group,
    planned: Planned,
    measured: "Measured",
    weights: int,
    load_growth: int,
    replayed: "Replayed | None",
    beyond: int,
) -> None:
    correction = measured.correction
    correction = replace(correction, overhead=correction.overhead + beyond)
    if replayed is not None:
        correction = replace(correction, fragmentation=replayed.fragmentation)
    _write_replayed(group, replayed)
    file_format.set_attributes(group, {"changes": list(planned.changes), **asdict(correction)})
    file_format.set_attributes(group.create_group("plan"), asdict(planned.plan))
    file_format.set_attributes(group.create_group("workload"), asdict(measured.workload))
    file_format.set_attributes(
        group.create_group("predicted"), {"weights": weights, **asdict(measured.predicted)}
    )
    result = {"weights": measured.weights, **asdict(measured.found)}
    growth = {
        "growth": measured.growth,
        "files": measured.files,
        "heap": measured.heap,
        "load_growth": load_growth,
    }
    file_format.set_attributes(group.create_group("measured"), result | growth)


def _write_replayed(group: h5py.Group, replayed: "Replayed | None") -> None:
    """What the allocator of a GPU is predicted to hold."""
    if replayed is None:
        return
    log.info(
        "  the GPU's allocator, replayed: %s given out, %s held%s",
        terminal.format_bytes(replayed.allocated),
        terminal.format_bytes(replayed.reserved),
        ", in segments that grow" if replayed.expandable_segments else "",
    )
    file_format.set_attributes(group.create_group("replayed"), asdict(replayed))
