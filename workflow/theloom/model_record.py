"""`model.h5`: which model a run uses, at which precision, its hook points, and what loading and running it took.

Every later job loads the same model by this record, and refuses one that has changed since.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py

from theloom import estimate, gpu, layout, model, peak, provenance, source
from theloom.config import plain
from theloom.errors import ModelError, StoreError
from theloom.estimate import Estimate
from theloom.hooks import HookPoint, Taps, catalogue
from theloom.model import LoadedModel
from theloom.schema import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRecord:
    """What later jobs need of `model.h5`."""

    revision: str | None
    fingerprint: str
    signature: str
    precision: str
    points: list[HookPoint]
    streams: bool
    attributes: dict[str, Any]


def record(config: Config, estimate_path: Path, output: Path) -> None:
    """The load_model stage: load, try out, measure, and write `model.h5`. Raises ModelError, MemoryPlanError."""
    planned = estimate.read(estimate_path)
    if config.memory.enable_gradient_checkpointing:
        log.warning("enable_gradient_checkpointing has no effect: extraction has no backward pass")
    model.check_architecture(config.model.architecture, model.read_config(config.model), config.model.source)
    check_fits(config, planned)
    device, resolved = model.resolve_precision(config)
    predicted = planned.components[estimate.weight_kind(config, resolved.resolved)]
    files = source.prepare(config.model)
    with peak.PeakMemory(device) as loading:
        loaded = model.load(config, files)
    tried = model.try_out(loaded)
    with peak.PeakMemory(device) as running:
        _run_largest_batch(loaded, planned)
    gpu.warn_above(config.memory.memory_warning_threshold, device)
    measured = {"load": loading.growth, "run": running.growth}
    log.info("loaded %s in %s on %s", config.model.source, resolved.resolved, gpu.device_name(device))
    log.info("largest batch: %.3f GB measured", running.growth / 1e9)
    with h5py.File(output, "w") as file:
        layout.set_attributes(file, _attributes(loaded, config) | asdict(tried))
        memory = file.create_group("memory")
        layout.set_attributes(memory.create_group("predicted"), asdict(predicted))
        layout.set_attributes(memory.create_group("measured"), measured)
        file["hooks/name"] = layout.fixed_strings([p.name for p in loaded.points])
        file["hooks/width"] = [p.width for p in loaded.points]


def check_fits(config: Config, planned: Estimate) -> None:
    """The plan fits the device's free memory, before anything is loaded. Raises MemoryPlanError."""
    device, resolved = model.resolve_precision(config)
    memory = gpu.device_memory(device)
    estimate.check_memory(
        planned.components[estimate.weight_kind(config, resolved.resolved)],
        memory.total,
        memory.free,
        str(device),
        config.memory.memory_warning_threshold,
    )


def _run_largest_batch(loaded: LoadedModel, planned: Estimate) -> None:
    """The largest forward pass of the plan, on random tokens, with all planned hook points held at once."""
    import torch

    vocabulary = loaded.architecture.model.config.get_text_config().vocab_size
    shape = (planned.plan.batch_windows, planned.plan.chunk_size)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    held: dict[str, torch.Tensor] = {}
    points = [p for p in loaded.points if p.name in set(planned.hooks)]
    with Taps(loaded.architecture, points, held.__setitem__) as taps:
        model.prefill(taps, loaded, ids, planned.plan.chunk_size)


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
        quantization=config.memory.quantization.name if config.memory.quantization else None,
        attention=loaded.attention,
        device=gpu.device_name(loaded.device),
        blocks=len(loaded.architecture.blocks),
        hidden_size=loaded.architecture.hidden_size,
        parameters=loaded.architecture.model.num_parameters(),
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
            points=catalogue(int(attributes["blocks"]), int(attributes["hidden_size"])),
            streams=bool(attributes["streams"]),
            attributes=attributes,
        )


def load_again(config: Config, recorded: ModelRecord) -> LoadedModel:
    """Load the model of a record. Raises StoreError if its files, or the precision at hand, are others by now."""
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
    return model.load(config, files)


def provenance_of(recorded: ModelRecord) -> dict[str, Any]:
    """The model's part of a data file's attributes."""
    names = ["source", "revision", "gguf_file", "model_class", "fingerprint", "precision_requested", "precision"]
    names += ["precision_steps", "quantization", "attention"]
    return {f"model_{n.removeprefix('model_')}": recorded.attributes[n] for n in names}
