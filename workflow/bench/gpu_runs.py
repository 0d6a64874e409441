"""Steps of `make gpu`: TheLoom's own stages and tests on the machine's GPU."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import theloom
from gpu_machine import MIB, Rows, SkippedError, device, gpu, is_real
from simulated_runs import build, difference, read_rows
from support import Stages, stages
from theloom.devices import accelerator
from theloom.devices import gpu as devices_gpu

ROOT = Path(__file__).parents[2]
DIFFERENCE = "difference / largest value"
FP32, BF16 = 1e-5, 0.05  # what it may be
# of a model that is worth the time of a real GPU
LARGER = {"hidden_size": 1024, "intermediate_size": 4096}

# of compute-sanitizer
SCRIPT = """
import pathlib, sys, gpu_runs
folder, device = pathlib.Path(sys.argv[1]), sys.argv[2]
gpu_runs.extracted(folder, gpu_runs.tiny(folder), "fp32", device)
"""


def tests(folder: Path) -> Rows:
    """The tests that need a GPU; without one, in the simulation."""
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text("utf-8")]
    options = ["-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(files))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [{"tests": line, "right": not done.returncode} for line in [*failed, lines[-1]]]


def pipeline(folder: Path) -> Rows:
    """All stages on a tiny Llama: the largest difference from the CPU's rows, by precision."""
    model, rows = tiny(folder), []
    for precision, allowed in (("fp32", FP32), ("bf16", BF16)):
        expected = read_rows(extracted(folder / f"cpu-{precision}", model, precision, "cpu"))
        for execution in ("resident", "layerwise"):
            began = time.perf_counter()
            run = folder / f"{execution}-{precision}"
            found = read_rows(extracted(run, model, precision, str(device()), execution))
            off = difference(found, expected)
            rows.append(
                {
                    "precision": precision,
                    "execution": execution,
                    DIFFERENCE: off,
                    "allowed": allowed,
                    "right": off <= allowed,
                    "seconds": time.perf_counter() - began,
                }
            )
    return rows


def back_off(folder: Path) -> Rows:
    """Less memory than a batch needs: smaller batches to the end, and the same rows."""
    here = gpu("a limit of memory")
    model = tiny(folder, intermediate_size=1 << 15, num_hidden_layers=2)  # with large segments
    options = "extraction.batch_tokens=128"
    whole, run = (
        prepared(folder / name, model, "fp32", str(here), "resident", options)
        for name in ("whole", "limited")
    )
    devices_gpu.release(here)
    accelerator.reset_peak(here)
    whole.extract()
    whole.merge()
    limit = accelerator.peak_reserved(here) - 8 * MIB
    devices_gpu.release(here)
    row: dict[str, Any] = {"limit MB": limit / 1e6}
    with accelerator.memory_limit(here, limit):
        try:
            run.extract()
            run.merge()
        except theloom.errors.MemoryPlanError as error:
            return [row | {"stopped": str(error), "right": False}]
    off = difference(read_rows(run.activations), read_rows(whole.activations))
    halved = theloom.open(run.shards[0]).metrics["oom_level"]
    return [row | {"times halved": halved, DIFFERENCE: off, "right": off <= FP32 and halved > 0}]


def layer_by_layer(folder: Path) -> Rows:
    """Layer by layer against resident: tokens/s and the rows' difference; how often the host waits,
    by CUDA's synchronisation debug mode, and for how long for weights.
    """
    here, rows, first = device(), [], None
    real, watched = is_real(here), accelerator.has_streams(here)
    model = tiny(folder, copies=100 if real else 1, **LARGER if real else {})
    options = "corpus.max_tokens=null extraction.batch_tokens=4096" if real else ""
    prepared(folder / "warm-up", model, "fp32", str(here)).extract()
    for execution in ("resident", "layerwise"):
        run = prepared(folder / execution, model, "fp32", str(here), execution, options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with accelerator.waits_warned_of() if watched else nullcontext():
                run.extract()
        run.merge()
        metrics = theloom.open(run.shards[0]).metrics
        seconds = max(metrics["seconds_total"], 1e-9)
        found = read_rows(run.activations)
        first = first or found
        off = difference(found, first)
        row: dict[str, Any] = {
            "execution": execution,
            "tokens": int(metrics["tokens"]),
            "tokens/s": metrics["tokens"] / seconds,
            "waiting for weights %": 100 * metrics["seconds_waiting_for_weights"] / seconds,
        }
        if watched:
            row["waits of the host"] = sum("synchroniz" in str(w.message) for w in caught)
        rows.append(row | {DIFFERENCE: off, "right": off <= FP32})
    return rows


def quantised(folder: Path) -> Rows:
    """8 and 4 bits, both executions: the extraction's peak, measured and as the plan allows for it,
    and the rows' difference between the two.
    """
    here, rows = str(device()), []
    model = tiny(folder, **LARGER if is_real(device()) else {"intermediate_size": 128})
    for bits in ("8bit", "4bit"):
        resident = None
        for execution in ("resident", "layerwise"):
            row: dict[str, Any] = {"bits": bits, "execution": execution}
            options, place = f"memory.quantization={bits}", folder / f"{bits}-{execution}"
            try:
                activations = extracted(place, model, "fp32", here, execution, options)
            except theloom.errors.TheLoomError as error:
                rows.append(row | {"refused": str(error)})
                continue
            (shard,) = (place / "shards").glob("*.h5")
            metrics, found = theloom.open(shard).metrics, read_rows(activations)
            resident = resident or found
            off = difference(found, resident)
            row["peak MB"] = metrics["peak_memory"] / 1e6
            row["planned MB"] = metrics["predicted_memory"] / 1e6
            rows.append(row | {DIFFERENCE: off, "right": off <= FP32})
    return rows


def sanitizer(folder: Path) -> Rows:
    """compute-sanitizer's memory check of an extraction from a tiny Llama."""
    here = gpu("compute-sanitizer")
    if not is_real(here):
        raise SkippedError("compute-sanitizer: it looks at kernels, and this GPU is simulated")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise SkippedError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [tool, "--tool", "memcheck", sys.executable, "-c", SCRIPT, str(folder), str(here)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    right = not done.returncode and bool(summary) and "SUMMARY: 0 errors" in summary[-1]
    return [{"memcheck": (summary or [done.stderr.strip()[-200:]])[-1], "right": right}]


def tiny(folder: Path, copies: int = 1, **numbers: int) -> Path:
    """A Llama of four blocks, and a corpus of so many times the same documents next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    model, corpus = build(folder, **numbers), folder / "corpus.jsonl"
    corpus.write_text(copies * corpus.read_text("utf-8"), "utf-8")
    return model


def prepared(
    folder: Path,
    model: Path,
    precision: str,
    where: str,
    execution: str = "resident",
    options: str = "",
) -> Stages:
    """A run before its extraction."""
    run = stages(
        folder,
        model,
        f"extraction.device={where} extraction.execution={execution} extraction.shards=1 "
        f"memory.precision_mode={precision} memory.streaming_chunk_size=32 corpus=text "
        f"corpus.path={model.parent / 'corpus.jsonl'} {options}",
    )
    run.prepare()
    return run


def extracted(*run: Any) -> Path:
    """The rows of a run, as `prepared` takes it."""
    made = prepared(*run)
    made.extract()
    made.merge()
    return made.activations
