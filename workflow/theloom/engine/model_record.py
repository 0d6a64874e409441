"""`model.h5`: which model a run uses, at which precision, its hook points, and what loading and
running it took.

Every later job loads the same model by this record, and refuses one that has changed since.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from theloom.config.frozen import to_plain
from theloom.config.schema import Config
from theloom.devices import accelerator
from theloom.errors import ModelError, StoreError
from theloom.hooks.points import HookCatalog, HookPoint
from theloom.model.checkpoint.signatures import adapter_hash, files_fingerprint, files_signature
from theloom.model.files import ModelFiles, prepare_files
from theloom.model.length_switches import LengthSwitch, notable_lengths
from theloom.model.loading import LoadedModel, Target, load_model, resolve_precision
from theloom.planning.plan import Correction
from theloom.store import file_format, provenance

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from theloom.engine.layerwise.model import LayerwiseModel


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRecord:
    """What later jobs need of `model.h5`."""

    revision: str | None
    fingerprint: str
    signature: str
    precision: str
    catalog: HookCatalog
    causal: bool
    streams: bool
    correction: Correction
    layerwise: bool  # whether it goes layer by layer
    notable_lengths: tuple[int, ...]  # tokens
    switches: tuple[LengthSwitch, ...]
    streams_up_to: int | None  # tokens of the longest document that may go in chunks
    attributes: dict[str, Any]

    @property
    def adapter_revisions(self) -> tuple[str | None, ...]:
        """The commit of each adapter; None for that of a folder."""
        listed = json.loads(str(self.attributes.get("adapters", "[]")))
        return tuple(adapter["revision"] for adapter in listed)

    @property
    def alone(self) -> bool:
        """Whether every document goes by itself: padding would change its rows."""
        return bool(self.attributes["alone"])

    @property
    def quantization(self) -> str | None:
        """`8bit` or `4bit`: requested, or the checkpoint's own."""
        return (
            None if self.attributes["quantization"] == "null" else self.attributes["quantization"]
        )


def write_catalog(file: h5py.File, catalog: HookCatalog) -> None:
    """Write every hook point with the shape of a token's row, and those that the model does not
    have with the reason.

    Args:
        file: The open `model.h5`.
        catalog: Of the model.
    """
    points = catalog.points
    for name in ("name", "value"):
        file[f"hooks/{name}"] = file_format.fixed_strings([getattr(p, name) for p in points])
    file["hooks/block"] = [p.block for p in points]
    file["hooks/shape"] = file_format.fixed_strings([json.dumps(p.shape) for p in points])
    file["unsupported_hooks/name"] = file_format.fixed_strings(list(catalog.unsupported))
    file["unsupported_hooks/reason"] = file_format.fixed_strings(list(catalog.unsupported.values()))


def _read_catalog(file: h5py.File) -> HookCatalog:
    columns = [file[f"hooks/{name}"][:].tolist() for name in ("name", "block", "value", "shape")]
    points = [
        HookPoint(name.decode(), block, value.decode(), tuple(json.loads(shape)))
        for name, block, value, shape in zip(*columns, strict=True)
    ]
    names, reasons = (file[f"unsupported_hooks/{name}"][:].tolist() for name in ("name", "reason"))
    return HookCatalog(
        points, {n.decode(): r.decode() for n, r in zip(names, reasons, strict=True)}
    )


def model_attributes(loaded: LoadedModel, config: Config) -> dict[str, Any]:
    """The attributes of `model.h5` that describe a loaded model.

    Args:
        loaded: The model.
        config: The config that it was loaded by.

    Returns:
        By name: where the files are from and their hashes, precision, device, size and adapters.
    """
    return provenance.attributes(
        "model",
        config=to_plain(config),
        source=config.model.source,
        revision=loaded.files.revision,
        gguf_file=loaded.files.gguf_file,
        model_class=type(loaded.architecture.model).__name__,
        fingerprint=files_fingerprint(loaded.files),
        signature=files_signature(loaded.files),
        precision_requested=loaded.precision.requested,
        precision=loaded.precision.resolved,
        precision_steps=list(loaded.precision.steps),
        quantization=loaded.quantization,
        attention=loaded.attention,
        device=accelerator.name(loaded.device),
        blocks=len(loaded.architecture.blocks),
        hidden_size=loaded.architecture.hidden_size,
        notable_lengths=notable_lengths(loaded.architecture.model.config),
        **_adapters(loaded),
    )


