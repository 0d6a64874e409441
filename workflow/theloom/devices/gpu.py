"""The device of a run: which one, what it can do, how much memory it has, how much of it is in use,
and by whom.
"""

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from theloom.devices import accelerator, boards, gpu_lease, host, nvml, visible
from theloom.devices.host import DeviceMemory
from theloom.errors import ConfigError
from theloom.precision import Resolved, choose_precision, cpu_has_fp16, follow

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

VLLM_HINT = (
    "vLLM takes 90% of a GPU by default: start it with a lower gpu_memory_utilization, or on "
    "another GPU"
)


def choose_device(requested: str) -> "torch.device":
    """Find the device of `extraction.device`.

    Args:
        requested: auto, cpu, cuda, xpu or mps, with a number or without.

    Returns:
        The device.

    Raises:
        ConfigError: there is no such one.
    """
    import torch

    kind, _, number = requested.partition(":")
    kind = accelerator.kind_here() if kind == "auto" else kind
    if kind == "cpu":
        return torch.device("cpu")
    count, index = accelerator.count(kind), int(number or 0)
    if index >= count:
        found = f"{count} {kind.upper()} GPUs"
        if not accelerator.is_built():
            found = "a CPU build of torch"
        raise ConfigError(
            f"extraction.device: {requested} is not there, found {found}; "
            "set extraction.device=cpu or auto"
        )
    return torch.device(kind, index)


def devices_of_job(device: "torch.device") -> "tuple[torch.device, ...]":
    """Find the devices that a job computes on.

    Args:
        device: the job's first device.

    Returns:
        All GPUs that it has leased, or the one device.
    """
    import torch

    count = len(gpu_lease.held()) if device.type == "cuda" else 0
    if count < 2:
        return (device,)
    return tuple(torch.device("cuda", number) for number in range(count))


def compute_capability(device: "torch.device") -> tuple[int, int] | None:
    """The CUDA compute capability.

    Args:
        device: any device.

    Returns:
        Major and minor; None for any device that is not NVIDIA's.
    """
    return accelerator.capability(device)


def precision_on(device: "torch.device", requested: str) -> Resolved:
    """Follow the fallback chain of precisions on a device; each fallback is logged as a warning.

    NVIDIA's GPUs answer by their compute capability, others by whether they multiply such numbers.

    Args:
        device: where the model runs.
        requested: auto, fp32, fp16 or bf16.

    Returns:
        The precision, and how it was arrived at.
    """
    import torch

    capability = compute_capability(device)
    if capability is not None:
        return choose_precision(requested, capability)
    if device.type == "cpu":
        return choose_precision(requested, None, cpu_has_fp16=requested != "fp16" or cpu_has_fp16())
    lacking = [
        name
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        if not accelerator.supports(device, dtype)
    ]
    return choose_precision(requested, None, lacking=lacking)


def device_memory(device: "torch.device") -> DeviceMemory:
    """Measure the memory of a GPU that this process can have (makes a CUDA context): what the
    driver has free, and what this process's allocator holds and no tensor uses.

    Args:
        device: the GPU; for the CPU it is the memory of the host, as `host.memory` bounds it.

    Returns:
        Bytes.
    """
    if device.type == "cpu":
        return host.memory()
    free, total = accelerator.driver_memory(device)
    cached = max(0, accelerator.reserved(device) - accelerator.allocated(device))
    return DeviceMemory(total, min(total, free + cached))


def available_memory(device: "torch.device") -> tuple[DeviceMemory, str]:
    """Measure the memory of a device before anything is loaded. Makes no CUDA context.

    Args:
        device: a GPU or the CPU.

    Returns:
        Bytes, and in words who else uses it.
    """
    if device.type == "cpu":
        return host.memory(), ""
    info = GPUManager().get_gpu_info(device.index or 0)
    assert isinstance(info, GPUInfo)
    words = _in_words(info.other_processes)
    if any(p.is_vllm for p in info.other_processes):
        words += f" ({VLLM_HINT})"
    return DeviceMemory(int(info.total_memory_gb * 1e9), int(info.free_memory_gb * 1e9)), words


def warn_above(threshold: float, device: "torch.device") -> bool:
    """Log a warning if more than a share of the memory of a device of the job is in use, by anyone.

    Args:
        threshold: the share, from 0 to 1.
        device: the job's; several GPUs of a job are all looked at.

    Returns:
        Whether one was logged.
    """
    fullest = False
    for one in devices_of_job(device):
        memory = host.memory()
        if one.type != "cpu":
            free, total = accelerator.driver_memory(one)
            memory = DeviceMemory(total, free)
        share = memory.used / memory.total
        if share > threshold:
            fullest = True
            _, others = available_memory(one)
            log.warning(
                "%s memory: %.1f%% in use (%.2f of %.2f GB), above memory_warning_threshold=%.2f%s",
                one,
                100 * share,
                memory.used / 1e9,
                memory.total / 1e9,
                threshold,
                f"; other processes: {others}" if others else "",
            )
    return fullest


