"""What NVIDIA's management library (NVML) says of this machine's GPUs: their memory, and who uses
it.

NVML is the library behind nvidia-smi. It sees every process's memory and makes no CUDA context,
which itself would take some 0.5 GB of the GPU that is requested about. Nothing here raises: what
the driver does not tell is None, with the reason in words. Behaviour by NVIDIA's NVML API reference
(docs.nvidia.com/deploy/nvml-api) and its bindings, nvidia-ml-py.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import psutil

# bytes in use beyond the listed processes': contexts and an old driver's reserve are less
UNEXPLAINED = 2_000_000_000


@dataclass(frozen=True)
class Process:
    """A process with memory on a GPU. `used` is in bytes, None where the driver does not tell
    (Windows, WDDM).
    """

    pid: int
    name: str
    used: int | None
    is_vllm: bool


@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG instance of one.

    `total` and `free` are bytes that programs can have: without the few hundred MB that the driver
    reserves, which nvidia-smi's total includes. They are None where NVML does not tell; `unified`
    if that is since the board has no memory of its own but shares the host's. A GPU in MIG mode has
    `instances`, which alone run programs. `busy` is the percentage of the last moment in which it
    computed. `visible` are the variables that show it to programs. `note` has the reasons for what
    is missing, in words.
    """

    uuid: str
    name: str = "unknown GPU"
    compute_capability: tuple[int, int] | None = None
    total: int | None = None
    free: int | None = None
    unified: bool = False
    mig: bool = False
    instances: tuple["Device", ...] = ()
    processes: tuple[Process, ...] = ()
    busy: int | None = None
    visible: tuple[str, ...] = ("CUDA_VISIBLE_DEVICES",)
    note: str = ""

    @property
    def used(self) -> int | None:
        """Bytes that are not free, whoever uses them; None where that is not known."""
        return None if self.total is None or self.free is None else self.total - self.free


@dataclass(frozen=True)
class Machine:
    """All GPUs that the driver shows, in its order (by PCI bus, which is not always CUDA's), or why
    there are none.
    """

    devices: tuple[Device, ...] = ()
    note: str = ""

    def find(self, uuid: str, visible: str = "") -> Device | None:
        """Find a GPU or MIG instance by its UUID.

        Args:
            uuid: prefixed with GPU- or MIG-, or bare as CUDA gives it.
            visible: CUDA_VISIBLE_DEVICES: where CUDA gives the UUID of a GPU in MIG mode, it runs
                on the instance named there, or on the first, since a process can use one instance
                only.

        Returns:
            The device; None where the driver does not show it.
        """
        for device in self.devices:
            for instance in device.instances:
                if _bare(instance.uuid) == _bare(uuid):
                    return instance
            if device.uuid and _bare(device.uuid) == _bare(uuid):
                requested = _bare(visible.split(",")[0]) if visible.startswith("MIG-") else ""
                named = [i for i in device.instances if _bare(i.uuid).startswith(requested)]
                return (named or device.instances or [device])[0]
        return None


def read() -> Machine:
    """Ask the driver. Takes milliseconds and leaves nothing behind; never raises.

    Returns:
        The GPUs that NVIDIA's driver shows, or why there are none.
    """
    try:
        import pynvml
    except ImportError as missing:
        return Machine(note=f"the package nvidia-ml-py cannot be imported ({missing})")
    _, error = _ask(pynvml.nvmlInit)
    if error:
        return Machine(note=_words(error))
    try:
        count, error = _ask(pynvml.nvmlDeviceGetCount)
        found = [_device(index) for index in range(count or 0)]
    finally:
        _ask(pynvml.nvmlShutdown)
    notes = [_words(error), *(device.note for device in found if not device.uuid)]
    if count == 0:
        notes.append("the NVIDIA driver shows no GPU")
    return Machine(tuple(d for d in found if d.uuid), "; ".join(filter(None, notes)))


def _ask(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, Exception | None]:
    """The answer, or None and the error."""
    import pynvml

    try:
        return function(*arguments, **options), None
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, UnicodeDecodeError) as error:
        return (
            None,
            error,
        )  # the second is nvidia-ml-py's own, the third is of names: it decodes them as UTF-8


def _words(error: Exception | None) -> str:
    import pynvml

    reasons = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver here "
        "(its library libnvidia-ml is not found)",
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed, "
        "but its kernel module is not loaded",
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver's library and kernel "
        "module are of different "
        "versions, as after an update; restart the machine",
        pynvml.NVML_ERROR_NO_PERMISSION: "the NVIDIA driver gives this user no permission",
        pynvml.NVML_ERROR_OPERATING_SYSTEM: "the operating system "
        "(a container or a batch job) bars the GPU",
        pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU has fallen off the bus; restart the machine",
        pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset",
        pynvml.NVML_ERROR_NOT_SUPPORTED: "the NVIDIA driver does not tell it for this board",
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "the NVIDIA driver is too old to tell",
    }
    if error is None:
        return ""
    if isinstance(error, pynvml.NVMLError):
        return reasons.get(error.value, f"NVML: {error}")
    if isinstance(
        error, pynvml.NVMLLibraryMismatchError
    ):  # the driver's library lacks the function
        return reasons[pynvml.NVML_ERROR_FUNCTION_NOT_FOUND]
    return "a name is not UTF-8"