def _adapters(loaded: LoadedModel) -> dict[str, Any]:
    """Which adapters are merged, in their order; nothing where there is none."""
    if not loaded.files.adapters:
        return {}
    return {
        "adapters": [
            {
                "source": provenance.without_home(adapter.source),
                "revision": adapter.revision,
                "kind": adapter.kind,
                "hash": adapter_hash(adapter),
                "base": provenance.without_home(adapter.base),
                "ignored": ignored,
            }
            for adapter, ignored in zip(loaded.files.adapters, loaded.ignored, strict=True)
        ]
    }


def read(path: Path) -> ModelRecord:
    """Read `model.h5`.

    Args:
        path: Of the file.

    Returns:
        What later jobs load the same model by.

    Raises:
        StoreError: The file is missing or damaged.
    """
    with file_format.open_h5(path, "model") as file:
        attributes = dict(file.attrs)
        return ModelRecord(
            revision=None if attributes["revision"] == "null" else attributes["revision"],
            fingerprint=attributes["fingerprint"],
            signature=attributes["signature"],
            precision=attributes["precision"],
            catalog=_read_catalog(file),
            causal=bool(attributes["causal"]),
            streams=bool(attributes["streams"]),
            correction=Correction(
                float(file["memory"].attrs["ratio"]),
                int(file["memory"].attrs["overhead"]),
                float(file["memory"].attrs["fragmentation"]),
            ),
            layerwise=attributes["execution"] == "layerwise",
            attributes=attributes,
            notable_lengths=tuple(json.loads(attributes["notable_lengths"])),
            switches=tuple(LengthSwitch(**s) for s in json.loads(attributes["switches"])),
            streams_up_to=json.loads(str(attributes["streams_up_to"])),
        )


def load_again(
    config: Config,
    recorded: ModelRecord,
    points: Sequence[HookPoint] | None = None,
    target: Target | None = None,
) -> LoadedModel:
    """Load the model of a record.

    Args:
        config: The run's config.
        recorded: What `model.h5` holds.
        points: The hook points to read; None: any.
        target: The device and the precision, if they are resolved already.

    Returns:
        The model on its device.

    Raises:
        StoreError: The precision is now another one than the record's.
        ModelError: The files are now others than the record's.
    """
    target = target or resolve_precision(config)
    return load_model(config, _same_files(config, recorded, target), points, target=target)


def open_again(
    config: Config, recorded: ModelRecord, target: Target | None = None
) -> "AbstractContextManager[LayerwiseModel]":
    """As `load_again`, for a model that runs layer by layer.

    Args:
        config: The run's config.
        recorded: What `model.h5` holds.
        target: The device and the precision, if they are resolved already.

    Returns:
        A context that gives the open model.

    Raises:
        StoreError: The precision is now another one than the record's.
        ModelError: The files are now others than the record's.
    """
    from theloom.engine.layerwise.model import opened

    target = target or resolve_precision(config)
    return opened(config, _same_files(config, recorded, target), target=target)


def _same_files(config: Config, recorded: ModelRecord, target: Target) -> ModelFiles:
    """The files of a record's model, unchanged. Raises StoreError, ModelError."""
    device, resolved = target
    if resolved.resolved != recorded.precision:
        raise StoreError(
            f"model.h5 was made in {recorded.precision}, and {device} gives {resolved.resolved}; "
            f"set memory.precision_mode={recorded.precision}, or run on the same kind of device"
        )
    files = prepare_files(config.model, recorded.revision, recorded.adapter_revisions)
    if (
        files_signature(files) != recorded.signature
        and files_fingerprint(files) != recorded.fingerprint
    ):
        raise ModelError(
            f"model.source: the files of {config.model.source} have changed since load_model; "
            "put them back, or run it again with --forcerun load_model"
        )
    return files


def provenance_of(recorded: ModelRecord) -> dict[str, Any]:
    """The model's part of a data file's attributes.

    Args:
        recorded: What `model.h5` holds.

    Returns:
        Attributes by name; each name begins with `model_`.
    """
    names = [
        "source",
        "revision",
        "gguf_file",
        "model_class",
        "fingerprint",
        "precision_requested",
        "precision",
    ]
    names += ["precision_steps", "quantization", "attention", "switches", "blocks"]
    names += ["adapters"] * ("adapters" in recorded.attributes)
    return {f"model_{n.removeprefix('model_')}": recorded.attributes[n] for n in names}
