"""How much memory a piece of work takes at its peak."""

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from theloom.devices import accelerator, gpu, host

if TYPE_CHECKING:
    import torch


class PeakMemory:
    """Peak growth of memory within a `with` block, in bytes: of a GPU (of several
    that of the one that grew most), or of this process (CPU).

    `growth` is the peak's, beyond the bytes in use `before`; `files` is what of it are pages of
    files (code, mapped weights) that were not read before. On a GPU it is torch's allocator's own
    peak. On the CPU resident memory is sampled every 2 ms, and where the kernel lets a process
    reset its high-water mark (Linux: 5 into /proc/self/clear_refs), the mark is read as well.
    """

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.before = self.growth = self.files = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type != "cpu":
            self._gpus = gpu.devices_of_job(self.device)
            self._start = []
            for one in self._gpus:
                accelerator.synchronize(one)
                accelerator.reset_peak(one)
                self._start.append(accelerator.allocated(one))
            self.before = self._start[0]
            return self
        self.before = self._peak = host.resident()
        self._files_before = host.resident_files()
        self._marked = host.reset_peak_resident()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type != "cpu":
            grown = []
            for one, before in zip(self._gpus, self._start, strict=True):
                accelerator.synchronize(one)
                grown.append(accelerator.peak(one) - before)
            self.growth = max(grown)
            return
        self._stop.set()
        self._sampler.join()
        if self._marked:
            self._peak = max(self._peak, host.peak_resident())
        self.growth = self._peak - self.before
        self.files = max(0, host.resident_files() - self._files_before)

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, host.resident())


class MemoryWatch:
    """Memory that the run has taken since the watch was made: on GPUs the tensors of the one that
    has most, on the CPU the process's growth.
    """

    def __init__(self, device: "torch.device") -> None:
        self._gpus = () if device.type == "cpu" else gpu.devices_of_job(device)
        for one in self._gpus:
            accelerator.reset_peak(one)
        if not self._gpus:
            self._before = host.resident()
            self._marked = host.reset_peak_resident()
            self._highest = 0

    def restart(self) -> None:
        """Look for a new peak; what the run has taken so far stays counted."""
        for one in self._gpus:
            accelerator.reset_peak(one)
        if not self._gpus:
            self._marked = host.reset_peak_resident()
            self._highest = 0

    @property
    def now(self) -> int:
        """Bytes in use."""
        if self._gpus:
            return max(accelerator.allocated(one) for one in self._gpus)
        grown = host.resident() - self._before
        self._highest = max(self._highest, grown)
        return grown

    @property
    def peak(self) -> int:
        """The most bytes that were in use at once; where the kernel keeps no mark of it, of the
        moments looked at.
        """
        if self._gpus:
            return max(accelerator.peak(one) for one in self._gpus)
        return max(self._highest, host.peak_resident() - self._before if self._marked else self.now)
