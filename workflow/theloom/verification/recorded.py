"""What `verification.h5` says of a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from theloom.store import file_format
from theloom.verification.encoding import Cost, over_documents


@dataclass(frozen=True)
class Recorded:
    """The result of a run's verification.

    Args:
        windows: whose hashes were checked.
        damaged: windows whose rows do not have theirs.
        documents: how many were recomputed.
        errors: the largest error of each hook point, as a share of its largest value, (hooks,).
        allowed: the tolerance of each, (hooks,).
        cosine: mean cosine similarity to FP32 of each residual, (residuals,); of quantised runs.
        cost: what a scale a row costs, over all hook points; of runs whose rows have one.
    """

    windows: int
    damaged: int
    documents: int
    errors: np.ndarray
    allowed: np.ndarray
    cosine: np.ndarray | None
    cost: Cost | None


def read(path: Path) -> Recorded:
    """Read `verification.h5`.

    Args:
        path: of it.

    Returns:
        Counts of windows and documents, and errors by hook point.

    Raises:
        StoreError: it is missing, or of another format.
    """
    with file_format.open_h5(path, "verification") as file:
        error, largest = file["recomputed/max_abs_error"][:], file["recomputed/max_abs"][:]
        return Recorded(
            windows=int(file.attrs["windows_hashed"]),
            damaged=len(json.loads(file.attrs["windows_wrong"])),
            documents=len(error),
            errors=(error / np.maximum(largest, 1e-30)).max(axis=0, initial=0),
            allowed=file["recomputed/tolerance"][:],
            cosine=file["fp32/cosine"][:].mean(axis=0) if "fp32" in file else None,
            cost=_cost(file) if "encoding" in file else None,
        )


def _cost(file: h5py.File) -> Cost:
    columns = [file[f"encoding/{name}"][:] for name in Cost._fields]
    return Cost(*over_documents(np.stack(columns, -1).reshape(-1, 1, 4))[0].tolist())
