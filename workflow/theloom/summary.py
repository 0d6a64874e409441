"""What the pipeline prints when it has finished."""

from pathlib import Path

import numpy as np

from theloom import dataset, layout
from theloom.cli_tables import lines


def summary(folder: Path) -> str:
    """A few lines on a finished run: the file, what it holds, and how it was verified."""
    acts = dataset.open(folder / "activations.h5")
    with layout.open_h5(folder / "verification.h5", "verification") as file:
        error, largest = file["recomputed/error"][:], file["recomputed/largest"][:]
        documents, allowed = len(error), np.full(error.shape[1], file.attrs["tolerance"])
        if "recomputed/allowed" in file:
            allowed = file["recomputed/allowed"][:]
        cosine = file["fp32/cosine"][:].mean(axis=0) if "fp32" in file else None
    shares = (error / np.maximum(largest, 1e-30)).max(axis=0)
    nearest = int((shares / allowed).argmax())
    size = sum(acts[hook].nbytes for hook in acts.hooks)
    said = [
        f"{acts.path}",
        f"  {len(acts):,} tokens of {len(acts.documents)} documents in {acts.precision}, {size / 1e6:.1f} MB",
        f"  hook points: {_few(acts.hooks)}",
        f"  verified: {documents} documents recomputed, largest error {shares[nearest]:.1e} of the largest value "
        f"(at most {allowed[nearest]:.0e}); all rows' hashes are right",
    ]
    if cosine is not None:
        quantization = acts.attributes["model_quantization"]
        said.append(f"  {quantization} weights: residuals' cosine similarity to FP32 {cosine.min():.4f} or more")
    return "\n".join([*map(lines, said), *_next(folder, acts.path)])


def _next(folder: Path, path: Path) -> list[str]:
    """What to do with a finished run, as commands to paste."""
    figures = [] if (folder / "figures").is_dir() else ["make report, with the same PROFILES and SET"]
    first, *others = [*figures, f".venv/bin/theloom inspect {path}"]
    return [f"  next: {first}", *(f"        {command}" for command in others)]


def _few(hooks: list[str]) -> str:
    return ", ".join(hooks) if len(hooks) <= 4 else f"{hooks[0]} … {hooks[-1]} ({len(hooks)} in all)"
