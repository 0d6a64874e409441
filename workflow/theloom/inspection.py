"""What a file of activations says of itself: schema, provenance, hook points, statistics, and where the time went."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theloom.dataset import Activations

_PROVENANCE = ("model_", "tokenizer", "corpus", "versions", "code", "python", "device", "run_identity", "config")


@dataclass(frozen=True)
class HookSummary:
    """One hook point: the shape of a row, its bytes on disk before compression, and its statistics."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    mean: float
    variance: float
    norm: float
    not_finite: int
    infinite: int


def hooks(acts: Activations) -> list[HookSummary]:
    """All hook points of an open dataset."""
    found = []
    for hook in acts.hooks:
        rows, s = acts[hook], acts.statistics[hook]
        numbers = (s.mean_of_all, s.variance_of_all, s.norm, s.not_finite, s.infinite)
        found.append(HookSummary(hook, rows.shape[1:], rows.nbytes, *numbers))
    return found


def provenance(acts: Activations) -> dict[str, Any]:
    """Where the rows came from: the attributes of that kind, JSON text as what it says."""
    return {k: _plain(v) for k, v in acts.attributes.items() if k.startswith(_PROVENANCE)}


def schema(acts: Activations) -> dict[str, Any]:
    """The format, and what the file holds."""
    names = ("format", "format_version", "kind", "precision", "compression", "batch_tokens", "chunk_size")
    found = {name: _plain(acts.attributes[name]) for name in names if name in acts.attributes}
    windows = len(acts.window_document)
    longest = int(np.diff(acts.window_offset).max(initial=0))
    return found | {
        "rows": len(acts),
        "documents": len(acts.documents),
        "windows": windows,
        "longest_window": longest,
        "files": [_of_folder(p, acts.path.parent) for p in acts.files],
        "bytes_on_disk": sum(p.stat().st_size for p in dict.fromkeys([acts.path, *acts.files])),
    }


def _of_folder(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "[{":
        return json.loads(value)
    return value.item() if hasattr(value, "item") else value
