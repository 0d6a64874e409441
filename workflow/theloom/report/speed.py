"""Figures of speed: throughput, padding and a breakdown of time, by shard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from theloom.corpus import batching
from theloom.dataset import activations
from theloom.model.length_switches import LengthSwitch
from theloom.report import style
from theloom.report.style import Drawn, Table

# parts of a shard's seconds, in the order in which they are stacked
PARTS = {
    "seconds_forward": "forward pass",
    "seconds_copy": "copies from the device",
    "seconds_waiting_for_disk": "waiting for the disk",
    "seconds_waiting_for_weights": "waiting for weights",
    "seconds_idle": "idle",
}


@dataclass(frozen=True)
class ShardWork:
    """Work and time of one shard.

    Args:
        shard: its number.
        tokens: of documents.
        tokens_forwarded: with padding.
        seconds: None if neither the shard nor a benchmark file records them.
        parts: seconds by name of the metric.
        source: of the seconds: the shard's own metrics, or the job's benchmark, which includes
            loading the model.
    """

    shard: int
    tokens: int
    tokens_forwarded: int
    seconds: float | None
    parts: dict[str, float]
    source: str

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput without padding."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def padding(self) -> float:
        """Share of the forwarded tokens that are padding, from 0 to 1."""
        return 1 - self.tokens / self.tokens_forwarded if self.tokens_forwarded else 0.0


def shard_work(path: Path) -> ShardWork:
    """Read the work of one shard.

    Args:
        path: of the shard.

    Returns:
        Its tokens and seconds.
    """
    acts = activations.open_activations(path)
    attributes, metrics, lengths = acts.attributes, acts.metrics, np.diff(acts.window_tokens)
    switches = json.loads(attributes.get("model_switches", "[]"))
    batches = batching.plan_batches(
        lengths,
        attributes.by_shard("batch_tokens")[0],
        attributes.by_shard("chunk_size")[0],
        int(attributes.get("streamed_windows", 1)),
        [LengthSwitch(**switch) for switch in switches],
    )
    forwarded = sum(len(b.windows) * b.width for b in batches)
    seconds: float | None = metrics["seconds_total"]
    source = "shard"
    if not seconds:
        seconds, source = _benchmark(path), "benchmark of the job"
    return ShardWork(
        shard=int(attributes["shard"]),
        # a job that resumed a partial shard counts and times only its own part
        tokens=int(metrics["tokens"] or lengths.sum()),
        tokens_forwarded=int(metrics["tokens_forwarded"] or forwarded),
        seconds=seconds,
        parts={name: metrics[name] for name in PARTS if metrics[name]},
        source=source if seconds else "",
    )


def overall(works: Sequence[ShardWork]) -> tuple[float, float | None]:
    """The speed of all shards that were timed.

    Args:
        works: of the shards.

    Returns:
        Their seconds, and their tokens per second; None where none was timed.
    """
    timed = [work for work in works if work.seconds]
    seconds = sum(work.seconds or 0.0 for work in timed)
    return seconds, sum(work.tokens for work in timed) / seconds if seconds else None


def _benchmark(shard: Path) -> float | None:
    """Seconds of the job that wrote a shard, as Snakemake measured them."""
    file = shard.parents[1] / "benchmarks" / "extract_shard" / f"{shard.stem}.tsv"
    if not file.is_file():
        return None
    header, *rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return float(dict(zip(header, rows[-1], strict=False))["s"]) if rows else None


def throughput(works: list[ShardWork], title: str) -> Drawn:
    """Draw throughput and padding by shard.

    Args:
        works: one entry per shard.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    table = Table(
        (
            "shard",
            "tokens",
            "tokens_forwarded",
            "padding_share",
            "seconds",
            "tokens_per_second",
            "seconds_from",
        ),
        [
            (
                w.shard,
                w.tokens,
                w.tokens_forwarded,
                w.padding,
                w.seconds,
                w.tokens_per_second,
                w.source,
            )
            for w in works
        ],
    )
    drawing, (speed, padding) = style.new(
        9, _height(works), f"{title}: throughput by shard", columns=2, sharey=True
    )
    at = np.arange(len(works))
    values = style.lengths([w.tokens_per_second for w in works])
    bars = speed.barh(at, values, 0.7, color=style.COLOURS[0])
    padded = padding.barh(at, [100 * w.padding for w in works], 0.7, **style.bars(1))
    if len(works) <= 24:
        speed.bar_label(
            bars, [f"{v:,.0f}" if v else "not timed" for v in values], padding=3, fontsize=9
        )
        padding.bar_label(padded, [f"{100 * w.padding:.1f}" for w in works], padding=3, fontsize=9)
    speed.set_yticks(at, [str(w.shard) for w in works]) if len(works) <= 24 else None
    speed.set_ylabel("shard")
    speed.invert_yaxis()
    speed.set_xlabel("tokens per second, without padding")
    padding.set_xlabel("padding, % of forwarded tokens")
    for panel, least in ((speed, 1.0), (padding, 5.0)):
        panel.set_xlim(0, max(least, 1.2 * panel.get_xlim()[1]))
        panel.grid(axis="y", visible=False)
    return Drawn(drawing, table)


def time_breakdown(works: list[ShardWork], title: str) -> Drawn:
    """Draw the seconds of each shard by part.

    Args:
        works: one entry per shard.
        title: start of the figure's title.

    Returns:
        The figure; a note if the shards were not timed.
    """
    if not any(w.seconds for w in works):
        return style.note(f"{title}: time breakdown", "The run's shards were not timed.")
    split = any(w.parts for w in works)
    names = [n for n in PARTS if any(n in w.parts for w in works)] if split else []
    labels = [PARTS[n] for n in names] + ["other" if split else "entire job, with model loading"]
    rows = []
    for w in works:
        parts = [w.parts.get(n, 0.0) for n in names]
        rows.append((w.shard, w.seconds, *parts, max(0.0, (w.seconds or 0.0) - sum(parts))))
    table = Table(("shard", "seconds_total", *names, "seconds_other"), rows)
    drawing, (panel,) = style.new(9, _height(works) + 0.5, f"{title}: time breakdown by shard")
    at, left = np.arange(len(works)), np.zeros(len(works))
    for n, label in enumerate(labels):
        seconds = np.array([row[2 + n] for row in rows])
        if not seconds.any():
            continue
        share = seconds.sum() / max(1e-9, sum(row[1] or 0.0 for row in rows))
        panel.barh(at, seconds, 0.7, left=left, label=f"{label}: {share:.1%}", **style.bars(n))
        left = left + seconds
    panel.set_yticks(at, [str(w.shard) for w in works]) if len(works) <= 24 else None
    panel.set_ylabel("shard")
    panel.set_xlabel("seconds")
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    drawing.legend(loc="outside lower center", ncols=min(3, len(labels)))
    return Drawn(drawing, table)


def _height(works: list[ShardWork]) -> float:
    return 1.6 + min(0.4 * len(works), 9.6)
