"""Comparison of several runs: error against FP32, memory, speed."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from theloom.dataset import activations
from theloom.dataset.activations import Activations
from theloom.errors import StoreError
from theloom.pairs.same_tokens import check_same_tokens
from theloom.report import states, style
from theloom.report.memory import measured_bytes
from theloom.report.speed import overall, shard_work
from theloom.report.style import Drawn, Table
from theloom.store import file_format

log = logging.getLogger(__name__)

_ROWS = 4096  # sampled for errors


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Args:
        run: name of the run.
        precision: of the weights.
        stored: precision on disk.
        error_rms: RMS of the difference from FP32, as a share of the RMS of the FP32 rows; None
            without an FP32 run of the same model and tokens.
        error_largest: largest difference from FP32, as a share of the largest FP32 value; or None.
        memory: measured bytes of the weights and the largest pass; layer by layer of a sweep over
            the largest batch.
        tokens_per_second: over all shards; None if they were not timed.
        slowest: tokens per second of the slowest shard; None where fewer than two were timed.
        fastest: the same of the fastest.
        disk: bytes of the rows.
    """

    run: str
    precision: str
    stored: str
    error_rms: float | None
    error_largest: float | None
    memory: int
    tokens_per_second: float | None
    slowest: float | None
    fastest: float | None
    disk: int


def compare(folders: list[Path]) -> list[Compared]:
    """Compare runs to the FP32 run among them.

    Args:
        folders: folders of finished runs.

    Returns:
        One entry per run, in the same order.
    """
    opened = {folder: activations.open_activations(folder / "activations.h5") for folder in folders}
    precise = [
        f
        for f in folders
        if _precisions(opened[f]) == ("fp32", "fp32") and not _quantised(opened[f])
    ]
    compared = []
    for folder in folders:
        acts = opened[folder]
        reference = next((opened[p] for p in precise if _same(opened[p], acts)), None)
        if reference is None:
            log.warning(
                "%s: no FP32 run of the same model and tokens, so no error is computed",
                folder.name,
            )
        rms, largest = (None, None) if reference is None else errors(acts, reference)
        works = [shard_work(shard) for shard in sorted((folder / "shards").glob("*.h5"))]
        with file_format.open_h5(folder / "model.h5", "model") as file:
            memory = measured_bytes(file)
        _, speed = overall(works)
        speeds = [w.tokens_per_second for w in works if w.tokens_per_second]
        slowest, fastest = (min(speeds), max(speeds)) if len(speeds) > 1 else (None, None)
        disk = sum(acts[h].nbytes for h in acts.hooks)
        precision, stored = _precisions(acts)
        compared.append(
            Compared(
                folder.name,
                precision,
                stored,
                rms,
                largest,
                memory,
                speed,
                slowest,
                fastest,
                disk,
            )
        )
    return compared


def errors(acts: Activations, reference: Activations) -> tuple[float, float]:
    """Compute errors over a sample of rows, at the worst of the common hook points.

    Args:
        acts: activations of a run.
        reference: activations of the FP32 run, with the same rows.

    Returns:
        RMS error relative to the RMS of the reference, and largest absolute error relative to its
        largest absolute value.
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
    return str(acts.attributes["model_precision"]), acts.stored_as


def _quantised(acts: Activations) -> bool:
    return acts.attributes["model_quantization"] not in ("null", None)


def _same(reference: Activations, acts: Activations) -> bool:
    names = ("model_fingerprint", "corpus_hash", "rows")
    if any(reference.attributes[n] != acts.attributes[n] for n in names):
        return False
    try:
        check_same_tokens(reference, acts)
    except StoreError as difference:
        log.warning("%s", difference)
        return False
    return True


def side_by_side(compared: list[Compared]) -> Drawn:
    """Draw error and memory of each run, and its speed where every run has several shards, whose
    range says how far speeds can be told apart.

    Args:
        compared: the runs.

    Returns:
        The figure.
    """
    names = [c.run for c in compared]
    table = Table(
        (
            *("run", "precision", "stored_as", "error_rms_share", "error_largest_share"),
            *("memory_measured_bytes", "tokens_per_second", "slowest_shard", "fastest_shard"),
            "rows_on_disk_bytes",
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
                c.slowest,
                c.fastest,
                c.disk,
            )
            for c in compared
        ],
    )
    labels = [
        f"{own_part(n, names)}\n({c.precision}, stored as {c.stored})"
        for n, c in zip(names, compared, strict=True)
    ]
    height = 1.8 + 0.55 * len(compared)
    timed = all(c.slowest is not None for c in compared)
    drawing, panels = style.new(
        12, height, f"comparison of {len(compared)} runs", columns=2 + timed, sharey=True
    )
    columns: list[tuple[str, list[float | None]]] = [
        (
            "RMS error relative to FP32, %",
            [None if c.error_rms is None else 100 * c.error_rms for c in compared],
        ),
        ("measured memory, MB", [c.memory / 1e6 for c in compared]),
    ]
    if timed:
        speeds = [c.tokens_per_second for c in compared]
        columns.append(("tokens per second (range over shards)", speeds))
    at = np.arange(len(compared))
    for n, (panel, (label, values)) in enumerate(zip(panels, columns, strict=True)):
        lengths = style.lengths(values)
        bars = panel.barh(at, lengths, 0.7, **style.bars(n))
        if n == 2:
            ends = zip(compared, lengths, strict=True)
            around = [(v - (c.slowest or v), (c.fastest or v) - v) for c, v in ends]
            below = np.maximum(0, np.array(around)).T
            panel.errorbar(lengths, at, xerr=below, fmt="none", ecolor="black", capsize=3)
        written = [
            "unknown" if v is None else f"{v:.3g}" if v < 10 else f"{v:,.0f}" for v in values
        ]
        panel.bar_label(bars, written, padding=3, fontsize=9)
        panel.set_xlabel(label)
        panel.margins(x=0.25)
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(at, labels, fontsize=9)
    panels[0].invert_yaxis()
    return Drawn(drawing, table)


def own_part(name: str, names: list[str]) -> str:
    """A run's name without the overrides that all runs share.

    Args:
        name: of the run.
        names: of all runs.

    Returns:
        The rest; the name's first part where nothing is left.

    Examples:
        >>> own_part("tiny+a=1+b=2", ["tiny+a=1+b=2", "tiny+a=3+b=2"])
        'a=1'
    """
    shared = set.intersection(*(set(n.split("+")) for n in names)) if len(names) > 1 else set()
    own = [part for part in name.split("+") if part not in shared]
    return "+".join(own) or name.split("+")[0]
