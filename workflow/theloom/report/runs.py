"""The runs of one call side by side: error against FP32, memory, speed."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from theloom.dataset import activations
from theloom.dataset.activations import Activations
from theloom.report import states, style
from theloom.report.speed import shard_work
from theloom.report.style import Drawn, Table
from theloom.store import file_format

log = logging.getLogger(__name__)

_ROWS = 4096  # that errors are taken over


@dataclass(frozen=True)
class Compared:
    """One run of a sweep. Errors are None where there is no FP32 run of the same model, tokens and
    hook points.
    """

    run: str
    precision: str
    stored: str
    error_rms: (
        float | None
    )  # root mean square of the difference, as a share of that of the FP32 rows
    error_largest: float | None  # largest difference, as a share of the largest FP32 value
    memory: int  # bytes of weights and of the largest pass, as measured
    tokens_per_second: float | None
    disk: int


def compare(folders: list[Path]) -> list[Compared]:
    """Each run's folder against the FP32 run among them."""
    opened = {folder: activations.open_activations(folder / "activations.h5") for folder in folders}
    precise = [
        f
        for f in folders
        if _precisions(opened[f]) == ("fp32", "fp32") and not _quantised(opened[f])
    ]
    found = []
    for folder in folders:
        acts = opened[folder]
        reference = next((opened[p] for p in precise if _same(opened[p], acts)), None)
        if reference is None:
            log.warning(
                "%s: no FP32 run of the same model and tokens beside it, so no error is given",
                folder.name,
            )
        rms, largest = (None, None) if reference is None else errors(acts, reference)
        works = [shard_work(shard) for shard in sorted((folder / "shards").glob("*.h5"))]
        timed = [w for w in works if w.seconds]
        seconds, tokens = sum(w.seconds or 0.0 for w in timed), sum(w.tokens for w in timed)
        with file_format.open_h5(folder / "model.h5", "model") as file:
            parts = dict(file["memory/measured"].attrs)
        memory = sum(
            int(parts[n]) for n in ("weights", "kv_cache", "captured", "temporaries", "logits")
        )
        speed = tokens / seconds if seconds else None
        disk = sum(acts[h].nbytes for h in acts.hooks)
        found.append(Compared(folder.name, *_precisions(acts), rms, largest, memory, speed, disk))
    return found


def errors(acts: Activations, reference: Activations) -> tuple[float, float]:
    """Relative root mean square error and relative largest error, the worst over the common hook
    points.
    """
    rows = states.sampled_rows(reference, _ROWS, seed=0)
    rms, largest = 0.0, 0.0
    for hook in (h for h in acts.hooks if h in reference):
        truth, other = reference[hook][rows].double(), acts[hook][rows].double()
        there = truth.isfinite()  # scores of masked keys are -inf
        truth, off = truth[there], (other[there] - truth[there])
        rms = max(
            rms, float(off.square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30))
        )
        largest = max(largest, float(off.abs().max() / truth.abs().max().clamp_min(1e-30)))
    return rms, largest


def _precisions(acts: Activations) -> tuple[str, str]:
    return str(acts.attributes["model_precision"]), acts.precision


def _quantised(acts: Activations) -> bool:
    return acts.attributes["model_quantization"] not in ("null", None)


def _same(reference: Activations, acts: Activations) -> bool:
    names = ("model_fingerprint", "corpus_hash", "rows")
    return all(reference.attributes[n] == acts.attributes[n] for n in names) and bool(
        np.array_equal(reference.input_ids.numpy(...), acts.input_ids.numpy(...))
    )


def side_by_side(compared: list[Compared]) -> Drawn:
    """Three panels with a bar for each run."""
    names = [c.run for c in compared]
    table = Table(
        (
            *("run", "precision", "stored_as", "error_rms_share", "error_largest_share"),
            *("memory_measured_bytes", "tokens_per_second", "rows_on_disk_bytes"),
        ),
        [
            (
                c.run,
                c.precision,
                c.stored,
                c.error_rms,
                c.error_largest,
                c.memory,
                c.tokens_per_second,
                c.disk,
            )
            for c in compared
        ],
    )
    labels = [
        f"{_own_part(n, names)}\n({c.precision}, stored as {c.stored})"
        for n, c in zip(names, compared, strict=True)
    ]
    height = 1.8 + 0.55 * len(compared)
    drawing, panels = style.new(
        12, height, f"{len(compared)} runs side by side", columns=3, sharey=True
    )
    columns: list[tuple[str, list[float | None]]] = [
        (
            "error relative to FP32 (RMS), %",
            [None if c.error_rms is None else 100 * c.error_rms for c in compared],
        ),
        ("memory measured, MB", [c.memory / 1e6 for c in compared]),
        ("tokens per second", [c.tokens_per_second for c in compared]),
    ]
    at = np.arange(len(compared))
    for n, (panel, (label, values)) in enumerate(zip(panels, columns, strict=True)):
        bars = panel.barh(at, style.lengths(values), 0.7, **style.bars(n))
        written = [
            "not known" if v is None else f"{v:.3g}" if v < 10 else f"{v:,.0f}" for v in values
        ]
        panel.bar_label(bars, written, padding=3, fontsize=9)
        panel.set_xlabel(label)
        panel.margins(x=0.25)
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(at, labels, fontsize=9)
    panels[0].invert_yaxis()
    return Drawn(drawing, table)


def _own_part(name: str, names: list[str]) -> str:
    """A run's name without the overrides that all runs share."""
    shared = set.intersection(*(set(n.split("+")) for n in names)) if len(names) > 1 else set()
    own = [part for part in name.split("+") if part not in shared]
    return "+".join(own) or name.split("+")[0]
