"""`make gpu`: what only a real GPU can show, in at most ten minutes and without a network.

Each step runs in a process of its own with a time limit of its own, to which comes what the steps
before it have left; one that fails or takes too long costs the others nothing. A step that needs
what the machine lacks says so and is skipped. Writes a page and its figures: results/gpu.md and
results/gpu.json.
"""

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the cores to others

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # tiny models and their rows

import gpu_steps
import torch
from gpu_machine import SkippedError

ROOT = Path(__file__).parents[2]
SECONDS = 600  # of all steps


@dataclass
class Outcome:
    """What a step showed. `state` is done, skipped, wrong (a figure is), failed or timed out."""

    step: str
    what: str
    state: str
    seconds: float
    words: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(step: str, folder: Path, limit: float, simulated: bool = False) -> Outcome:
    """One step in a process of its own."""
    what = " ".join((gpu_steps.STEPS[step].function.__doc__ or "").split())
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--step", step, "--folder", str(folder)]
        + ["--simulated"] * simulated,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(step, what, "timed out", limit, f"no end within {limit:.0f} s")
    seconds = time.perf_counter() - began
    last = (out.strip().splitlines() or [""])[-1]
    if process.returncode or not last.startswith("{"):
        reason = (errors.strip().splitlines() or [f"exit {process.returncode}"])[-1]
        return Outcome(step, what, "failed", seconds, reason)
    return Outcome(step, what, seconds=seconds, **json.loads(last))


def alone(step: str, folder: Path, simulated: bool = False) -> dict[str, Any]:
    """The body of a step's process."""
    try:
        with simulated_gpu() if simulated else nullcontext():
            rows = gpu_steps.STEPS[step].function(folder)
    except SkippedError as reason:
        return {"state": "skipped", "words": str(reason)}
    state = "done" if all(row.get("right", True) for row in rows) else "wrong"
    return {"state": state, "rows": [{n: _plain(v) for n, v in row.items()} for row in rows]}


def _plain(value: Any) -> Any:
    """A value that JSON has: infinity, which says that rows are not numbers, it has not."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Two simulated GPUs, to try the battery out where there is none: no speed means anything."""
    import simulated_cuda

    with suppress(ImportError):  # before the simulation, which stands in for a part of it
        importlib.import_module("bitsandbytes")
    torch.set_num_threads(1)  # tiny products, for which threads would wait for each other
    with simulated_cuda.simulated(devices=2, policy="random"):
        yield


def page(outcomes: list[Outcome], simulated: bool = False) -> str:
    """The results as Markdown."""
    parts = ["# What this machine's GPU shows", ""]
    if simulated:
        parts += ["The GPU is simulated: rows and bytes are to be right, speeds mean nothing.", ""]
    elif any(row == {"what": "family", "value": "cpu"} for o in outcomes for row in o.rows):
        parts += ["There is none: the steps ran on the CPU where they can.", ""]
    rows = [[o.step, o.state, f"{o.seconds:.0f}", o.words] for o in outcomes]
    parts += markdown(rows, ["step", "state", "seconds", "why"])
    for outcome in outcomes:
        if outcome.rows:
            names = list(dict.fromkeys(name for row in outcome.rows for name in row))
            cells = [[_cell(row.get(name, "")) for name in names] for row in outcome.rows]
            parts += ["", f"## {outcome.step}", "", outcome.what, "", *markdown(cells, names)]
    return "\n".join(parts) + "\n"


def markdown(rows: list[list[str]], names: list[str]) -> list[str]:
    """The lines of a table."""
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Run all steps, or those that are named."""
    parser = argparse.ArgumentParser(prog="python workflow/bench/gpu.py", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=gpu_steps.STEPS, help="these steps alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all steps together")
    parser.add_argument("--output", type=Path, default=ROOT / "results/gpu")
    parser.add_argument("--step", choices=gpu_steps.STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--simulated", action="store_true", help="try the steps out on a simulated GPU"
    )
    requested = parser.parse_args()
    if requested.step:
        print(json.dumps(alone(requested.step, requested.folder, requested.simulated)))
        return
    outcomes: list[Outcome] = []
    names, scale = list(requested.only or gpu_steps.STEPS), requested.seconds / SECONDS
    limits = [scale * gpu_steps.STEPS[name].seconds for name in names]
    end = time.monotonic() + sum(limits)
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            limit = end - time.monotonic() - sum(limits[number + 1 :])  # with what others left
            place = Path(folder) / name.replace(" ", "-")
            outcomes.append(run(name, place, limit, requested.simulated))
            words = f": {outcomes[-1].words}" if outcomes[-1].words else ""
            print(f"{name}: {outcomes[-1].state}{words}", flush=True)
    requested.output.parent.mkdir(parents=True, exist_ok=True)
    requested.output.with_suffix(".md").write_text(
        page(outcomes, requested.simulated), encoding="utf-8"
    )
    figures = json.dumps([asdict(o) for o in outcomes], indent=1, allow_nan=False)
    requested.output.with_suffix(".json").write_text(figures + "\n", encoding="utf-8")
    print(f"next: open {requested.output.with_suffix('.md')}")
    if bad := [o.step for o in outcomes if o.state not in ("done", "skipped")]:
        sys.exit(f"not as it should be: {', '.join(bad)}")


if __name__ == "__main__":
    main()
