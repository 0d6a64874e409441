"""The device of a run: which one, what it can do, how much memory it has and how much of it is in use."""

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from theloom.errors import ConfigError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def choose_device(asked: str) -> "torch.device":
    """The device of `extraction.device`: auto, cpu, cuda or cuda:N. Raises ConfigError where there is no such GPU."""
    import torch

    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(asked.partition(":")[2] or 0)
    if index >= count:
        found = f"{count} CUDA GPUs" if torch.backends.cuda.is_built() else "a CPU build of torch"
        raise ConfigError(f"extraction.device: {asked} is not there, found {found}; set extraction.device=cpu or auto")
    return torch.device("cuda", index)


def compute_capability(device: "torch.device") -> tuple[int, int] | None:
    """The CUDA compute capability, None for the CPU."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def device_name(device: "torch.device") -> str:
    """What provenance records: the GPU's name, or the number of CPU threads that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of the device's memory: the whole, what is free for this process, what is in use by anyone."""

    total: int
    free: int

    @property
    def used(self) -> int:
        return self.total - self.free


def device_memory(device: "torch.device") -> DeviceMemory:
    """The memory of a GPU; for the CPU that of the host, or of the cgroup where that is less."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free)
    host = psutil.virtual_memory()
    total, free = host.total, host.available
    for limit, usage in _cgroup_files():
        try:
            most = int(limit.read_text())
            left = most - int(usage.read_text())
        except (OSError, ValueError):  # no such cgroup version, or "max": no limit
            continue
        total, free = min(total, most), min(free, left)
    return DeviceMemory(total, max(free, 0))


def _cgroup_files() -> list[tuple[Path, Path]]:
    root = Path("/sys/fs/cgroup")
    return [
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ]


def warn_above(threshold: float, device: "torch.device") -> bool:
    """Log a warning, and say True, if more than `threshold` (a share) of the device's memory is in use, by anyone."""
    memory = device_memory(device)
    share = memory.used / memory.total
    if share > threshold:
        log.warning(
            "%s memory: %.1f%% in use (%.2f of %.2f GB), above memory_warning_threshold=%.2f",
            device,
            100 * share,
            memory.used / 1e9,
            memory.total / 1e9,
            threshold,
        )
    return share > threshold


class PeakMemory:
    """Peak growth of memory within a `with` block, in bytes: of the device (CUDA), or of this process (CPU).

    On CUDA it is torch's allocator's own peak. On the CPU resident memory is sampled every 2 ms, and where the kernel
    lets a process reset its high-water mark (Linux: 5 into /proc/self/clear_refs), the mark is read as well.
    """

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.growth = 0

    def __enter__(self) -> "PeakMemory":
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._process = psutil.Process(os.getpid())
        self._before = self._peak = self._process.memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._marked = True
        except OSError:
            self._marked = False
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.growth = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._stop.set()
        self._sampler.join()
        if self._marked:
            self._peak = max(self._peak, _high_water_mark())
        self.growth = self._peak - self._before

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
