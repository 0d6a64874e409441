"""What torch shows of simulated devices: `torch.cuda` and `torch.accelerator`, as documented."""

import contextlib
import ctypes
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._device import _device_constructors

from simulated_cuda import quantised
from simulated_cuda.memory import CAPABILITY, NAME, Device, Pinned
from simulated_cuda.streams import LOCK, Event, Schedule, Stream
from simulated_cuda.tensors import Dispatcher, Mode, SimulatedTensor

_CUDA, _META = 1, 14  # c10::DeviceType


class World:
    """The simulated machine: `devices`, `schedule` (with `syncs`, `places` and `at`), `pinned`."""

    def __init__(self, devices: int, total: int, policy: str, seed: int) -> None:
        self.schedule = Schedule(policy, seed)
        self.devices = [Device(self.schedule, i, total) for i in range(devices)]
        self.pinned = Pinned()
        self.schedule.before_push = self._collect
        self._thread = threading.local()  # CUDA's current device and streams are each thread's own

    def _collect(self) -> None:
        for device in self.devices:
            if device.ended:
                device.collect()

    def index(self, device: Any = None) -> int:
        """The number of a device, as torch takes devices: none is the thread's current one."""
        if device is None or (isinstance(device, int) and device < 0):
            return getattr(self._thread, "device", 0)
        if isinstance(device, int):
            number: int | None = device
        else:
            asked = torch.device(device)
            if asked.type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {asked}")
            number = asked.index
        number = getattr(self._thread, "device", 0) if number is None else number
        if not 0 <= number < len(self.devices):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return number

    def device(self, device: Any = None) -> Device:
        return self.devices[self.index(device)]

    def set_device(self, device: Any) -> None:
        self._thread.device = self.index(device)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        streams: dict[int, Stream] = getattr(self._thread, "streams", {})
        return streams.get(index, self.devices[index].stream)

    def set_stream(self, stream: Stream) -> None:
        self.set_device(stream.device)
        self._thread.__dict__.setdefault("streams", {})[stream.device.index] = stream

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before = self.index()
        if device is not None:
            self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[Stream | None]:
        if stream is None:
            yield None
            return
        before, own = self.current_stream(), self.current_stream(stream.device)
        self.set_stream(stream)
        try:
            yield stream
        finally:
            self.set_stream(own)
            self.set_stream(before)

    def synchronize(self, device: Any = None) -> None:
        with LOCK:
            self.schedule.synchronized("device")
            self.device(device).finish()

    def empty_cache(self) -> None:
        for device in self.devices:
            device.empty_cache()

    def stats(self, device: Any = None) -> dict[str, int]:
        d = self.device(device)
        figures = {
            "allocated_bytes": (d.allocated, d.peak_allocated),
            "reserved_bytes": (d.reserved, d.peak_reserved),
        }
        words = {
            f"{name}.all.{moment}": value
            for name, pair in figures.items()
            for moment, value in zip(("current", "peak"), pair, strict=True)
        }
        return words | {"num_ooms": d.failures}

    def properties(self, device: Any = None) -> SimpleNamespace:
        index = self.index(device)
        return SimpleNamespace(
            name=NAME,
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            total_memory=self.devices[index].total,
            uuid=uuid(index),
            multi_processor_count=1,
            is_integrated=False,
        )

    def set_fraction(self, fraction: float, device: Any = None) -> None:
        self.device(device).fraction = fraction

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        d = self.device(device)
        return d.total - d.reserved, d.total

    def set_debug_mode(self, mode: int | str) -> None:
        names = ("default", "warn", "error")
        self.schedule.debug_mode = mode if isinstance(mode, int) else names.index(mode)


def uuid(index: int) -> str:
    """The UUID of a simulated GPU, as torch writes it (NVML writes GPU- before it)."""
    return f"51a11a7e-0000-0000-0000-{index:012}"


@contextmanager
def simulated(
    devices: int = 1, total: int = 80 << 30, policy: str = "lazy", seed: int = 0
) -> Iterator[World]:
    """Have torch work with simulated GPUs of `total` bytes each, in this thread and those that
    start within.
    """
    world = World(devices, total, policy, seed)
    importlib.import_module("torch._dynamo")  # it subclasses Event: before that is replaced
    _give_cuda_a_guard()
    _device_constructors()  # torch notes once which functions make tensors: the real ones
    before = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for place, names in _interface(world):
            for name, value in names.items():
                stack.enter_context(mock.patch.object(place, name, value, create=True))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) reaches the mode
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(Mode())
        try:
            yield world
        finally:
            with LOCK:
                for device in world.devices:
                    device.finish()


