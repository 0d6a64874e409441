"""Figures of memory: predicted against measured, and the GPUs that the run fits on."""

from pathlib import Path

import h5py
import numpy as np

from theloom.devices import gpu_specs
from theloom.memory import sizes
from theloom.planning.estimates import estimate_file
from theloom.planning.estimates.estimate_file import Estimate
from theloom.report import style
from theloom.report.style import Drawn, Table
from theloom.store import file_format

_PARTS = ("weights", "kv_cache", "captured", "temporaries", "logits")
_LAYERWISE = (
    "buffers",
    "host_buffers",
    "kept",
    "working_set",
    "residuals",
    "recorded",
    "embeddings",
    "writer",
    "fixed",
)
_WORDS = {
    "kv_cache": "KV cache",
    "captured": "hook points",
    "files": "overhead: file pages",
    "heap": "overhead: heap retained by malloc",
    "buffers": "buffers of two blocks",
    "host_buffers": "of them on the host",
    "working_set": "one batch in one block",
    "recorded": "recorded arguments",
    "sweep": "the largest batch, at its peak",
}


def predicted_against_measured(model: Path, title: str) -> Drawn:
    """Draw predicted and measured bytes of the largest planned pass, by component. Layer by layer
    the peak of the largest batch alone is measured, not its components.

    Args:
        model: path of `model.h5`.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    with file_format.open_h5(model, "model") as file:
        layerwise = file.attrs["execution"] == "layerwise"
        rows, shape = (_of_layerwise if layerwise else _of_resident)(file["memory"])
    table = Table(("component", "predicted_bytes", "measured_bytes"), rows)
    drawing, (panel,) = style.new(
        9, 1.4 + 0.7 * len(table.rows), f"{title}: memory by component ({shape})"
    )
    at = np.arange(len(table.rows))
    for offset, column, label in ((-0.19, 1, "predicted"), (0.19, 2, "measured")):
        values = [row[column] for row in table.rows]
        bars = panel.barh(
            at + offset,
            [v / 1e6 for v in style.lengths(values)],
            0.36,
            label=label,
            **style.bars(column - 1),
        )
        labels = [f"not {label}" if v is None else f"{v / 1e6:,.1f}" for v in values]
        panel.bar_label(bars, labels, padding=3, fontsize=9)
    panel.set_yticks(at, [_WORDS.get(r[0], r[0]) for r in table.rows])
    panel.invert_yaxis()
    panel.set_xlabel("MB (10⁶ bytes)")
    panel.margins(x=0.15)
    panel.grid(axis="y", visible=False)
    panel.legend(loc="lower right")
    return Drawn(drawing, table)


def measured_bytes(model: h5py.File) -> int:
    """Bytes that `load_model` measured: weights and the largest pass, or the peak of a sweep.

    Args:
        model: an open `model.h5`.

    Returns:
        Bytes.
    """
    measured = model["memory/measured"].attrs
    if model.attrs["execution"] == "layerwise":
        return int(measured["growth"])
    return sum(int(measured[part]) for part in _PARTS)


_Row = tuple[str, int | None, int | None]


def _of_resident(group: h5py.Group) -> tuple[list[_Row], str]:
    """Bytes by component, predicted and measured, and of which pass."""
    predicted, measured = (dict(group[side].attrs) for side in ("predicted", "measured"))
    both = [(part, int(predicted[part]), int(measured[part])) for part in _PARTS]
    rows: list[_Row] = [row for row in both if row[1] or row[2]]
    overhead = [(name, int(measured.get(name, 0))) for name in ("files", "heap")]
    rows += [(name, None, value) for name, value in overhead if value > 0]
    windows, tokens, step = (
        group["workload"].attrs[name] for name in ("windows", "tokens", "chunk_size")
    )
    return rows, f"largest pass: {windows} × {tokens} tokens, steps of {step}"


def _of_layerwise(group: h5py.Group) -> tuple[list[_Row], str]:
    """The same of a sweep, whose peak is measured over one batch."""
    predicted, measured = (dict(group[side].attrs) for side in ("predicted", "measured"))
    parts = [(part, int(predicted[part])) for part in _LAYERWISE]
    rows: list[_Row] = [(part, value, None) for part, value in parts if value]
    rows.append(("sweep", int(measured["predicted"]), int(measured["growth"])))
    return rows, f"layer by layer, batches of {group['plan'].attrs['batch_tokens']} tokens"


def fits_on(estimate_path: Path, title: str) -> Drawn:
    """Draw the share of a GPU's usable memory that the run takes, by format of the weights, for
    the GPUs that it nearly fills or nearly fits on; the table has all of them.

    Args:
        estimate_path: path of `estimate.h5`.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    result = estimate_file.read(estimate_path)
    kinds = [kind for kind in ("fp32", "fp16", "bf16", "int8", "int4") if kind in result.passes]
    gpus = [gpu for gpu in gpu_specs.gpus() if gpu.name in gpu_specs.REPORTED]
    rows = []
    for gpu in gpus:
        for kind in kinds:
            needed = _needed(result, kind, gpu.compute_capability)
            verdict = _verdict(gpu, needed, gpu.computes(kind))
            rows.append(
                (gpu.name, gpu.usable_bytes, kind, needed, needed / gpu.usable_bytes, verdict)
            )
    table = Table(("gpu", "usable_bytes", "kind", "needed_bytes", "share", "fits"), rows)
    chosen = _near_the_limit([[row[4] for row in rows if row[0] == gpu.name] for gpu in gpus])
    gpus = [gpus[n] for n in chosen]
    rows = [row for gpu in gpus for row in rows if row[0] == gpu.name]
    passes = f"one window of up to {result.context_length} tokens, in steps of {result.chunk_size}"
    height = 1.6 + 0.36 * len(gpus)
    drawing, (panel,) = style.new(9, height, f"{title}: share of a GPU's usable memory\n({passes})")
    grid = np.array([row[4] if row[5] == "yes" else np.nan for row in rows]).reshape(
        len(gpus), len(kinds)
    )
    panel.grid(visible=False)
    panel.pcolormesh(
        np.where(np.isnan(grid), np.nan, np.minimum(grid, 1)),
        cmap=f"{style.HEAT}_r",
        vmin=0,
        vmax=1.3,
    )
    for n, row in enumerate(rows):
        y, x = divmod(n, len(kinds))
        text = ("under 1%" if row[4] < 0.01 else f"{row[4]:.0%}") if row[5] == "yes" else row[5]
        dark = row[5] == "yes" and row[4] > 0.6
        panel.text(
            x + 0.5,
            y + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=10,
            color="white" if dark else "black",
        )
    panel.set_xticks(
        np.arange(len(kinds)) + 0.5,
        [f"{k}\n{_needed(result, k, (8, 0)) / 1e9:.2f} GB" for k in kinds],
    )
    panel.set_yticks(
        np.arange(len(gpus)) + 0.5, [f"{g.name} ({g.usable_bytes / 1e9:.1f} GB)" for g in gpus]
    )
    panel.set_xlabel("format of the weights, and GPU memory that the run needs")
    panel.invert_yaxis()
    return Drawn(drawing, table)


