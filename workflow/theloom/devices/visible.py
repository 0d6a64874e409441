"""The GPUs that torch sees, and the memory of each, with as little of CUDA as will do.

Of torch's calls, counting GPUs asks the driver; their properties initialise CUDA in the process (a
fork of it cannot use CUDA then), but make no context; the driver's memory figures make one, some
0.5 GB of the GPU, and so are requested only where NVML does not tell. The allocator's own figures
make none, and are 0 before there is one.
"""

import os

from theloom.devices import accelerator, boards, host, nvml
from theloom.devices.accelerator import Properties
from theloom.devices.host import DeviceMemory


def visible_gpus() -> tuple[list[Properties], str]:
    """Find the GPUs that torch sees. Never raises.

    Returns:
        The GPUs in torch's order, and why there are none, else "".
    """
    import torch

    if not accelerator.is_built():
        return [], _why_none(f"torch {torch.__version__} is built without CUDA")
    try:
        gpus = accelerator.properties()
    except accelerator.broken() as error:  # a broken driver, or a fork
        return [], _why_none(f"torch cannot use CUDA: {_first_line(error)}")
    return gpus, "" if gpus else _why_none("torch finds no GPU that it can use")


def find(gpu: Properties, machine: nvml.Machine) -> nvml.Device | None:
    """Find the same GPU, or the MIG instance that torch runs on, among those of NVML.

    Args:
        gpu: as torch sees it.
        machine: as NVML shows it.

    Returns:
        The device; None where NVML does not list it.
    """
    return machine.find(gpu.uuid, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def memory(
    gpu: Properties, found: nvml.Device | None, machine: nvml.Machine
) -> tuple[DeviceMemory, str]:
    """The memory of a GPU. From NVML where it tells; for a board that shares the host's memory from
    there, since cudaMemGetInfo counts page cache as used on it; else from CUDA.

    Args:
        gpu: as torch sees it.
        found: the same as NVML shows it; None: it does not.
        machine: all that NVML shows.

    Returns:
        Bytes in all and free; and the reasons in words for what could not be known, else "".
    """
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
        free, total = accelerator.driver_memory(accelerator.numbered(gpu.index))
    except RuntimeError as error:  # no memory left for a context
        return DeviceMemory(gpu.total, 0), f"{note}; CUDA: {_first_line(error)}"
    return DeviceMemory(
        total, free
    ), f"{note}; its total and free memory are {accelerator.kind_here().upper()}'s"


def _why_none(reason: str) -> str:
    machine, visible = boards.read(), os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = ", ".join(device.name for device in machine.devices)
    told = f"the driver shows {shown}" if shown else machine.note
    if shown and visible is not None:
        told += f", of which CUDA_VISIBLE_DEVICES={visible!r} may hide some"
    return f"{reason}; {told}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
