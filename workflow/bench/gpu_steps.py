"""The steps of `make gpu`: each takes a folder of its own and gives rows of figures, or is skipped
with a reason.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import theloom
import torch
import transformers
from gpu_schedule import in_turn, together
from simulated_runs import build, difference, read_rows
from support import Stages, stages
from theloom.devices import accelerator, gpu_lease, host, pinned, streams
from theloom.devices import gpu as devices_gpu
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.hooks.points import residual_points
from theloom.hooks.taps import Taps
from theloom.memory import replayed
from theloom.memory.cuda_allocator import cublas_workspace
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model import device_map
from theloom.model.forward import prefill
from theloom.model.weight_format import WeightFormat
from torch.nn import functional
from torch.nn.attention import SDPBackend
from transformers import AutoModel, LlamaConfig

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]
MIB, GIB = 1 << 20, 1 << 30

# hidden size, blocks, intermediate size, heads, heads of keys; by bytes in BF16
LLAMAS = {
    "8B": (4096, 32, 14336, 32, 8),
    "3B": (3072, 28, 8192, 24, 8),
    "1B": (2048, 16, 8192, 32, 8),
    "100M": (768, 12, 3072, 12, 4),
    "1M": (128, 4, 512, 4, 2),
}


class SkippedError(Exception):
    """The machine lacks what a step needs."""


class Step(NamedTuple):
    """What runs, and for how long at most."""

    function: Callable[[Path], Rows]
    seconds: int


def device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    kind = accelerator.kind_here()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, 0)


def _is_real(here: torch.device) -> bool:
    """Whether it is worth the time of a large problem: a GPU that is not simulated."""
    return here.type != "cpu" and not accelerator.name(here).startswith("Simulated")


def gpu(why: str) -> torch.device:
    """The machine's GPU with streams; without one the step is skipped."""
    found = device()
    if not accelerator.has_streams(found):
        raise SkippedError(f"{why}: this machine has no CUDA or ROCm GPU")
    return found


def versions(folder: Path) -> Rows:
    """The machine and what runs on it."""
    here = device()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "theloom": theloom.__version__,
        "family": accelerator.family(here),
        "device": accelerator.name(here),
        "capability": str(accelerator.capability(here) or ""),
        "GPUs": accelerator.count(here.type) if here.type != "cpu" else 0,
        "CUDA": torch.version.cuda or "",
        "host": f"{os.cpu_count()} cores, {host.memory().total / GIB:.0f} GiB",
    }
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.split()[0]
    return [{"what": name, "value": value} for name, value in found.items()]


def tests(folder: Path) -> Rows:
    """The tests that need a GPU; without one, in the simulation."""
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text("utf-8")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *map(str, sorted(files))], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [{"tests": line} for line in [*failed, lines[-1]]]


def pipeline(folder: Path) -> Rows:
    """All stages on a tiny Llama: the largest difference from the CPU's rows, by precision."""
    model, rows = _tiny(folder), []
    for precision, allowed in (("fp32", 1e-5), ("bf16", 0.05)):
        expected = read_rows(_extracted(folder / f"cpu-{precision}", model, precision, "cpu"))
        for execution in ("resident", "layerwise"):
            began = time.perf_counter()
            run = folder / f"{execution}-{precision}"
            found = read_rows(_extracted(run, model, precision, str(device()), execution))
            off = difference(found, expected)
            rows.append(
                {
                    "precision": precision,
                    "execution": execution,
                    "difference": off,
                    "allowed": allowed,
                    "equal": off <= allowed,
                    "seconds": time.perf_counter() - began,
                }
            )
    return rows


