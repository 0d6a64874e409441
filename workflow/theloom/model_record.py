"""`model.h5`: which model a run uses, at which precision, its hook points, and what loading and running it took.

Every later job loads the same model by this record, and refuses one that has changed since.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from theloom import estimate, gpu, layout, memory, model, peak, placement, plan, provenance, source, tokens
from theloom.architecture import numbers
from theloom.batching import Lengths
from theloom.config import plain
from theloom.errors import MemoryPlanError, ModelError, StoreError
from theloom.estimate import Estimate
from theloom.estimator import Traced
from theloom.hooks import Catalogue, HookPoint
from theloom.memory import Kind
from theloom.model import LoadedModel
from theloom.plan import Correction, Planned
from theloom.schema import Config
from theloom.source import ModelFiles
from theloom.trial import try_out

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from theloom.layerwise_model import LayerwiseModel
    from theloom.measure import Measured

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRecord:
    """What later jobs need of `model.h5`."""

    revision: str | None
    fingerprint: str
    signature: str
    precision: str
    catalogue: Catalogue
    causal: bool
    streams: bool
    correction: Correction
    layerwise: bool  # whether it goes block by block
    attributes: dict[str, Any]

    @property
    def quantization(self) -> str | None:
        """`8bit` or `4bit`: asked for, or the checkpoint's own."""
        return None if self.attributes["quantization"] == "null" else self.attributes["quantization"]


def record(config: Config, estimate_path: Path, tokens_path: Path, output: Path) -> None:
    """The load_model stage: load, try out, measure, and write `model.h5`. Raises ModelError, MemoryPlanError."""
    from theloom import layerwise_record
    from theloom.measure import measure
    from theloom.needed import storages

    estimated = estimate.read(estimate_path)
    if config.memory.enable_gradient_checkpointing:
        log.warning("enable_gradient_checkpointing has no effect: extraction has no backward pass")
    model_config = model.hf_config(config.model)
    model.check_architecture(config.model.architecture, numbers(model_config), config.model.source)
    device, resolved = model.resolve_precision(config)
    kind = memory.kind_of(config, resolved.resolved, model.quantization_of(config, model_config))
    threshold = config.memory.memory_warning_threshold
    execution = config.extraction.execution.name
    try:
        if execution == "layerwise":
            layerwise_record.record(config, estimated, tokens_path, output)
            return
        planned = fit(estimated, kind, device, threshold, tokens.window_lengths(tokens_path))
    except MemoryPlanError as error:
        if execution != "auto":
            raise
        log.warning("%s; extraction.execution=auto: it goes block by block", error)
        try:
            layerwise_record.record(config, estimated, tokens_path, output, str(error))
        except ModelError as refused:
            raise MemoryPlanError(f"{error}; nor block by block: {refused}") from None
        return
    files = source.prepare(config.model)
    asked = config.extraction.attention.name
    attention = None if asked in ("auto", "flash_attention_2") else asked  # FlashAttention is not built for the CPU
    model.before_counting(config.model)
    with peak.PeakMemory(device) as loading:  # from where a job's growth is counted (`engine`)
        traced = Traced(model_config, attention, config.model.trust_remote_code)
        catalogue = traced.catalogue()  # of the whole model, of which only what is needed is loaded
        points = catalogue.select(estimated.hooks)
        loaded = model.load(config, files, points)
    tried = try_out(loaded.architecture, loaded.tolerance)
    measured = measure(loaded, kind, traced, planned.plan, points, loading)
    gpu.warn_above(threshold, device)
    log.info("loaded %s in %s on %s", config.model.source, resolved.resolved, gpu.device_name(device))
    _log(measured)
    with h5py.File(output, "w") as file:
        attributes = (
            _attributes(loaded, config) | {"parameters": traced.parameters, **asdict(tried)} | {"execution": "resident"}
        )
        layout.set_attributes(file, attributes)
        weights = sum(storages(traced.fake(kind).architecture.model, loaded.left_out))
        _write_memory(file.create_group("memory"), planned, measured, weights, loading.growth)
        _write_catalogue(file, catalogue)


def fit(
    estimated: Estimate,
    kind: Kind,
    device: "torch.device",
    threshold: float,
    windows: Lengths,
    correction: Correction | None = None,
) -> Planned:
    """The plan that fits the device's free memory, before anything is loaded. Raises MemoryPlanError."""
    found, others = placement.available(device)
    planned = plan.choose(
        placement.on_leased(estimated),
        kind.name,
        device.type,
        found,
        threshold=threshold,
        windows=windows,
        correction=correction or Correction(),
        others=others,
    )
    log.info(
        "plan: batches of %d tokens, chunks of %d; %s of %s free",
        planned.plan.batch_tokens,
        planned.plan.chunk_size,
        memory.in_words(planned.components.total),
        memory.in_words(found.free),
    )
    return planned


def _log(measured: "Measured") -> None:
    """The largest pass, foretold and found side by side."""
    workload = measured.workload
    log.info("largest pass: %d × %d tokens, steps of %d", workload.windows, workload.tokens, workload.chunk_size)
    found = asdict(measured.found)
    for category, foretold in asdict(measured.foretold).items():
        if foretold or found[category]:
            sizes = memory.in_words(foretold), memory.in_words(found[category])
            log.info("  %s: %s foretold, %s found", category.replace("_", " "), *sizes)
    log.info(
        "  memory in use grew by %s: tensors %s, pages of files %s, heap %s",
        *map(memory.in_words, (measured.growth, measured.found.total, measured.files, measured.heap)),
    )


