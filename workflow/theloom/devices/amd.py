"""What AMD's management library says of this machine's GPUs, where its Python package `amdsmi` is
installed: their memory, how busy they are, and who uses them.

Nothing here raises: what the driver does not tell is None, with the reason in words. Behaviour by
the package's interface, amdsmi 7.0 (rocm.docs.amd.com/projects/amdsmi).
"""

import contextlib
import importlib.util
import io
import string
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import psutil

from theloom.devices.nvml import Device, Machine, Process, is_vllm, unexplained

# Where a job's GPUs are named: first those of the runtime, by UUID or number, of them HIP's numbers
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def uuid_of(given: str) -> str:
    """The UUID that ROCm's tools write, of one as torch writes HIP's: its bytes are letters.

    Args:
        given: a UUID as torch writes it.

    Returns:
        `GPU-` and 16 hexadecimal digits; the text as it was given where its bytes are no such
        letters.

    Examples:
        >>> uuid_of("37663965-3063-6162-3132-333435363738")
        'GPU-7f9e0cab12345678'
        >>> uuid_of("51a11a7e-0000-0000-0000-000000000000")
        '51a11a7e-0000-0000-0000-000000000000'
    """
    with contextlib.suppress(ValueError):
        letters = bytes.fromhex(given.replace("-", "")).decode("ascii").rstrip("\0")
        if letters and all(c in string.hexdigits for c in letters):
            return f"GPU-{letters.lower()}"
    return given


def read() -> Machine:
    """Ask the driver. Leaves nothing behind; never raises.

    Returns:
        The GPUs that AMD's driver shows, or why there are none.
    """
    if importlib.util.find_spec("amdsmi") is None:
        return Machine(note="the package amdsmi is not installed")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # without its library it prints, and fails
            import amdsmi
    except Exception as error:
        return Machine(note=f"the package amdsmi cannot be imported ({_first_line(error)})")
    _, why = _ask(amdsmi.amdsmi_init)
    if why:
        return Machine(note=f"AMD's driver: {why}")
    try:
        handles, why = _ask(amdsmi.amdsmi_get_processor_handles)
        found = sorted((_device(handle) for handle in handles or []), key=lambda pair: pair[0])
    finally:
        _ask(amdsmi.amdsmi_shut_down)
    devices = tuple(device for _, device in found if device.uuid)
    if not devices and not why:
        why = "; ".join(device.note for _, device in found) or "it shows no GPU"
    return Machine(devices, f"AMD's driver: {why}" if why else "")


def _ask(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The answer, or None and the reason in words."""
    import amdsmi

    try:
        return function(*arguments), ""
    except amdsmi.AmdSmiLibraryException as error:
        return None, str(error.get_error_info()).partition(" - ")[2].strip() or str(error)
    except (amdsmi.AmdSmiException, AttributeError, UnicodeDecodeError) as error:
        return None, _first_line(error)  # an older library lacks the function


def _device(handle: Any) -> tuple[int, Device]:
    """A GPU, or a partition of one, with HIP's number of it."""
    import amdsmi

    told, _ = _ask(getattr(amdsmi, "amdsmi_get_gpu_enumeration_info", _lacking), handle)
    chip, why = _ask(amdsmi.amdsmi_get_gpu_asic_info, handle)
    uuid = (told or {}).get("hip_uuid") or _serial((chip or {}).get("asic_serial", ""))
    number = (told or {}).get("hip_id")
    order = number if isinstance(number, int) else 1 << 30
    if not uuid:
        return order, Device("", note=why or "a GPU without a UUID")
    name = (chip or {}).get("market_name", "")
    vram = amdsmi.AmdSmiMemoryType.VRAM
    total, why_total = _ask(amdsmi.amdsmi_get_gpu_memory_total, handle, vram)
    used, why_used = _ask(amdsmi.amdsmi_get_gpu_memory_usage, handle, vram)
    activity, _ = _ask(amdsmi.amdsmi_get_gpu_activity, handle)
    busy = (activity or {}).get("gfx_activity")
    listed, why_listed = _ask(amdsmi.amdsmi_get_gpu_process_list, handle)
    processes = tuple(sorted(map(_process, listed or []), key=lambda p: -(p.used or 0)))
    notes = [f"memory: {why}" for why in dict.fromkeys((why_total, why_used)) if why]
    if why_listed:
        notes.append(f"processes: {why_listed}")
    elif used is not None:
        notes.append(unexplained(used, processes))
    known = total is not None and used is not None
    return order, Device(
        uuid,
        "AMD GPU" if not name or name == "N/A" or name.startswith("0x") else name,
        total=total if known else None,
        free=total - used if known else None,
        processes=processes,
        busy=busy if isinstance(busy, int) else None,
        visible=VISIBLE,
        note="; ".join(filter(None, notes)),
    )


def _lacking(*_: Any) -> None:
    return None


def _serial(told: str) -> str:
    """The UUID of a serial number such as 0x7F9E0CAB12345678, "" where it is not told."""
    return f"GPU-{told[2:].lower()}" if told.startswith("0x") and int(told, 16) else ""


def _process(told: dict[str, Any]) -> Process:
    name, pid = told["name"], told["pid"]
    if name in ("", "N/A"):
        with contextlib.suppress(psutil.Error):
            name = psutil.Process(pid).name()
    name = PurePath(name).name if name.startswith("/") else name
    if name in ("", "N/A"):
        name = "unknown process"
    return Process(pid, name, told["memory_usage"]["vram_mem"], is_vllm(pid, name))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
