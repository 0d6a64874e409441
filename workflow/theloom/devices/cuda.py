"""The GPUs that torch sees, and the memory of each, with as little of CUDA as will do.

Of torch's calls, `is_available` and `device_count` ask the driver; `get_device_properties`
initialises CUDA in the process (a fork of it cannot use CUDA then), but makes no context;
`mem_get_info` makes one, some 0.5 GB of the GPU, and so is requested only where NVML does not tell.
The allocator's own figures make none, and are 0 before there is one.
"""

import os
from dataclasses import dataclass

from theloom.devices import host, nvml
from theloom.devices.host import DeviceMemory


@dataclass(frozen=True)
class VisibleGPU:
    """A GPU as torch sees and numbers it, under CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER. `total`
    is in bytes.
    """

    index: int
    uuid: str
    name: str
    compute_capability: tuple[int, int]
    total: int


def visible_gpus() -> tuple[list[VisibleGPU], str]:
    """The GPUs that torch sees, or why there are none. Never raises."""
    import torch

    if not torch.backends.cuda.is_built():
        return [], _why_none(f"torch {torch.__version__} is built without CUDA")
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    except (
        RuntimeError,
        AssertionError,
        torch.cuda.DeferredCudaCallError,
    ) as error:  # a broken driver, or a fork
        return [], _why_none(f"torch cannot use CUDA: {_first_line(error)}")
    gpus = [
        VisibleGPU(i, str(getattr(p, "uuid", "")), p.name, (p.major, p.minor), p.total_memory)
        for i, p in enumerate(properties)
    ]
    return gpus, "" if gpus else _why_none("torch finds no GPU that it can use")


def find(gpu: VisibleGPU, machine: nvml.Machine) -> nvml.Device | None:
    """The same GPU, or the MIG instance that torch runs on, among those of NVML."""
    return machine.find(gpu.uuid, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def memory(
    gpu: VisibleGPU, found: nvml.Device | None, machine: nvml.Machine
) -> tuple[DeviceMemory, str]:
    """The memory of a GPU, and the reasons in words for what could not be known.

    From NVML where it tells; for a board that shares the host's memory from there, since
    cudaMemGetInfo counts page cache as used on it; else from CUDA.
    """
    import torch

    if found and found.total is not None and found.free is not None:
        return DeviceMemory(found.total, found.free), found.note
    if found and found.unified:
        shared = host.memory()
        return (
            shared,
            f"{found.note}{f', bound by {shared.limited_by}' if shared.limited_by else ''}",
        )
    note = found.note if found else machine.note or "NVML does not list this GPU"
    try:
        free, total = torch.cuda.mem_get_info(gpu.index)
    except RuntimeError as error:  # no memory left for a context
        return DeviceMemory(gpu.total, 0), f"{note}; CUDA: {_first_line(error)}"
    return DeviceMemory(total, free), f"{note}; its total and free memory are CUDA's"


def _why_none(reason: str) -> str:
    machine, visible = nvml.read(), os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = ", ".join(device.name for device in machine.devices)
    told = f"the driver shows {shown}" if shown else machine.note
    if shown and visible is not None:
        told += f", of which CUDA_VISIBLE_DEVICES={visible!r} may hide some"
    return f"{reason}; {told}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