_GPUS_SHOWN = 8


def _near_the_limit(shares: list[list[float]]) -> list[int]:
    """Which GPUs have a share nearest to 1, in the order of the list.

    Examples:
        >>> _near_the_limit([[0.001, 0.002]] * 9 + [[0.9, 3.0]])
        [0, 1, 2, 3, 4, 5, 6, 9]
    """
    distance = [min(abs(np.log(max(share, 1e-12))) for share in of_gpu) for of_gpu in shares]
    return sorted(np.argsort(distance, kind="stable")[:_GPUS_SHOWN].tolist())


def _needed(result: Estimate, kind: str, capability: tuple[int, int]) -> int:
    tokens = min(result.chunk_size, result.context_length)
    parts = result.find(kind, tokens, result.chunk_size)
    if result.context_length > result.chunk_size:  # long documents stream
        streamed = result.find(kind, result.context_length, result.chunk_size)
        parts = max(parts, streamed, key=lambda p: p.total)
    return max(
        sizes.with_device_overhead(result.weights[kind], parts, "cuda", capability).total,
        result.load_peak[kind],
    )


def _verdict(gpu: gpu_specs.GPU, needed: int, able: bool) -> str:
    if not able:
        return "unsupported"
    return "yes" if needed <= gpu.usable_bytes else "too small"
