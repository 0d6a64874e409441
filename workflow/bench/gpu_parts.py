"""Steps of `make gpu`: what parts of the machine do, each by itself."""

import os
import platform
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import theloom
import torch
import transformers
from gpu_machine import GIB, MIB, Rows, device, gpu, growth, is_real
from theloom import terminal
from theloom.devices import accelerator, host, pinned
from torch.nn import functional
from torch.nn.attention import SDPBackend


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
        "capability": terminal.capability(accelerator.capability(here)),
        "GPUs": accelerator.count(here.type) if here.type != "cpu" else 0,
        "CUDA": torch.version.cuda or "none",
        "host": f"{os.cpu_count()} cores, {host.memory().total / GIB:.0f} GiB",
    }
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        found["driver"] = said[0] if said else "none that answers"
    return [{"what": name, "value": value} for name, value in found.items()]


def attention(folder: Path) -> Rows:
    """Which kernel SDPA takes, what a call allocates next to what the scores alone would, and
    whether it takes longer where the keys have a new length (cuDNN may plan anew for each).
    """
    here, rows = device(), []
    tokens = 2048 if is_real(here) else 256
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
                row = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "queries per key head": groups,
                    "case": case,
                    "kernel": SDPBackend(chosen).name if chosen >= 0 else "none",
                }
                if here.type != "cpu":  # which nothing counts
                    row["allocates MB"] = growth(here, call) / 1e6
                row |= {
                    "output MB": q.nbytes / 1e6,
                    "scores MB": 8 * queries * tokens * dtype.itemsize / 1e6,
                    **_new_lengths(here, q, k, v, **options),
                }
                rows.append(row)
    return rows


def _new_lengths(
    here: torch.device, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> dict[str, float]:
    """Milliseconds of a call, where the keys have a length that was not there before, and again."""
    _attend(q, k, v, **options)  # the full length, to warm up
    accelerator.synchronize(here)
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


@torch.inference_mode()
def _attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(*tensors, **options)


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
        off = ((narrow @ narrow.T).cpu().double() - expected).abs().max() / expected.abs().max()
        row: dict[str, Any] = {"switches": name, "largest error / largest value": float(off)}
        if setting:
            row["right"] = bool(off < 1e-5)
        rows.append(row | accelerator.arithmetic())
    return rows


def disk(folder: Path) -> Rows:
    """The disk: bytes/s written and synced, and read again, past the page cache where the system
    lets a program drop it.
    """
    free = shutil.disk_usage(folder.parent).free
    size = min(2 * GIB if is_real(device()) else 64 * MIB, free // 4)
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