def _write_memory(group: h5py.Group, planned: Planned, measured: "Measured", weights: int, load_growth: int) -> None:
    layout.set_attributes(group, {"changes": list(planned.changes), **asdict(measured.correction)})
    layout.set_attributes(group.create_group("plan"), asdict(planned.plan))
    layout.set_attributes(group.create_group("workload"), asdict(measured.workload))
    layout.set_attributes(group.create_group("predicted"), {"weights": weights, **asdict(measured.foretold)})
    found = {"weights": measured.weights, **asdict(measured.found)}
    growth = {"growth": measured.growth, "files": measured.files, "heap": measured.heap, "load_growth": load_growth}
    layout.set_attributes(group.create_group("measured"), found | growth)


def _write_catalogue(file: h5py.File, catalogue: Catalogue) -> None:
    """Every hook point with the shape of a token's row, and what the model has not, with the reason."""
    points = catalogue.points
    for name in ("name", "value"):
        file[f"hooks/{name}"] = layout.fixed_strings([getattr(p, name) for p in points])
    file["hooks/block"] = [p.block for p in points]
    file["hooks/shape"] = layout.fixed_strings([json.dumps(p.shape) for p in points])
    file["hooks_refused/name"] = layout.fixed_strings(list(catalogue.refused))
    file["hooks_refused/reason"] = layout.fixed_strings(list(catalogue.refused.values()))


def _read_catalogue(file: h5py.File) -> Catalogue:
    columns = [file[f"hooks/{name}"][:].tolist() for name in ("name", "block", "value", "shape")]
    points = [
        HookPoint(name.decode(), block, value.decode(), tuple(json.loads(shape)))
        for name, block, value, shape in zip(*columns, strict=True)
    ]
    names, reasons = (file[f"hooks_refused/{name}"][:].tolist() for name in ("name", "reason"))
    return Catalogue(points, {n.decode(): r.decode() for n, r in zip(names, reasons, strict=True)})


def _attributes(loaded: LoadedModel, config: Config) -> dict[str, Any]:
    return provenance.attributes(
        "model",
        config=plain(config),
        source=config.model.source,
        revision=loaded.files.revision,
        gguf_file=loaded.files.gguf_file,
        model_class=type(loaded.architecture.model).__name__,
        fingerprint=source.fingerprint(loaded.files),
        signature=source.signature(loaded.files),
        precision_requested=loaded.precision.requested,
        precision=loaded.precision.resolved,
        precision_steps=list(loaded.precision.steps),
        quantization=loaded.quantization,
        attention=loaded.attention,
        device=gpu.device_name(loaded.device),
        blocks=len(loaded.architecture.blocks),
        hidden_size=loaded.architecture.hidden_size,
    )


def read(path: Path) -> ModelRecord:
    """Read `model.h5`."""
    with layout.open_h5(path, "model") as file:
        attributes = dict(file.attrs)
        return ModelRecord(
            revision=None if attributes["revision"] == "null" else attributes["revision"],
            fingerprint=attributes["fingerprint"],
            signature=attributes["signature"],
            precision=attributes["precision"],
            catalogue=_read_catalogue(file),
            causal=bool(attributes["causal"]),
            streams=bool(attributes["streams"]),
            correction=Correction(float(file["memory"].attrs["ratio"]), int(file["memory"].attrs["beside"])),
            layerwise=attributes["execution"] == "layerwise",
            attributes=attributes,
        )


def load_again(config: Config, recorded: ModelRecord, points: Sequence[HookPoint] | None = None) -> LoadedModel:
    """Load the model of a record, or what reading `points` needs.

    Raises StoreError if its files, or the precision at hand, are others by now.
    """
    return model.load(config, _same_files(config, recorded), points)


def open_again(config: Config, recorded: ModelRecord) -> "AbstractContextManager[LayerwiseModel]":
    """The same for a model that goes block by block."""
    from theloom.layerwise_model import opened

    return opened(config, _same_files(config, recorded))


def _same_files(config: Config, recorded: ModelRecord) -> ModelFiles:
    """The files of a record's model, unchanged. Raises StoreError, ModelError."""
    device, resolved = model.resolve_precision(config)
    if resolved.resolved != recorded.precision:
        raise StoreError(
            f"model.h5 was made in {recorded.precision}, and {device} gives {resolved.resolved}; "
            f"set memory.precision_mode={recorded.precision}, or run on the same kind of device"
        )
    files = source.prepare(config.model, recorded.revision)
    if source.signature(files) != recorded.signature and source.fingerprint(files) != recorded.fingerprint:
        raise ModelError(
            f"model.source: the files of {config.model.source} have changed since load_model; "
            "put them back, or run it again with --forcerun load_model"
        )
    return files


def provenance_of(recorded: ModelRecord) -> dict[str, Any]:
    """The model's part of a data file's attributes."""
    names = ["source", "revision", "gguf_file", "model_class", "fingerprint", "precision_requested", "precision"]
    names += ["precision_steps", "quantization", "attention"]
    return {f"model_{n.removeprefix('model_')}": recorded.attributes[n] for n in names}
