"""What TheLoom asks of an accelerator: families of devices, memory figures, arithmetic. Only this
module and `streams` speak to one.

CUDA and ROCm go through `torch.cuda`. XPU and MPS go through `torch.accelerator`.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from theloom.devices import amd, host

if TYPE_CHECKING:
    import torch

FAMILIES = ("cpu", "cuda", "rocm", "xpu", "mps")

# Messages of what is, in truth, memory that ran out: drivers and libraries raise plain errors
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS found no room for its handle
    "CUDNN_STATUS_NOT_INITIALIZED",
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
    "OUT_OF_RESOURCES",
)


@dataclass(frozen=True)
class Properties:
    """A GPU as torch sees and numbers it. `total` is in bytes, `uuid` "" where there is none."""

    index: int
    uuid: str
    name: str
    compute_capability: tuple[int, int] | None
    total: int


def family(device: "torch.device | str") -> str:
    """Which of `FAMILIES` a device is of.

    Args:
        device: a torch device or its name.

    Returns:
        `cuda`, `rocm`, `xpu`, `mps` or `cpu`.

    Examples:
        >>> family("mps"), family("cpu")
        ('mps', 'cpu')
    """
    import torch

    kind = torch.device(device).type
    return "rocm" if kind == "cuda" and torch.version.hip else kind


def has_streams(device: "torch.device | str") -> bool:
    """Whether work is queued on streams: copies can run next to the computation.

    Args:
        device: a torch device or its name.

    Returns:
        True for CUDA and ROCm.

    Examples:
        >>> has_streams("cpu")
        False
    """
    return family(device) in ("cuda", "rocm")


def count(kind: str) -> int:
    """Count the devices of a type that torch sees.

    Args:
        kind: cuda (also ROCm's), xpu or mps.

    Returns:
        How many; 0 where there are none.
    """
    import torch

    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if here is not None and here.type == kind else 0


def kind_here() -> str:
    """The type of device that `auto` takes.

    Returns:
        `cuda`, `xpu`, `mps`, else `cpu`.
    """
    return next((kind for kind in ("cuda", "xpu", "mps") if count(kind)), "cpu")


def numbered(index: int) -> "torch.device":
    """The GPU of a number, of the type that `auto` takes.

    Args:
        index: as torch numbers them.

    Returns:
        The device.
    """
    import torch

    return torch.device(kind_here(), index)


def name(device: "torch.device") -> str:
    """What provenance records of a device.

    Args:
        device: of the job.

    Returns:
        The GPU's name, or the number of CPU threads that torch uses.
    """
    import torch

    kind = device.type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == "xpu":
        return torch.xpu.get_device_name(device)
    if kind == "mps":
        return f"Apple GPU ({platform.machine()})"
    return f"CPU, {torch.get_num_threads()} threads"


def capability(device: "torch.device") -> tuple[int, int] | None:
    """The CUDA compute capability.

    Args:
        device: any device.

    Returns:
        Major and minor; None for any device that is not NVIDIA's.
    """
    import torch

    return torch.cuda.get_device_capability(device) if family(device) == "cuda" else None


def supports(device: "torch.device", dtype: "torch.dtype") -> bool:
    """Whether a device that has no compute capability takes tensors of a dtype.

    Args:
        device: any device.
        dtype: which a small matrix product is tried with.

    Returns:
        False where torch raises.
    """
    import torch

    try:
        x = torch.ones(2, 2, dtype=dtype, device=device)
        (x @ x).sum().item()
    except (RuntimeError, TypeError):
        return False
    return True


def properties() -> list[Properties]:
    """Read the properties of the GPUs that torch sees. Initialises CUDA, and makes no context; what
    a broken driver makes it raise is of the types `broken`.

    Returns:
        The GPUs in torch's order, memory in bytes; none on a CPU.
    """
    import torch

    kind = kind_here()
    found = []
    for index in range(count(kind) if kind != "cpu" else 0):
        device = torch.device(kind, index)
        if kind == "cuda":
            p = torch.cuda.get_device_properties(index)
            number = None if torch.version.hip else (p.major, p.minor)
            uuid = str(getattr(p, "uuid", ""))
            uuid = amd.uuid_of(uuid) if torch.version.hip else uuid
            found.append(Properties(index, uuid, p.name, number, p.total_memory))
        else:
            found.append(Properties(index, "", name(device), None, driver_memory(device)[1]))
    return found


def broken() -> tuple[type[Exception], ...]:
    """What torch raises where the driver is broken, or CUDA was used before a fork.

    Returns:
        Types of exceptions, for `except`.
    """
    import torch

    return (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError)


def is_built() -> bool:
    """Whether this build of torch has any accelerator's code.

    Returns:
        True where it was built for one, whether it is there or not.
    """
    import torch

    return torch.backends.cuda.is_built() or torch.accelerator.current_accelerator() is not None


def synchronize(device: "torch.device") -> None:
    """Wait for all that is queued on a device.

    Args:
        device: any device; on the CPU nothing is queued.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def allocated(device: "torch.device") -> int:
    """Bytes of this process's tensors on a GPU.

    Args:
        device: a GPU.

    Returns:
        Bytes in use now.
    """
    import torch

    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return _memory(device).memory_allocated(device)


def peak(device: "torch.device") -> int:
    """The most memory of tensors on a GPU since `reset_peak`.

    Args:
        device: a GPU.

    Returns:
        Bytes; on MPS, which keeps no peak, those in use now.
    """
    return (
        allocated(device) if device.type == "mps" else _memory(device).max_memory_allocated(device)
    )


def reset_peak(device: "torch.device") -> None:
    """Count `peak` from now.

    Args:
        device: a GPU; nothing happens on MPS.
    """
    if device.type != "mps":
        _memory(device).reset_peak_memory_stats(device)


def reserved(device: "torch.device") -> int:
    """Bytes that this process's allocator holds on a GPU, in use or not.

    Args:
        device: a GPU.

    Returns:
        Bytes, at least those of `allocated`.
    """
    import torch

    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _memory(device).memory_reserved(device)


def peak_reserved(device: "torch.device") -> int:
    """The most memory that the allocator held of a GPU since `reset_peak`.

    Args:
        device: a GPU other than MPS.

    Returns:
        Bytes.
    """
    return int(_memory(device).max_memory_reserved(device))


def driver_memory(device: "torch.device") -> tuple[int, int]:
    """Memory as a GPU's driver reports it; makes a context on CUDA.

    Args:
        device: a GPU.

    Returns:
        Bytes free and bytes in all, of all processes.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":  # memory is the host's, of which Metal recommends a part at most
        total, held = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        return max(0, min(total - held, host.memory().free)), total
    return torch.accelerator.get_memory_info(device)


def _memory(device: "torch.device") -> Any:
    import torch

    return torch.cuda if device.type == "cuda" else torch.accelerator


def expandable_segments(device: "torch.device") -> bool:
    """Whether a GPU's allocator grows its segments, as PYTORCH_ALLOC_CONF says.

    Args:
        device: any device.

    Returns:
        False where the device has no such allocator.
    """
    import torch

    settings = getattr(torch._C, "_accelerator_getAllocatorSettings", str)()
    return has_streams(device) and "expandable_segments:True" in settings


def empty_cache(device: "torch.device") -> None:
    """Give memory that no tensor uses back: of all GPUs, and pinned memory of the host.

    Args:
        device: of the type whose cache is emptied.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type != "cpu":
        torch.accelerator.empty_cache()
    if has_streams(device) and torch.accelerator.is_available():
        torch.accelerator.empty_host_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whoever raised it.

    Args:
        error: any exception.

    Returns:
        True for the host's and the GPU's memory, and for what libraries of CUDA raise then.

    Examples:
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
        True
        >>> is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
        False
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


@contextmanager
def memory_limit(device: "torch.device", nbytes: int) -> Iterator[None]:
    """Within the context, this process's tensors get no more of a GPU than so many bytes.

    Args:
        device: a CUDA device.
        nbytes: the limit in bytes.
    """
    import torch

    share = min(1.0, nbytes / driver_memory(device)[1])
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def waits_warned_of() -> Iterator[None]:
    """Within the context, whatever makes the host wait for CUDA is a warning of torch's."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def exact_fp32() -> None:
    """Have FP32 mean FP32 in this process: no TF32 or BF16 inside its products and convolutions.

    Environments turn TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), and cuDNN has it on by default.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def arithmetic() -> dict[str, Any]:
    """How this process computes, as far as a switch decides it: what provenance records.

    Returns:
        Values of torch's switches by name.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_matmul": bool(matmul.allow_tf32),
        "tf32_convolution": bool(torch.backends.cudnn.allow_tf32),
        "bf16_reduced_precision_reduction": bool(matmul.allow_bf16_reduced_precision_reduction),
        "fp16_reduced_precision_reduction": bool(matmul.allow_fp16_reduced_precision_reduction),
    }


@contextmanager
def memory_history(device: "torch.device", entries: int) -> Iterator[None]:
    """Let CUDA's allocator keep its history, with Python frames, within the block.

    Args:
        device: nothing happens unless it is CUDA's.
        entries: how many events are kept, the latest.
    """
    if device.type != "cuda":
        yield
        return
    import torch

    torch.cuda.memory._record_memory_history(
        stacks="python", max_entries=entries, clear_history=True
    )
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_memory_history(file: str) -> None:
    """Write the history, for pytorch.org/memory_viz.

    Args:
        file: the path of the pickle.
    """
    import torch

    torch.cuda.memory._dump_snapshot(file)
