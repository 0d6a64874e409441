"""An NVIDIA driver for tests: the installed pynvml, whose functions answer for boards that are
described here.

Exceptions, constants and structures are pynvml's own. Each function answers, or fails, as NVML's
API reference says: anything before nvmlInit is "Uninitialized", an empty MIG slot "Not Found", what
a board lacks "Not Supported".
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pynvml
import pytest

GIB = 1 << 30


@dataclass
class Board:
    """A GPU, or a MIG instance. `errors`: function to NVML error code; "…MemoryInfo_v2" is the
    second version alone.
    """

    uuid: str
    name: str = "NVIDIA A100-SXM4-80GB"
    capability: tuple[int, int] = (8, 0)
    total: int = 80 * GIB
    reserved: int = 0
    used: int = 0
    processes: list[tuple[int, int | None]] | None = field(default_factory=list)
    graphics: list[tuple[int, int | None]] = field(default_factory=list)
    mig: "list[Board | None] | None" = None
    busy: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def install(
    monkeypatch: pytest.MonkeyPatch,
    boards: list[Board],
    names: dict[int, str] | None = None,
    errors: dict[str, int | Exception] | None = None,
) -> ModuleType:
    """Put the driver in place of pynvml. `errors` are of functions without a board; `names` of
    processes, by pid.
    """
    module = ModuleType("pynvml")
    module.__dict__.update({k: v for k, v in vars(pynvml).items() if not k.startswith("__")})
    state = {"open": 0}

    def fail(name: str, board: Board | None = None) -> None:
        if name != "nvmlInit" and not state["open"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        error = {**(errors or {}), **(board.errors if board else {})}.get(name)
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise pynvml.NVMLError(error)

    def define(name: str, answer: Callable[..., Any]) -> None:
        def function(*arguments: Any, **options: Any) -> Any:
            fail(name, next((a for a in arguments if isinstance(a, Board)), None))
            return answer(*arguments, **options)

        setattr(module, name, function)

    def count(change: int) -> None:
        state["open"] += change

    def handle(index: int) -> Board:
        fail(f"nvmlDeviceGetHandleByIndex({index})")
        return boards[index]

    def memory(board: Board, version: int | None = None) -> Any:
        free = board.total - board.reserved - board.used
        if version is None:
            first = pynvml.c_nvmlMemory_t()
            first.total, first.free, first.used = board.total, free, board.used + board.reserved
            return first
        assert version == pynvml.nvmlMemory_v2
        fail("nvmlDeviceGetMemoryInfo_v2", board)
        second = pynvml.c_nvmlMemory_v2_t()
        second.total, second.reserved, second.free, second.used = (
            board.total,
            board.reserved,
            free,
            board.used,
        )
        return second

    def rates(board: Board) -> Any:
        if board.mig is not None or board.uuid.startswith("MIG-"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return pynvml.c_nvmlUtilization_t(gpu=board.busy, memory=0)

    def mig_mode(board: Board) -> list[int]:
        if board.mig is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [pynvml.NVML_DEVICE_MIG_ENABLE] * 2

    def mig_device(board: Board, slot: int) -> Board:
        if board.mig is None or board.mig[slot] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return board.mig[slot]

    def listed(processes: list[tuple[int, int | None]] | None) -> list[Any] | None:
        if processes is None:
            return None
        return [
            pynvml.nvmlFriendlyObject({"pid": pid, "usedGpuMemory": used})
            for pid, used in processes
        ]

    def process_name(pid: int) -> str:
        if pid not in (names or {}):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return names[pid]

    define("nvmlInit", lambda: count(1))
    define("nvmlShutdown", lambda: count(-1))
    define("nvmlDeviceGetCount", lambda: len(boards))
    define("nvmlDeviceGetHandleByIndex", handle)
    define("nvmlDeviceGetUUID", lambda board: board.uuid)
    define("nvmlDeviceGetName", lambda board: board.name)
    define("nvmlDeviceGetCudaComputeCapability", lambda board: board.capability)
    define("nvmlDeviceGetMemoryInfo", memory)
    define("nvmlDeviceGetUtilizationRates", rates)
    define("nvmlDeviceGetMigMode", mig_mode)
    define("nvmlDeviceGetMaxMigDeviceCount", lambda board: len(board.mig or []))
    define("nvmlDeviceGetMigDeviceHandleByIndex", mig_device)
    define("nvmlDeviceGetComputeRunningProcesses", lambda board: listed(board.processes))
    define("nvmlDeviceGetGraphicsRunningProcesses", lambda board: listed(board.graphics))
    define("nvmlSystemGetProcessName", process_name)
    module.times_open = lambda: state["open"]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module
