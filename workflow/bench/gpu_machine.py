"""What the steps of `make gpu` know of the machine, and how they measure."""

import time
from collections.abc import Callable
from typing import Any

import torch
from theloom.devices import accelerator

Rows = list[dict[str, Any]]
MIB, GIB = 1 << 20, 1 << 30


class SkippedError(Exception):
    """The machine lacks what a step needs."""


def device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    kind = accelerator.kind_here()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, 0)


def is_real(here: torch.device) -> bool:
    """Whether it is worth the time of a large problem: a GPU that is not simulated."""
    return here.type != "cpu" and not accelerator.name(here).startswith("Simulated")


def gpu(why: str) -> torch.device:
    """The machine's GPU with streams; without one the step is skipped."""
    found = device()
    if not accelerator.has_streams(found):
        raise SkippedError(f"{why}: this machine has no CUDA or ROCm GPU")
    return found


def growth(here: torch.device, call: Callable[[], Any]) -> float:
    """Bytes of a GPU at the peak of a call beyond those before."""
    call()
    accelerator.synchronize(here)
    accelerator.reset_peak(here)
    before = accelerator.allocated(here)
    call()
    accelerator.synchronize(here)
    return float(accelerator.peak(here) - before)


def seconds(here: torch.device, call: Callable[[], Any]) -> float:
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


def idle(here: torch.device, call: Callable[[], Any]) -> float:
    """Percent of a call's time in which no kernel ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        call()
        accelerator.synchronize(here)
        taken = time.perf_counter() - began
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return 100 * max(0.0, 1 - busy / taken)
