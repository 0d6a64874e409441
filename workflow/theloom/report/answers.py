"""Figures of answers: how long they are and why they end, and the speed of sampling by shard."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theloom.answers.answer import STOP_REASONS, read_shard
from theloom.report import style
from theloom.report.style import Drawn, Table
from theloom.store import file_format

_BINS = 30  # of the histogram at most


@dataclass(frozen=True)
class Answers:
    """What a run's answers are.

    Attributes:
        ids: Of the documents, (answers).
        prompts: How many there are.
        lengths: Tokens of each answer, (answers).
        stop_reasons: Why each ends, (answers).
        log_probabilities: Mean over each one's tokens; NaN where they are not known, (answers).
        attributes: Of the group `answers`: settings, and what sampling took.
    """

    ids: list[str]
    prompts: int
    lengths: np.ndarray
    stop_reasons: list[str]
    log_probabilities: np.ndarray
    attributes: dict[str, Any]

    @property
    def reasons(self) -> dict[str, int]:
        """How many answers end by each stop reason that occurs."""
        found = Counter(self.stop_reasons)
        return {reason: found[reason] for reason in STOP_REASONS if found[reason]}

    @property
    def range(self) -> tuple[int, float, int]:
        """Tokens of the shortest answer, in the median, and of the longest one."""
        lengths = self.lengths
        return int(lengths.min()), float(np.median(lengths)), int(lengths.max())

    @property
    def tokens_sampled(self) -> int:
        """Tokens that the jobs which finished the shards have sampled."""
        return int(self.attributes.get("tokens_sampled", 0))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that a job sampled per second; None where the time is not known."""
        seconds = float(self.attributes.get("seconds_sampling", 0.0))
        return self.tokens_sampled / seconds if seconds else None

    @property
    def settings(self) -> str:
        """How tokens were chosen, in words."""
        temperature = float(self.attributes["temperature"])
        return f"temperature {temperature:g}" if temperature else "greedy"


def read(path: Path) -> Answers:
    """Read `answers.h5`.

    Args:
        path: Of the file.

    Returns:
        The answers, with their mean log probabilities.

    Raises:
        StoreError: The file is missing, damaged or another one.
    """
    with file_format.open_h5(path, "tokens") as file:
        group = file["answers"]
        offset = group["offset"][:]
        lengths, found = np.diff(offset), group["log_probability"][:].astype("f8")
        sums = np.diff(np.append(0.0, np.cumsum(np.nan_to_num(found)))[offset])
        unknown = np.diff(np.append(0, np.cumsum(np.isnan(found)))[offset]) > 0
        return Answers(
            ids=[name.decode() for name in file["documents/id"][:].tolist()],
            prompts=len(np.unique(group["prompt"][:])),
            lengths=lengths,
            stop_reasons=[reason.decode() for reason in group["stop_reason"][:].tolist()],
            log_probabilities=np.where(unknown, np.nan, sums / np.maximum(lengths, 1)),
            attributes=dict(group.attrs),
        )


def lengths(found: Answers, title: str) -> Drawn:
    """Draw how many answers have how many tokens, by stop reason.

    Args:
        found: The answers.
        title: Start of the figure's title.

    Returns:
        The figure, with a row for each answer.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [
        (name, int(count), reason, None if np.isnan(mean) else float(mean))
        for name, count, reason, mean in zip(
            found.ids, found.lengths, found.stop_reasons, found.log_probabilities, strict=True
        )
    ]
    columns = ("document", "answer_tokens", "stop_reason", "mean_log_probability")
    drawing, (panel,) = style.new(9, 3.6, f"{title}: lengths and ends of answers")
    longest = found.range[2]
    edges = np.arange(0.5, longest + 1 + (step := -(-longest // _BINS)), step)
    below = np.zeros(len(edges) - 1)
    reasons = np.array(found.stop_reasons)
    for reason, count in found.reasons.items():
        counts, _ = np.histogram(found.lengths[reasons == reason], edges)
        number = STOP_REASONS.index(reason)
        share = f"{reason}: {count:,} ({count / len(reasons):.0%})"
        panel.bar(
            edges[:-1], counts, step, bottom=below, align="edge", label=share, **style.bars(number)
        )
        below = below + counts
    panel.set_xlabel("tokens of the answer")
    panel.set_ylabel("answers")
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.legend(loc="outside lower center", ncols=len(found.reasons))
    return Drawn(drawing, Table(columns, rows))


@dataclass(frozen=True)
class SamplingWork:
    """What the job that finished a shard sampled.

    Attributes:
        shard: Its number.
        answers: In the shard, those of earlier jobs included.
        tokens: That the job sampled.
        alone: Tokens that were computed once more by themselves.
        seconds: Of sampling, without loading the model; 0 where earlier jobs had sampled all.
        side_by_side: How answers went side by side.
        device: That they were sampled on.
    """

    shard: int
    answers: int
    tokens: int
    alone: int
    seconds: float
    side_by_side: str
    device: str

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of sampling."""
        return self.tokens / self.seconds if self.seconds else None


def sampling_work(number: int, path: Path) -> SamplingWork:
    """Read what a shard's job sampled.

    Args:
        number: Of the shard.
        path: Of its answers.

    Returns:
        What the job sampled, with seconds.

    Raises:
        StoreError: The file is missing, damaged or another one.
    """
    answers, attributes = read_shard(path)
    return SamplingWork(
        shard=number,
        answers=len(answers),
        tokens=int(attributes["tokens_sampled"]),
        alone=int(attributes["tokens_alone"]),
        seconds=float(attributes.get("seconds_sampling", 0.0)),
        side_by_side=str(attributes["side_by_side"]),
        device=str(attributes["device"]),
    )


def sampling(works: Sequence[SamplingWork], title: str) -> Drawn:
    """Draw the speed of sampling by shard.

    Args:
        works: One entry per shard; none where another engine wrote the answers.
        title: Start of the figure's title.

    Returns:
        The figure, with a row for each shard in tokens per second.
    """
    title = f"{title}: speed of sampling by shard"
    if not any(work.seconds for work in works):
        return style.note(title, "The answers were not sampled here, or not timed.")
    columns = ("shard", "answers", "tokens_sampled", "tokens_alone", "seconds_sampling")
    table = Table(
        (*columns, "tokens_per_second", "side_by_side", "device"),
        [
            (w.shard, w.answers, w.tokens, w.alone, w.seconds, w.tokens_per_second, w.side_by_side,
             w.device)
            for w in works
        ],
    )  # fmt: skip
    drawing, (panel,) = style.new(9, 1.6 + min(0.4 * len(works), 9.6), title)
    at, values = np.arange(len(works)), style.lengths([w.tokens_per_second for w in works])
    bars = panel.barh(at, values, 0.7, **style.bars(0))
    if len(works) <= 24:
        panel.bar_label(
            bars, [f"{v:,.1f}" if v else "not timed" for v in values], padding=3, fontsize=9
        )
        panel.set_yticks(at, [str(w.shard) for w in works])
    panel.set_ylabel("shard")
    panel.invert_yaxis()
    panel.set_xlabel("tokens sampled per second")
    panel.set_xlim(0, max(1.0, 1.2 * panel.get_xlim()[1]))
    panel.grid(axis="y", visible=False)
    return Drawn(drawing, table)