def release(device: "torch.device") -> None:
    """Give what is not used any more back to the driver, after an allocation has failed.

    Args:
        device: of the job; all of its GPUs are released.
    """
    import gc

    gc.collect()
    for one in devices_of_job(device):
        accelerator.synchronize(one)
        accelerator.empty_cache(one)


@dataclass(frozen=True)
class GPUInfo:
    """A device at one moment. GB are 10⁹ bytes, and `total` is what programs can have, less than
    the nominal size.

    `used` is everyone's, `own` and `peak` are this process's: on a GPU what torch's allocator
    holds, and the most that tensors took since `reset_peak_memory`; on the CPU resident memory.
    `processes` are those that the driver lists, `busy_percent` how much of the last moment it
    computed, None where it does not tell. `note` says why something could not be known, "" if
    all is.
    """

    index: int
    name: str
    uuid: str
    compute_capability: tuple[int, int] | None
    total_memory_gb: float
    used_memory_gb: float
    free_memory_gb: float
    peak_memory_gb: float
    own_memory_gb: float
    processes: tuple[nvml.Process, ...] = ()
    note: str = ""
    busy_percent: int | None = None

    @property
    def label(self) -> str:
        """Number and name, for messages."""
        return f"GPU {self.index} ({self.name})" if self.name != "CPU" else self.name

    @property
    def usage_percent(self) -> float:
        """The share of the memory that is in use, by anyone."""
        return 100 * self.used_memory_gb / self.total_memory_gb if self.total_memory_gb else 0.0

    @property
    def other_processes(self) -> tuple[nvml.Process, ...]:
        """The listed processes but this one."""
        return tuple(p for p in self.processes if p.pid != os.getpid())


def precision_of(info: GPUInfo) -> str:
    """What `memory.precision_mode=auto` is on a device of `GPUManager`.

    Args:
        info: of `GPUManager.get_gpu_info`.

    Returns:
        `bf16`, `fp16` or `fp32`.
    """
    if info.compute_capability or info.name == "CPU":
        return follow("auto", info.compute_capability).resolved
    return precision_on(accelerator.numbered(info.index), "auto").resolved


