"""AMD's management library for tests: a module like the package amdsmi 7.0, whose functions answer
for the boards that are described here.

As in the package, a function takes a handle and gives a number, a list or a dict with "N/A" for
what is not known, and fails with AmdSmiLibraryException, which has a code; before amdsmi_init with
"Device not initialized".
"""

import enum
import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

GIB = 1 << 30
NO_PERM, NOT_SUPPORTED, NOT_INIT, DRIVER_NOT_LOADED = 10, 2, 32, 34
WORDS = {
    NO_PERM: "AMDSMI_STATUS_NO_PERM - Permission Denied",
    NOT_SUPPORTED: "AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported",
    NOT_INIT: "AMDSMI_STATUS_NOT_INIT - Device not initialized",
    DRIVER_NOT_LOADED: "AMDSMI_STATUS_DRIVER_NOT_LOADED - Driver not loaded",
}


class AmdSmiException(Exception):  # noqa: N818
    pass


class AmdSmiLibraryException(AmdSmiException):
    def __init__(self, err_code: int) -> None:
        super().__init__(err_code)
        self.err_code, self.err_info = err_code, WORDS[err_code]

    def __str__(self) -> str:
        return f"Error code:\n\t{self.err_code} | {self.err_info}"

    def get_error_info(self, detailed: bool = True) -> str:
        return self.err_info if detailed else self.err_info.split(" - ")[0]


class AmdSmiMemoryType(enum.IntEnum):
    VRAM, VIS_VRAM, GTT = range(3)


@dataclass
class Board:
    """A GPU by its serial number, 16 hexadecimal digits. `errors`: function to code."""

    serial: str
    hip_id: int | str = 0
    name: str = "AMD Instinct MI300X"
    total: int = 192 * GIB
    used: int = 0
    busy: int | str = 0
    processes: list[tuple[int, str, int]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


def install(
    monkeypatch: pytest.MonkeyPatch,
    boards: list[Board],
    errors: dict[str, int] | None = None,
    lacks: tuple[str, ...] = (),
) -> ModuleType:
    """Put the library in place of amdsmi. `errors` are of functions without a board, `lacks` names
    that an older package has not.
    """
    module = ModuleType("amdsmi")
    module.__spec__ = importlib.machinery.ModuleSpec("amdsmi", None)
    state = {"open": 0}

    def define(name: str, answer: Callable[..., Any]) -> None:
        def function(*arguments: Any) -> Any:
            board = next((a for a in arguments if isinstance(a, Board)), None)
            if name != "amdsmi_init" and not state["open"]:
                raise AmdSmiLibraryException(NOT_INIT)
            code = {**(errors or {}), **(board.errors if board else {})}.get(name)
            if code is not None:
                raise AmdSmiLibraryException(code)
            return answer(*arguments)

        if name not in lacks:
            setattr(module, name, function)

    def count(change: int) -> None:
        state["open"] += change

    def memory(value: str) -> Callable[[Board, AmdSmiMemoryType], int]:
        def told(board: Board, kind: AmdSmiMemoryType) -> int:
            assert kind is AmdSmiMemoryType.VRAM
            return int(getattr(board, value))

        return told

    def chip(board: Board) -> dict[str, Any]:
        serial = f"0x{board.serial.upper()}" if board.serial else "N/A"
        return {"market_name": board.name, "asic_serial": serial, "vendor_id": "0x1002"}

    def enumeration(board: Board) -> dict[str, Any]:
        return {"hip_id": board.hip_id, "hsa_id": 1, "hip_uuid": f"GPU-{board.serial}"}

    def listed(board: Board) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "pid": pid,
                "mem": used,
                "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": used},
            }
            for pid, name, used in board.processes
        ]

    define("amdsmi_init", lambda: count(1))
    define("amdsmi_shut_down", lambda: count(-1))
    define("amdsmi_get_processor_handles", lambda: list(boards))
    define("amdsmi_get_gpu_enumeration_info", enumeration)
    define("amdsmi_get_gpu_asic_info", chip)
    define("amdsmi_get_gpu_memory_total", memory("total"))
    define("amdsmi_get_gpu_memory_usage", memory("used"))
    define("amdsmi_get_gpu_activity", lambda board: {"gfx_activity": board.busy})
    define("amdsmi_get_gpu_process_list", listed)
    for kind in (AmdSmiException, AmdSmiLibraryException, AmdSmiMemoryType):
        setattr(module, kind.__name__, kind)
    module.times_open = lambda: state["open"]
    monkeypatch.setitem(sys.modules, "amdsmi", module)
    return module
