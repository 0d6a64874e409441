"""What a file of activations says of itself: schema, provenance, hook points, statistics, and where
the time went.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from theloom.dataset.activations import Activations
from theloom.errors import StoreError
from theloom.hooks.points import SCORES
from theloom.store import checksums, commit_log, file_format, index

_PROVENANCE = (
    "model_",
    "tokenizer",
    "corpus",
    "package_versions",
    "code_version",
    "python_version",
    "device",
    "run_fingerprint",
    "config",
)


@dataclass(frozen=True)
class HookSummary:
    """One hook point: the shape of a row, its bytes on disk before compression, and its statistics."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    mean: float
    variance: float
    norm: float
    nonfinite: int
    infinite: int


def summarize_hooks(acts: Activations) -> list[HookSummary]:
    """All hook points of an open dataset."""
    found = []
    for hook in acts.hooks:
        rows, s = acts[hook], acts.statistics[hook]
        numbers = (s.mean_of_all, s.variance_of_all, s.norm, s.nonfinite, s.infinite)
        found.append(HookSummary(hook, rows.shape[1:], rows.nbytes, *numbers))
    return found


def provenance_attributes(acts: Activations) -> dict[str, Any]:
    """Where the rows came from: the attributes of that kind, JSON text as what it says."""
    return {k: _plain(v) for k, v in acts.attributes.items() if k.startswith(_PROVENANCE)}


def file_schema(acts: Activations) -> dict[str, Any]:
    """The format, and what the file holds."""
    names = (
        "format",
        "format_version",
        "kind",
        "precision",
        "compression",
        "batch_tokens",
        "chunk_size",
    )
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


_ROWS_AT_ONCE = 1 << 14


def check_hashes(acts: Activations) -> tuple[list[int], np.ndarray]:
    """Windows whose rows are not those that were written, and for each hook point how many values
    are not finite.
    """
    import torch

    wrong: list[int] = []
    nonfinite = np.zeros(len(acts.hooks), "<i8")
    readers = [acts[h] for h in acts.hooks]
    masked = [h.endswith(SCORES) for h in acts.hooks]  # scores of masked keys are -inf
    for window in range(len(acts.window_document)):
        begin, end = (int(r) for r in acts.window_offset[window : window + 2])
        for number, reader in enumerate(readers):
            state = xxhash.xxh3_64()
            try:
                for start in range(begin, end, _ROWS_AT_ONCE):
                    rows = reader[start : min(start + _ROWS_AT_ONCE, end)]
                    state.update(file_format.raw_bytes(rows))
                    nonfinite[number] += int(
                        (~torch.isfinite(rows) & ~(masked[number] & rows.isneginf())).sum()
                    )
            except StoreError:  # a packed chunk that cannot be unpacked
                state.reset()
            if state.intdigest() != acts.window_hash[window, number]:
                wrong.append(window)
                break
    return wrong, nonfinite


def damaged_parts(acts: Activations) -> list[str]:
    """What beside the rows is not as it was written, in words: metadata, tables, logs, of the file
    and its shards.
    """
    found = []
    for path in dict.fromkeys([acts.path, *acts.files]):
        try:
            with h5py.File(path, "r") as file, path.open("rb") as f:
                listed = index.read(file)
                broken = checksums.broken_checksums(
                    f.fileno(), listed, checksums.METADATA, checksums.TABLES, checksums.RESULTS
                )
                if listed != index.derive(file):
                    broken.append("its directory")
                if "commit_log" in file and (records := commit_log.broken_records(file)):
                    broken.append(f"{len(records)} records of its log (first: batch {records[0]})")
        except file_format.DAMAGE as error:
            broken = [f"its metadata ({' '.join(str(error).split())})"]
        if broken:
            found.append(f"{path.name}: {', '.join(broken)}")
    return found