class GPUManager:
    """The memory of the GPUs that torch sees, numbered as torch numbers them; without any, of the
    CPU, as number 0.

    Making one never fails. NVML numbers GPUs otherwise than CUDA does (which sorts by speed unless
    CUDA_DEVICE_ORDER says PCI_BUS_ID, and shows those of CUDA_VISIBLE_DEVICES only), so that the
    two are matched by UUID. Each question is answered anew. Methods that take a device raise
    ConfigError where there is no such one.
    """

    def __init__(self) -> None:
        self._visible, self._why_none = visible.visible_gpus()

    def can_allocate(self, required_memory_gb: float, device: int = 0) -> bool:
        """Whether this process can have that much more memory on a device now.

        What other processes use is not free. Fragmentation can still make one large allocation
        fail: leave 10 to 15 % of headroom.

        Args:
            required_memory_gb: in GB of 10⁹ bytes.
            device: its number.

        Returns:
            True where so much is free, or held by torch's allocator of this process and unused.

        Raises:
            ConfigError: there is no such device.
        """
        info, cached = self._info(self._checked(device)), 0
        if self._visible:
            gpu = accelerator.numbered(device)
            cached = accelerator.reserved(gpu) - accelerator.allocated(gpu)
        return required_memory_gb * 1e9 <= info.free_memory_gb * 1e9 + cached

    def check_memory_threshold(self, threshold: float = 0.85) -> dict[str, Any]:
        """Check which devices have more than a share of their memory in use, by anyone; each is
        logged.

        Args:
            threshold: the share, above 0 and at most 1.

        Returns:
            Plain values: `threshold`; `devices`, with `device` (its index), `usage_percent`,
            `used_memory_gb` and `total_memory_gb`; and `warnings`, the same of those above it, with
            `processes`, the others than this one.

        Raises:
            ConfigError: the threshold is no share.
        """
        if not 0 < threshold <= 1:
            raise ConfigError(
                f"threshold: {threshold} is not a share of the memory, "
                "a number above 0 and at most 1"
            )
        devices, warnings = [], []
        for info in self._all():
            usage = {
                "device": info.index,
                "usage_percent": info.usage_percent,
                "used_memory_gb": info.used_memory_gb,
                "total_memory_gb": info.total_memory_gb,
            }
            devices.append(usage)
            if info.usage_percent > 100 * threshold:
                others = [
                    {
                        "pid": p.pid,
                        "name": p.name,
                        "used_memory_gb": None if p.used is None else p.used / 1e9,
                        "is_vllm": p.is_vllm,
                    }
                    for p in info.other_processes
                ]
                warnings.append({**usage, "processes": others})
                log.warning("%s", _warning(info, threshold))
        return {"threshold": threshold, "devices": devices, "warnings": warnings}

    def get_gpu_info(self, device: int | None = None) -> GPUInfo | list[GPUInfo]:
        """Read the state of one device, or of all.

        Args:
            device: its number; None: all.

        Returns:
            One device if it is named or the only one, else a list of all.

        Raises:
            ConfigError: there is no such device.
        """
        if device is not None:
            return self._info(self._checked(device))
        found = self._all()
        return found[0] if len(found) == 1 else found

    def reset_peak_memory(self, device: int | None = None) -> None:
        """Count `peak_memory_gb` from now. The CPU's cannot be reset but on Linux.

        Args:
            device: its number; None: all.

        Raises:
            ConfigError: there is no such device.
        """
        if device is not None:
            self._checked(device)
        if not self._visible:
            host.reset_peak_resident()
            return
        for index in [v.index for v in self._visible] if device is None else [device]:
            accelerator.reset_peak(accelerator.numbered(index))

    def empty_cache(self) -> None:
        """Give the memory that torch's allocator holds, and no tensor uses, back to the GPUs, for
        other processes.
        """
        gpus = [accelerator.numbered(v.index) for v in self._visible]
        if any(accelerator.reserved(gpu) for gpu in gpus):
            accelerator.empty_cache(gpus[0])

    def _checked(self, device: int) -> int:
        count = len(self._visible) or 1
        if not 0 <= device < count:
            found = ", ".join(info.label for info in self._all())
            why = f" ({self._why_none})" if self._why_none else ""
            raise ConfigError(f"GPU {device} is not there, found {found}{why}")
        return device

    def _all(self) -> list[GPUInfo]:
        machine = boards.read()
        return [self._info(index, machine) for index in range(len(self._visible) or 1)]

    def _info(self, index: int, machine: nvml.Machine | None = None) -> GPUInfo:
        if not self._visible:
            return _cpu_info(self._why_none)
        gpu, machine = self._visible[index], machine or boards.read()
        device, found = accelerator.numbered(index), visible.find(gpu, machine)
        memory, note = visible.memory(gpu, found, machine)
        return GPUInfo(
            index,
            found.name if found else gpu.name,
            found.uuid if found else gpu.uuid,
            gpu.compute_capability,
            memory.total / 1e9,
            memory.used / 1e9,
            memory.free / 1e9,
            accelerator.peak(device) / 1e9,
            accelerator.reserved(device) / 1e9,
            found.processes if found else (),
            note,
            found.busy if found else None,
        )


def other_processes(device: int = 0) -> str:
    """Tell who else has memory on a device.

    Args:
        device: its number.

    Returns:
        Words for messages, such as `python (pid 4711, vLLM) 61.2 GB`; empty if nobody is known.

    Raises:
        ConfigError: there is no such device.
    """
    info = GPUManager().get_gpu_info(device)
    assert isinstance(info, GPUInfo)
    return _in_words(info.other_processes)


def _in_words(processes: tuple[nvml.Process, ...], total_gb: float | None = None) -> str:
    """With `total_gb`, each with its share of it."""
    words = []
    for process in processes:
        word = f"{process.name} (pid {process.pid}{', vLLM' if process.is_vllm else ''})"
        if process.used is not None:
            word += f" {process.used / 1e9:.1f} GB"
            if total_gb:
                word += f" ({process.used / 1e7 / total_gb:.0f}%)"
        words.append(word)
    return ", ".join(words)


def _warning(info: GPUInfo, threshold: float) -> str:
    line = (
        f"{info.label}: {info.usage_percent:.1f}% of the memory in use "
        f"({info.used_memory_gb:.2f} of {info.total_memory_gb:.2f} GB), above the threshold "
        f"{threshold:.2f}"
    )
    if info.other_processes:
        line += f"; other processes: {_in_words(info.other_processes, info.total_memory_gb)}"
    if any(p.is_vllm for p in info.other_processes):
        line += f"; {VLLM_HINT}"
    return line


def _cpu_info(why: str) -> GPUInfo:
    memory = host.memory()
    bound = f"; memory bound by {memory.limited_by}" if memory.limited_by else ""
    return GPUInfo(
        0,
        "CPU",
        "",
        None,
        memory.total / 1e9,
        memory.used / 1e9,
        memory.free / 1e9,
        host.peak_resident() / 1e9,
        host.resident() / 1e9,
        note=f"no GPU: {why}{bound}",
    )
