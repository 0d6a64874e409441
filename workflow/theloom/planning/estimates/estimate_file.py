"""What is known of a run before anything is loaded, and `estimate.h5`, which holds it."""

import json
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from theloom.config.frozen import to_plain
from theloom.config.schema import Config
from theloom.memory.sizes import PeakBytes
from theloom.planning import answers_plan
from theloom.planning.answers_plan import AnswersSize
from theloom.store import file_format, provenance
from theloom.store.hdf5.output import written


@dataclass(frozen=True)
class Pass:
    """The forward pass of one window. A batch of n windows takes n times the bytes.

    Args:
        tokens: of the window.
        chunk_size: tokens of one step.
        parts: bytes at the peak, with hook points written as they come.
    """

    tokens: int
    chunk_size: int
    parts: PeakBytes


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before anything is loaded.

    Sizes are bytes. Dicts map a weight format (fp32, fp16, bf16, int8, int4, …) to bytes.
    """

    model_type: str
    attention: str
    device: str  # cpu or cuda: whose kernels the trace assumes
    context_length: int  # tokens of the longest window
    chunk_size: int  # requested
    batch_tokens: int | None  # requested; None: the plan chooses
    cache: str  # place of the KV cache of long documents: auto, device or offloaded
    threshold: float  # share of the device's memory that may be in use
    blocks: int  # that run: up to the deepest hook point
    hooks: list[str]
    weights: dict[str, int]  # loaded: up to the deepest hook point
    load_peak: dict[str, int]
    passes: dict[str, list[Pass]]
    largest_capture: dict[str, int]  # per token: the largest requested hook point, as stored
    row_bytes: dict[str, int]  # of a row's hidden states on disk, by precision of the store
    host: dict[str, int]  # resident memory of a job that holds the model
    rows: int | None  # that are stored at most; None: nothing bounds them
    token_bytes: int  # of the tables on disk, for each token
    table_bytes: int  # of all tables; where nothing bounds the tokens, of as many as there are rows
    store: str = "auto"  # store.dtype, as requested
    kept_of_window: int | None = None  # rows at most; None: any number of them
    # of sampling, by weight format; empty: the run's own model samples no answers
    answers: dict[str, AnswersSize] = field(default_factory=dict)
    answers_batch: int | None = None  # requested
    answers_tokens: int | None = None  # sampled at most; None: nothing bounds them
    answers_disk: int | None = None  # bytes of answers.h5 and of its shards' files, at most
    answers_seconds: dict[str, int] = field(default_factory=dict)  # of one job for all, at least

    def disk_bytes(self, store_precision: str) -> int | None:
        """Bytes of all shards together.

        Args:
            store_precision: of the stored rows: fp32, fp16, bf16, fp8_e4m3 or int8.

        Returns:
            Bytes; None if the number of rows is unknown.
        """
        if self.rows is None:
            return None
        return self.rows * self.row_bytes[store_precision] + self.table_bytes

    def find(self, kind: str, tokens: int, chunk_size: int) -> PeakBytes:
        """Bytes of one window, scaled from the smallest predicted pass that covers it.

        Args:
            kind: name of the weight format.
            tokens: of the window.
            chunk_size: tokens of one step.

        Returns:
            Bytes at the peak; from the longest single pass if no predicted pass covers the window.
        """
        for candidate in sorted(self.passes[kind], key=lambda p: p.tokens):
            if candidate.tokens >= tokens and candidate.chunk_size == chunk_size:
                return candidate.parts.times(tokens / candidate.tokens)
        one_pass = max(
            (p for p in self.passes[kind] if p.tokens <= p.chunk_size), key=lambda p: p.tokens
        )
        return one_pass.parts.times(tokens / one_pass.tokens)


_BY_KIND = (
    "weights",
    "load_peak",
    "host",
    "largest_capture",
    "row_bytes",
)

_SINGLE = (
    "model_type",
    "attention",
    "device",
    "context_length",
    "chunk_size",
    "cache",
    "threshold",
    "blocks",
    "store",
    "token_bytes",
    "table_bytes",
)
_OPTIONAL = (
    "rows",
    "batch_tokens",
    "answers_batch",
    "answers_tokens",
    "answers_disk",
    "kept_of_window",
)

_PASS = np.dtype(
    [(name, "<i8") for name in ("tokens", "chunk_size", *(f.name for f in fields(PeakBytes)))]
)


def write(estimate: Estimate, config: Config, output: Path) -> None:
    """Write `estimate.h5`.

    Args:
        estimate: what to write.
        config: the run's config, recorded as provenance.
        output: path of the file.
    """
    with written(output) as file:
        values = {name: getattr(estimate, name) for name in _SINGLE}
        file_format.set_attributes(
            file,
            provenance.attributes(
                "estimate", config=to_plain(config), hooks=estimate.hooks, **values
            ),
        )
        file_format.set_attributes(
            file, {n: v for n in _OPTIONAL if (v := getattr(estimate, n)) is not None}
        )
        for name in _BY_KIND:
            file_format.set_attributes(file.create_group(name), getattr(estimate, name))
        answers_plan.write(file, estimate.answers)
        for kind, seconds in estimate.answers_seconds.items():
            file[f"answers/{kind}"].attrs["seconds"] = seconds
        for kind, passes in estimate.passes.items():
            file[f"passes/{kind}"] = np.array(
                [(p.tokens, p.chunk_size, *astuple(p.parts)) for p in passes], _PASS
            )


def read(path: Path) -> Estimate:
    """Read `estimate.h5`.

    Args:
        path: of the file.

    Returns:
        The estimate, equal to the one that was written.
    """
    with file_format.open_h5(path, "estimate") as file:
        single: dict[str, Any] = {
            name: _plain(file.attrs.get(name)) for name in (*_SINGLE, *_OPTIONAL)
        }
        for name in ("token_bytes", "table_bytes"):  # none in files of earlier versions
            single[name] = single[name] or 0
        by_kind: dict[str, Any] = {
            name: {kind: int(value) for kind, value in file[name].attrs.items()}
            for name in _BY_KIND
        }
        passes = {
            kind: [
                Pass(int(row[0]), int(row[1]), PeakBytes(*(int(n) for n in list(row)[2:])))
                for row in rows[:]
            ]
            for kind, rows in file["passes"].items()
        }
        return Estimate(
            hooks=json.loads(file.attrs["hooks"]),
            passes=passes,
            answers=answers_plan.read(file),
            answers_seconds={
                kind: int(group.attrs["seconds"])
                for kind, group in (file["answers"].items() if "answers" in file else ())
                if "seconds" in group.attrs
            },
            **single,
            **by_kind,
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | float | None) else int(value)