def _interface(world: World) -> list[tuple[Any, dict[str, Any]]]:
    """What is put in place of what, by the object that has it."""
    get, thread_run = world.device, threading.Thread.run

    class SideStream(Stream):
        def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
            super().__init__(world.schedule, world.index(device))
            self._entered: list[Any] = []

        def __enter__(self) -> "SideStream":
            self._entered.append(world.on_stream(self))
            self._entered[-1].__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._entered.pop().__exit__(*error)

    class AnyEvent(Event):
        def __init__(self, device: Any = None, **options: Any) -> None:
            super().__init__(**options)

    def run_in_mode(self: threading.Thread) -> None:
        with Mode():
            thread_run(self)

    figures: dict[str, Callable[..., Any]] = {
        "memory_allocated": lambda d=None: get(d).allocated,
        "max_memory_allocated": lambda d=None: get(d).peak_allocated,
        "memory_reserved": lambda d=None: get(d).reserved,
        "max_memory_reserved": lambda d=None: get(d).peak_reserved,
        "reset_peak_memory_stats": lambda d=None: get(d).reset_peaks(),
        "memory_stats": world.stats,
        "empty_cache": world.empty_cache,
        "synchronize": world.synchronize,
        "current_stream": world.current_stream,
        "set_stream": world.set_stream,
        "is_available": lambda: True,
        "device_count": lambda: len(world.devices),
        "get_device_capability": lambda d=None: CAPABILITY,
    }
    cuda = figures | {
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "current_device": world.index,
        "set_device": world.set_device,
        "device": world.on_device,
        "Stream": SideStream,
        "Event": Event,
        "stream": world.on_stream,
        "default_stream": lambda d=None: get(d).stream,
        "mem_get_info": world.mem_get_info,
        "get_device_properties": world.properties,
        "get_device_name": lambda d=None: NAME,
        "set_per_process_memory_fraction": world.set_fraction,
        "get_per_process_memory_fraction": lambda d=None: get(d).fraction,
        "ipc_collect": lambda: None,
        "manual_seed_all": lambda seed: None,
        "set_sync_debug_mode": world.set_debug_mode,
        "get_sync_debug_mode": lambda: world.schedule.debug_mode,
        "host_memory_stats": lambda: {
            "allocated_bytes.current": world.pinned.taken,
            "allocated_bytes.peak": world.pinned.peak,
        },
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, nbytes, flags: world.pinned.register(address, nbytes),
            cudaHostUnregister=world.pinned.unregister,
            cudaMemGetInfo=world.mem_get_info,
        ),
    }
    accelerator = figures | {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": world.index,
        "set_device_index": world.set_device,
        "device_index": world.on_device,
        "empty_host_cache": lambda: None,
        "get_memory_info": world.mem_get_info,
        "get_device_capability": lambda d=None: {"supported_dtypes": set()},
    }
    Event.current = staticmethod(world.current_stream)
    dispatcher = Dispatcher(world.devices, world.pinned, world.current_stream, world.index)
    return [
        (torch.cuda, cuda),
        (torch.accelerator, accelerator),
        (torch, {"Stream": SideStream, "Event": AnyEvent} | _numbered(world)),
        (torch.Tensor, {"to": _to(world), "cuda": _to_cuda(world)}),
        (torch.Tensor, {"_make_subclass": staticmethod(quantised.make_subclass)}),
        *_bitsandbytes(),
        (torch.nn.Parameter, {"__new__": _parameter(torch.nn.Parameter.__new__)}),
        (torch.backends.cuda, {"is_built": lambda: True}),
        (threading.Thread, {"run": run_in_mode}),
        (Mode, {"dispatcher": dispatcher}),
    ]


def _bitsandbytes() -> list[tuple[Any, dict[str, Any]]]:
    """Its classes of weights, where it has been imported before."""
    if "bitsandbytes" not in sys.modules:
        return []
    nn = sys.modules["bitsandbytes"].nn
    return [
        (nn.Int8Params, {"_quantize": quantised.int8}),
        (nn.Params4bit, {"_quantize": quantised.nf4}),
    ]


def _with_number(world: World, device: Any) -> Any:
    """C++ asks a CUDA that is not there which device "cuda" is now."""
    if isinstance(device, (str, torch.device)) and str(device) == "cuda":
        return torch.device("cuda", world.index())
    return device


def _numbered(world: World) -> dict[str, Any]:
    """Functions that make tensors without asking the mode first: they make them on the host."""

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            numbered = _with_number(world, device)
            if numbered is None or torch.device(numbered).type != "cuda":
                return function(*args, device=device, **kwargs)
            return function(*args, **kwargs).to(numbered)

        return made

    return {name: of(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")}


def _to(world: World) -> Callable[..., torch.Tensor]:
    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = {k: _with_number(world, v) for k, v in kwargs.items()}
        return original(self, *(_with_number(world, a) for a in args), **named)

    return to


def _to_cuda(world: World) -> Callable[..., torch.Tensor]:
    def cuda(
        self: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any
    ) -> torch.Tensor:
        return self.to(torch.device("cuda", world.index(device)), non_blocking=non_blocking)

    return cuda


def _parameter(original: Callable[..., Any]) -> Any:
    """Parameters of simulated tensors: torch refuses those that inference mode has made."""

    def new(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
        if isinstance(data, SimulatedTensor):
            data._is_param = True  # type: ignore[attr-defined]
            return data
        return original(cls, data, requires_grad)

    return staticmethod(new)


def _give_cuda_a_guard() -> None:
    """C++ sets the current device before many an operation; a build without CUDA has nothing to
    do that with. That of the meta device does nothing, and is put in its place.
    """
    torch._C._ensureCUDADeviceGuardSet()  # builds with CUDA on a machine without a GPU
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    with contextlib.suppress(ValueError):  # another compiler's name: torch's own will do or fail
        table = (ctypes.c_void_p * (_META + 1)).in_dll(library, name)
        table[_CUDA] = table[_CUDA] or table[_META]