def attention(folder: Path) -> Rows:
    """Which kernel SDPA takes, what a call allocates next to what the scores alone would, and
    whether it takes longer where the keys have a new length (cuDNN may plan anew for each).
    """
    here, rows = device(), []
    tokens = 2048 if _is_real(here) else 256
    for dtype in (torch.float32, torch.bfloat16):
        for groups in (1, 4):
            for case, queries in (("causal", tokens), ("growing KV", tokens // 4)):
                q = torch.randn(1, 8, queries, 64, device=here, dtype=dtype)
                k, v = torch.randn(2, 1, 8 // groups, tokens, 64, device=here, dtype=dtype)
                mask = None
                if case != "causal":
                    positions = torch.arange(tokens - queries, tokens, device=here)[:, None]
                    mask = torch.arange(tokens, device=here)[None] <= positions
                options = {
                    "attn_mask": mask,
                    "is_causal": mask is None,
                    "enable_gqa": groups > 1,
                }
                chosen = torch._fused_sdp_choice(q, k, v, **options)
                call = partial(_attend, q, k, v, **options)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "queries per key head": groups,
                        "case": case,
                        "kernel": SDPBackend(chosen).name if chosen >= 0 else "none",
                        "allocates MB": _growth(here, call) / 1e6,
                        "output MB": q.nbytes / 1e6,
                        "scores MB": 8 * queries * tokens * dtype.itemsize / 1e6,
                        **_new_lengths(here, q, k, v, **options),
                    }
                )
    return rows


def _new_lengths(
    here: torch.device, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> dict[str, float]:
    """Milliseconds of a call, where the keys have a length that was not there before, and again."""
    found = {}
    for name in ("new length ms", "again ms"):
        began = time.perf_counter()
        for less in range(8, 0, -1):
            part = slice(None, k.shape[2] - 8 * less)
            mask = options["attn_mask"]
            cut = options | {"attn_mask": None if mask is None else mask[:, part]}
            queries = q if mask is not None else q[:, :, part]
            _attend(queries, k[:, :, part], v[:, :, part], **cut)
        accelerator.synchronize(here)
        found[name] = (time.perf_counter() - began) / 8 * 1e3
    return found


def pinning(folder: Path) -> Rows:
    """Page-locked memory: what a piece really takes, and the seconds of making it."""
    here, rows = gpu("page-locked memory"), []
    scale = min(1.0, host.memory().free / 4 / (9 * GIB))
    for size in (5 * GIB, 9 * GIB):
        size, before, began = int(size * scale), host.resident(), time.perf_counter()
        piece = pinned.pinned_empty(size, torch.uint8, here)
        rows.append(
            {
                "asked MiB": size // MIB,
                "resident MiB": (host.resident() - before) // MIB,
                "counted MiB": pinned.pinned_bytes(size) // MIB,
                "pinned": piece.is_pinned(),
                "seconds": time.perf_counter() - began,
            }
        )
        del piece
        accelerator.empty_cache(here)
    return rows


def arithmetic(folder: Path) -> Rows:
    """FP32 products against FP64 (TF32 would be wrong by 1e-3), and the switches."""
    here, rows = device(), []
    wide = torch.randn(1024, 1024, dtype=torch.float64)
    expected = wide @ wide.T
    for name, setting in (("as the machine has it", None), ("as TheLoom sets it", True)):
        if setting:
            accelerator.exact_fp32()
        narrow = wide.float().to(here)
        error = ((narrow @ narrow.T).cpu().double() - expected).abs().max() / expected.abs().max()
        rows.append({"": name, "error": float(error), **accelerator.arithmetic()})
    return rows


def llama(folder: Path) -> Rows:
    """A random Llama: memory predicted and measured, tokens/s, and MFU: FLOP/s of its blocks over
    the measured rate of a product of the same size and dtype.
    """
    here, dtype = device(), torch.bfloat16
    free = accelerator.driver_memory(here)[0] if _is_real(here) else 0
    name = next(n for n in LLAMAS if _parameters(n) * 2 < 0.6 * free or n == "1M")
    hidden, _, inner, *_ = LLAMAS[name]
    config = _config(name)
    windows, tokens = (8, 1024) if name != "1M" else (2, 128)
    kind = WeightFormat("bf16")
    traced = Traced(config)
    predicted = (
        traced.weights(kind)
        + traced.forward(kind, Workload(windows, tokens, tokens), [], device=here.type).total
    )
    held = replayed.resident(
        traced.fake(kind),
        [Workload(windows, tokens, tokens)],
        [],
        kind.precision,
        fixed=[cublas_workspace(accelerator.capability(here))] if _is_real(here) else [],
        expandable=accelerator.expandable_segments(here),
    )
    with torch.device(here):
        model = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
    ids = torch.randint(0, 32000, (windows, tokens)).to(here)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    if here.type != "cpu":
        accelerator.reset_peak(here)
    seconds = _seconds(here, forward)
    rate = _matmul_rate(here, dtype, windows * tokens, hidden, inner)
    flops = 2 * _parameters(name) * windows * tokens + _attention_flops(name, windows, tokens)
    row: dict[str, Any] = {
        "Llama": name,
        "tokens/s": windows * tokens / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "matmul TFLOP/s": rate / 1e12,
        "MFU %": 100 * flops / seconds / rate,
        "predicted MB": predicted / 1e6,
    }
    if here.type != "cpu":
        row["allocated MB"] = accelerator.peak(here) / 1e6
        row["reserved MB"] = accelerator.peak_reserved(here) / 1e6
        row["predicted reserved MB"] = held.reserved / 1e6
        row["predicted / allocated"] = predicted / accelerator.peak(here)
        if _is_real(here):
            row["idle %"] = _idle(forward, here)
    return [row]


def back_off(folder: Path) -> Rows:
    """Less memory than a batch needs: smaller batches to the end, and the same rows."""
    here = gpu("a limit of memory")
    model = _tiny(folder, intermediate_size=1 << 15, num_hidden_layers=2)  # with large segments
    options = "extraction.batch_tokens=128"
    whole, run = (
        _prepared(folder / name, model, "fp32", str(here), "resident", options)
        for name in ("whole", "limited")
    )
    devices_gpu.release(here)
    accelerator.reset_peak(here)
    whole.extract()
    whole.merge()
    limit = accelerator.peak_reserved(here) - 8 * MIB
    devices_gpu.release(here)
    rows: dict[str, Any] = {"limit MB": limit / 1e6}
    with accelerator.memory_limit(here, limit):
        try:
            run.extract()
            run.merge()
        except theloom.errors.MemoryPlanError as error:
            return [rows | {"stopped": str(error)}]
    rows["halved"] = theloom.open(run.shards[0]).metrics["oom_level"]
    rows["difference"] = difference(read_rows(run.activations), read_rows(whole.activations))
    return [rows]


def layer_by_layer(folder: Path) -> Rows:
    """Layer by layer against resident: tokens/s and the rows' difference; how often the host waits,
    by CUDA's synchronisation debug mode, and for how long for weights.
    """
    here = device()
    sizes = {"hidden_size": 1024, "intermediate_size": 4096} if _is_real(here) else {}
    model, rows, first = _tiny(folder, **sizes), [], None
    for execution in ("resident", "layerwise"):
        run = _prepared(folder / execution, model, "fp32", str(here), execution)
        watched = accelerator.has_streams(here)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with accelerator.waits_warned_of() if watched else nullcontext():
                run.extract()
        run.merge()
        metrics = theloom.open(run.shards[0]).metrics
        seconds = max(metrics["seconds_total"], 1e-9)
        found = read_rows(run.activations)
        first = first or found
        row: dict[str, Any] = {
            "execution": execution,
            "tokens/s": metrics["tokens"] / seconds,
            "waiting for weights %": 100 * metrics["seconds_waiting_for_weights"] / seconds,
            "difference": difference(found, first),
        }
        if watched:
            row["waits of the host"] = sum("synchroniz" in str(w.message) for w in caught)
        rows.append(row)
    return rows


def disk(folder: Path) -> Rows:
    """The disk: bytes/s written and synced, and read again, past the page cache where the system
    lets a program drop it.
    """
    free = shutil.disk_usage(folder.parent).free
    size = min(2 * GIB if _is_real(device()) else 64 * MIB, free // 4)
    piece, file = os.urandom(16 * MIB), folder.with_suffix(".disk")
    count = max(1, size // len(piece))
    try:
        began = time.perf_counter()
        with file.open("wb", buffering=0) as out:
            for _ in range(count):
                out.write(piece)
            os.fsync(out.fileno())
        written = time.perf_counter() - began
        with file.open("rb", buffering=0) as found:
            dropped = hasattr(os, "posix_fadvise")
            if dropped:
                os.posix_fadvise(found.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while found.read(len(piece)):
                pass
            read = time.perf_counter() - began
    finally:
        file.unlink(missing_ok=True)
    total = count * len(piece)
    return [
        {
            "MiB": total // MIB,
            "write MB/s": total / written / 1e6,
            "read MB/s": total / read / 1e6,
            "page cache dropped": dropped,
        }
    ]


def quantised(folder: Path) -> Rows:
    """8 and 4 bits, both executions: the peak of the extraction, measured and predicted."""
    model, rows = _tiny(folder, intermediate_size=128), []
    for bits in ("8bit", "4bit"):
        for execution in ("resident", "layerwise"):
            options = f"memory.quantization={bits}"
            run = folder / f"{bits}-{execution}"
            row: dict[str, Any] = {"bits": bits, "execution": execution}
            try:
                activations = _extracted(run, model, "fp32", str(device()), execution, options)
            except theloom.errors.TheLoomError as error:
                row["refused"] = str(error)
            else:
                shard = theloom.open(next((run / "shards").glob("*.h5")))
                row["peak MB"] = shard.metrics["peak_memory"] / 1e6
                row["predicted MB"] = shard.metrics["predicted_memory"] / 1e6
                row["rows"] = len(theloom.open(activations))
            rows.append(row)
    return rows


def several_gpus(folder: Path) -> Rows:
    """One model over all GPUs: rows against the CPU's, then a random Llama's tokens/s with all GPUs
    at work and with one after the other, next to the gain that the schedule simulator predicts from
    each GPU's seconds.
    """
    here = gpu("several GPUs")
    count = accelerator.count(here.type)
    if count < 2:
        raise SkippedError("several GPUs for one model: this machine has one")
    tiny = _tiny(folder)
    expected = read_rows(_extracted(folder / "cpu", tiny, "fp32", "cpu"))
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    environment = {"SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": names}  # as a scheduler gives them
    with mock.patch.dict(os.environ, environment), gpu_lease.gpus(count, device=here.type):
        found = read_rows(_extracted(folder / "gpus", tiny, "fp32", here.type))
    free = accelerator.driver_memory(here)[0] if _is_real(here) else 0
    name = next(n for n in LLAMAS if _parameters(n) * 2 < 0.6 * free or n == "1M")
    gpus = [torch.device(here.type, number) for number in range(count)]
    windows, tokens, batches = (2, 1024, 32) if free else (2, 128, 4)
    model = _over(name, gpus)
    ids = torch.randint(0, 32000, (windows, tokens))
    forward, parts, alone = _passes(model, gpus, ids)
    seconds = {}
    for how in ("in turn", "together"):
        began = time.perf_counter()
        for _ in range(batches):
            forward()
            if how == "in turn":
                _all_done(gpus)
        _all_done(gpus)
        seconds[how] = time.perf_counter() - began
    copy = max(0.0, alone - sum(parts)) / (count - 1)
    predicted = together(parts, batches, copy)
    rates = {f"tokens/s {how}": batches * ids.numel() / s for how, s in seconds.items()}
    return [
        {"GPUs": count, "Llama": name, "difference of rows": difference(found, expected)}
        | rates
        | {
            "gain": seconds["in turn"] / seconds["together"],
            "gain predicted": in_turn(parts, batches, copy).seconds / predicted.seconds,
            "bubble predicted %": 100 * predicted.bubble,
            "copy ms": 1000 * copy,
        }
    ]


def sanitizer(folder: Path) -> Rows:
    """compute-sanitizer's memory check of the tiny run."""
    gpu("compute-sanitizer")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise SkippedError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    script = f"import gpu_steps, pathlib; gpu_steps.pipeline(pathlib.Path({str(folder)!r}))"
    done = subprocess.run(
        [tool, "--tool", "memcheck", sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return [{"memcheck": summary[-1] if summary else done.stderr.strip()[-200:]}]


STEPS = {
    "versions": Step(versions, 25),
    "tests": Step(tests, 100),
    "pipeline": Step(pipeline, 80),
    "attention": Step(attention, 40),
    "pinning": Step(pinning, 30),
    "arithmetic": Step(arithmetic, 20),
    "llama": Step(llama, 80),
    "back-off": Step(back_off, 40),
    "layer by layer": Step(layer_by_layer, 40),
    "disk": Step(disk, 20),
    "quantised": Step(quantised, 50),
    "several GPUs": Step(several_gpus, 40),
    "sanitizer": Step(sanitizer, 35),
}


def _config(name: str) -> LlamaConfig:
    hidden, blocks, inner, heads, key_heads = LLAMAS[name]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
    )


def _over(name: str, gpus: list[torch.device]) -> Architecture:
    """A random Llama cut to GPUs of equal size, as `load_model` places one."""
    with torch.device(gpus[0]):
        model = AutoModel.from_config(_config(name), dtype=torch.bfloat16).eval()
    described = find_blocks(model.requires_grad_(False))
    equal = [4 * _parameters(name) + (1 << 30)] * len(gpus)
    cut = device_map.cut_to(described, WeightFormat("bf16"), equal)
    places = {module: gpus[number] for module, number in cut.items()}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module, one in places.items():
            model.get_submodule(module).to(one)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    device_map.keep_all_busy(model, places)
    return described


def _passes(
    described: Architecture, gpus: list[torch.device], ids: torch.Tensor
) -> tuple[Callable[[], None], list[float], float]:
    """A pass to the last block, each GPU's seconds of one, and those of it all."""
    point = residual_points(len(described.blocks), described.hidden_size)[-1]
    begun: dict[torch.device, streams.Mark] = {}

    def begin(block: Any, _: Any) -> None:
        here = next(block.parameters()).device
        if here not in begun:
            begun[here] = streams.mark(here, timing=True)

    def forward() -> None:
        with Taps(described, [point], lambda name, value: None) as taps:
            prefill(taps, pinned.pinned_copy(ids, gpus[0]), ids.shape[1])

    forward()
    _all_done(gpus)
    hooks = [block.register_forward_pre_hook(begin) for block in described.blocks]
    began = time.perf_counter()
    forward()
    ends = [streams.mark(one, timing=True) for one in gpus]
    _all_done(gpus)
    seconds = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    parts = [max(1e-9, begun[g].seconds_to(end)) for g, end in zip(gpus, ends, strict=True)]
    return forward, parts, seconds


def _all_done(gpus: list[torch.device]) -> None:
    for one in gpus:
        accelerator.synchronize(one)


def _tiny(folder: Path, **numbers: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return build(folder, **numbers)


def _prepared(
    folder: Path,
    model: Path,
    precision: str,
    where: str,
    execution: str = "resident",
    options: str = "",
) -> Stages:
    run = stages(
        folder,
        model,
        f"extraction.device={where} extraction.execution={execution} extraction.shards=1 "
        f"memory.precision_mode={precision} memory.streaming_chunk_size=32 corpus=text "
        f"corpus.path={model.parent / 'corpus.jsonl'} {options}",
    )
    run.prepare()
    return run


def _extracted(*run: Any) -> Path:
    made = _prepared(*run)
    made.extract()
    made.merge()
    return made.activations


@torch.inference_mode()
def _attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(*tensors, **options)


def _parameters(name: str) -> int:
    """Of the blocks."""
    hidden, blocks, inner, heads, key_heads = LLAMAS[name]
    return blocks * int(2 * hidden * hidden * (1 + key_heads / heads) + 3 * hidden * inner)


def _matmul_rate(here: torch.device, dtype: torch.dtype, rows: int, inner: int, out: int) -> float:
    """FLOP/s of one product."""
    x = torch.randn(rows, inner, device=here, dtype=dtype)
    w = torch.randn(inner, out, device=here, dtype=dtype)
    return 2 * rows * inner * out / _seconds(here, lambda: x @ w)


def _attention_flops(name: str, windows: int, tokens: int) -> float:
    """Of scores and their product with the values, half of them masked."""
    hidden, blocks, *_ = LLAMAS[name]
    return 2 * blocks * windows * tokens * tokens * hidden


def _growth(here: torch.device, call: Callable[[], Any]) -> float:
    """Bytes at the peak of a call beyond those before; NaN where nothing counts them."""
    if here.type == "cpu":
        return float("nan")
    call()
    accelerator.reset_peak(here)
    before = accelerator.allocated(here)
    call()
    accelerator.synchronize(here)
    return float(accelerator.peak(here) - before)


def _seconds(here: torch.device, call: Callable[[], Any]) -> float:
    """The median of three calls, after one that warms up."""
    call()
    found = []
    for _ in range(3):
        accelerator.synchronize(here)
        began = time.perf_counter()
        call()
        accelerator.synchronize(here)
        found.append(time.perf_counter() - began)
    return sorted(found)[1]


def _idle(call: Callable[[], Any], device: torch.device) -> float:
    """Percent of a call's time in which no kernel ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        call()
        accelerator.synchronize(device)
        seconds = time.perf_counter() - began
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return 100 * max(0.0, 1 - busy / seconds)