def _device(index: int) -> Device:
    """One GPU by NVML's index. Without a UUID, if it cannot be reached: then `note` says why."""
    import pynvml

    handle, error = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
    device = _described(handle) if handle is not None else Device("", note=_words(error))
    if not device.uuid:
        return replace(device, note=f"GPU {index} of the driver's list: {device.note}")
    mode, _ = _ask(
        pynvml.nvmlDeviceGetMigMode, handle
    )  # most boards do not support it: they are not in MIG mode then
    if not mode or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return device
    slots, _ = _ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)
    handles = [
        _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)[0]
        for slot in range(slots or 0)
    ]
    capability = device.compute_capability  # NVML tells it for the whole GPU only
    instances = [
        replace(_described(h), compute_capability=capability) for h in handles if h is not None
    ]
    note = (
        "in MIG mode: programs run on its instances"
        if instances
        else "in MIG mode, and no instance is made"
    )
    return replace(device, mig=True, instances=tuple(i for i in instances if i.uuid), note=note)


def _described(handle: Any) -> Device:
    import pynvml

    uuid, error = _ask(pynvml.nvmlDeviceGetUUID, handle)
    if uuid is None:
        return Device("", note=_words(error))
    name, _ = _ask(pynvml.nvmlDeviceGetName, handle)
    capability, _ = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    total, free, unified, memory_note = _memory(handle)
    processes, process_note = _processes(handle)
    rates, _ = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)  # MIG has none
    if not process_note and total is not None and free is not None:
        process_note = unexplained(total - free, processes)
    return Device(
        uuid,
        name or "unknown GPU",
        tuple(capability) if capability else None,
        total,
        free,
        unified,
        processes=processes,
        busy=rates.gpu if rates is not None else None,
        note="; ".join(filter(None, [memory_note, process_note])),
    )


def _memory(handle: Any) -> tuple[int | None, int | None, bool, str]:
    """Total and free bytes, whether the board shares the host's memory, and the reason why they are
    not known.

    The second version of the call alone tells what the driver reserves; drivers before 510 have the
    first only.
    """
    import pynvml

    memory, error = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, version=pynvml.nvmlMemory_v2)
    if memory is not None:
        return memory.total - memory.reserved, memory.free, False, ""
    memory, error = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is not None:
        return memory.total, memory.free, False, ""
    unified = isinstance(
        error, pynvml.NVMLError_NotSupported
    )  # Jetson, DGX Spark: no memory of their own
    return (
        None,
        None,
        unified,
        "its memory is the host's" if unified else f"memory: {_words(error)}",
    )


def _processes(handle: Any) -> tuple[tuple[Process, ...], str]:
    """The processes with memory on a GPU, most memory first; and the reason if they cannot be
    listed.
    """
    import pynvml

    computing, error = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    drawing, _ = _ask(
        pynvml.nvmlDeviceGetGraphicsRunningProcesses, handle
    )  # a desktop's; MIG has none
    used = {
        p.pid: p.usedGpuMemory for p in [*(drawing or []), *(computing or [])]
    }  # one may be in both lists
    names = {pid: _process_name(pid) for pid in used}
    listed = [
        Process(pid, names[pid], memory, is_vllm(pid, names[pid])) for pid, memory in used.items()
    ]
    listed.sort(key=lambda p: -(p.used or 0))
    return tuple(listed), f"processes: {_words(error)}" if error else ""


def unexplained(used: int, processes: tuple[Process, ...]) -> str:
    """Say what of the bytes in use no process is listed for.

    Args:
        used: bytes of the GPU in use.
        processes: those that the driver lists.

    Returns:
        Words for a note; empty where that is less than `UNEXPLAINED`.

    Examples:
        >>> unexplained(3 * 10**9, (Process(4711, "python", 3 * 10**9, is_vllm=False),))
        ''
    """
    if any(p.used is None for p in processes):
        return "the driver does not tell how much memory each process has"
    rest = used - sum(p.used or 0 for p in processes)
    if rest < UNEXPLAINED:
        return ""
    return (
        f"{rest / 1e9:.1f} GB are in use by processes that the driver does not list, "
        "as it may be in a container"
    )


def _process_name(pid: int) -> str:
    import pynvml

    name, _ = _ask(pynvml.nvmlSystemGetProcessName, pid)
    if not name:
        with contextlib.suppress(psutil.Error):
            name = psutil.Process(pid).name()
    return PurePath(name).name if name and name.startswith("/") else name or "unknown process"


def is_vllm(pid: int, name: str) -> bool:
    """Whether a process is a vLLM server's.

    Args:
        pid: of the process.
        name: its title, such as vLLM gives itself.

    Returns:
        True by that title, or by its or its parents' command.

    Examples:
        >>> is_vllm(4711, "VLLM::EngineCore")
        True
    """
    if name.startswith("VLLM::"):
        return True
    try:
        process = psutil.Process(pid)
        commands = [p.cmdline() for p in (process, *process.parents()[:2])]
    except psutil.Error:
        return False
    return any(_starts_vllm(command) for command in commands)


def _starts_vllm(command: list[str]) -> bool:
    if any(PurePath(part).name == "vllm" or part.startswith("VLLM::") for part in command[:2]):
        return True
    module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
    return any(part.split(".")[0] == "vllm" for part in module)


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")
