"""Runs of the pipeline on simulated GPUs, whose rows are compared with those of the CPU."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import theloom
import torch
from simulated_cuda import World, simulated
from support import Stages, build_tiny, stages, with_bytes
from theloom.devices import gpu_lease

Rows = dict[str, torch.Tensor]

SMALL = (
    "memory.precision_mode=fp32 extraction.shards=1 extraction.batch_tokens=128 "
    "memory.streaming_chunk_size=32 corpus=text"
)
LENGTHS = (90, 20, 17, 12, 41, 5)  # long documents go in chunks, short ones side by side


def build(folder: Path, model_type: str = "llama", **numbers: int) -> Path:
    """A tiny model of four blocks that takes bytes, and a corpus next to it."""
    numbers = {"vocab_size": 384, "num_hidden_layers": 4, **numbers}
    model = with_bytes(build_tiny(model_type, folder / "model", **numbers))
    texts = [chr(97 + n) * (length - 1) + "." for n, length in enumerate(LENGTHS)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model


@dataclass(frozen=True)
class Prepared:
    """A run before its extraction: estimate, tokens and the model's record."""

    folder: Path
    gpus: int = 0
    leased: bool | None = None  # None: where there are several

    def again(self, folder: Path) -> "Extraction":
        """A copy of it to extract in."""
        shutil.copytree(self.folder, folder)
        return Extraction(Stages(folder), self.gpus, self.leased)


@dataclass(frozen=True)
class Extraction:
    """An extraction on simulated GPUs."""

    run: Stages
    gpus: int
    leased: bool | None = None

    def rows(self, verified: bool = False, **simulation: Any) -> Rows:
        """Extract, from where an earlier call was stopped, and read the rows."""
        with machine(self.gpus, self.leased, **simulation):
            self.run.extract()
        self.run.merge()
        if verified:
            with machine(self.gpus, self.leased, **simulation):
                self.run.verify()
        return read_rows(self.run.activations)


def prepare(
    folder: Path, model: Path, overrides: str, gpus: int = 0, leased: bool | None = None
) -> Prepared:
    """All stages before the extraction; on simulated GPUs, unless they are none."""
    device = "" if "extraction.device=" in overrides else "extraction.device=cuda"
    corpus = f"corpus.path={model.parent / 'corpus.jsonl'}"
    requested = {o.partition("=")[0] for o in overrides.split()}
    small = " ".join(o for o in SMALL.split() if o.partition("=")[0] not in requested)
    run = stages(folder, model, f"{small} {corpus} {device if gpus else ''} {overrides}")
    with machine(gpus, leased):
        run.prepare()
    return Prepared(folder, gpus, leased)


def cpu_rows(folder: Path, model: Path, overrides: str = "") -> Rows:
    """The rows of the same run on the CPU."""
    run = prepare(folder, model, overrides).again(folder.with_name(folder.name + "-rows")).run
    run.extract()
    run.merge()
    return read_rows(run.activations)


def read_rows(activations: Path) -> Rows:
    """All rows of a finished run, by hook point."""
    opened = theloom.open(activations)
    return {hook: opened[hook][slice(0, len(opened))].float() for hook in opened.hooks}


@contextmanager
def machine(gpus: int, leased: bool | None = None, **simulation: Any) -> Iterator[World | None]:
    """Simulated GPUs, all held by this job as a scheduler gives them; none: the CPU."""
    with ExitStack() as stack:
        if not gpus:
            yield None
            return
        world = stack.enter_context(simulated(devices=gpus, **simulation))
        if gpus > 1 if leased is None else leased:
            environment = stack.enter_context(pytest.MonkeyPatch.context())
            environment.setenv("SLURM_JOB_ID", "1")
            environment.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
            stack.enter_context(gpu_lease.gpus(gpus, device="cuda"))
        yield world


def difference(found: Rows, expected: Rows) -> float:
    """The largest difference as a share of the largest value of a hook point; inf where a row is
    not there or not a number.
    """
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for hook, values in expected.items():
        if found[hook].shape != values.shape or not found[hook].isfinite().all():
            return float("inf")
        worst = max(worst, float((found[hook] - values).abs().max() / values.abs().max()))
    return worst
