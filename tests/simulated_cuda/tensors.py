"""Tensors that say cuda:N over memory of the CPU, and the mode that queues what is done with them.

An operation on them is queued on the current stream of their device, by the thread that called it,
and gives tensors of the right shape whose values come when it runs. It runs with the CPU's kernels,
so the values are the CPU's, bit for bit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from simulated_cuda.memory import Device, Memory, Pinned, poison
from simulated_cuda.operations import (
    FACTORIES,
    SYNCING,
    WHOLE,
    has_mask,
    is_composite,
    is_view,
    makes,
    shaped_by_values,
    written,
)
from simulated_cuda.streams import LOCK, Stream

aten = torch.ops.aten
_FAKE = torch._C._TorchDispatchModeKey.FAKE

KERNEL, COPY = 1.0, 1.0  # reckoned seconds of an operation

_MOST_POISONED = 1 << 24  # bytes of a pinned buffer: the first of a large ring are enough
_PINNING = {aten.pin_memory.default, aten._pin_memory.default}


class SimulatedTensor(torch.Tensor):
    """A tensor on a simulated GPU. `elem` is its memory, `memory` its block of the allocator."""

    elem: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, elem: torch.Tensor, memory: Memory) -> "SimulatedTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=torch.device("cuda", memory.owned.device.index),
        )
        made.elem, made.memory = elem, memory
        return made

    def record_stream(self, stream: Stream) -> None:
        with LOCK:
            self.memory.owned.streams.add(stream)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert Mode.dispatcher is not None, "a tensor of a simulation that has ended"
        return Mode.dispatcher.dispatch(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sends a thread's operations to the dispatcher of the simulation."""

    dispatcher: "Dispatcher | None" = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operation goes through torch._dynamo, which takes seconds to import

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if Mode.dispatcher is None:
            return func(*args, **(kwargs or {}))
        return Mode.dispatcher.dispatch(func, args, kwargs or {})


class Dispatcher:
    """What becomes of each operation."""

    def __init__(
        self,
        devices: Sequence[Device],
        pinned: Pinned,
        current: Callable[[int], Stream],
        number: Callable[[torch.device], int],
    ) -> None:
        self.devices, self.pinned, self.current, self.number = devices, pinned, current, number
        self.schedule = devices[0].schedule
        self._shapes: dict[Any, Any] = {}

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run on the host what is the host's, queue the rest."""
        if torch._C._get_dispatch_mode(_FAKE) is not None:
            return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        wanted = kwargs.get("device") or next(
            (a for a in args if isinstance(a, torch.device)), None
        )
        on_gpu = any(isinstance(t, SimulatedTensor) for t in tensors)
        if not on_gpu and (wanted is None or wanted.type != "cuda"):
            return self._on_host(func, args, kwargs)
        with LOCK:
            return self._on_device(func, args, kwargs, tensors, wanted)

    def _on_host(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in _PINNING:
            return self.pinned.made(args[0].clone())
        if func is aten.is_pinned.default:
            return self.pinned.holds(args[0])
        pin = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        if pin:
            poison(made, _MOST_POISONED)
            return self.pinned.made(made)
        return made

    def _on_device(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        wanted: torch.device | None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        if func is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        if func is aten.copy_.default:
            self._copy(*args, **kwargs)
            return args[0]
        if func not in WHOLE and func not in SYNCING and is_composite(func):
            with Mode():
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        sims = [t for t in tensors if isinstance(t, SimulatedTensor)]
        self.schedule.operation()
        index = (
            self.number(wanted)
            if wanted is not None and wanted.type == "cuda"
            else sims[0].device.index
        )
        if wanted is not None and wanted.type != "cuda":  # empty_like(…, device="cpu")
            return self._on_host(func, tree_map(_meta, args), kwargs)
        if wanted is None or func.__name__.split(".")[0] not in FACTORIES:
            args, kwargs = self._checked(func, args, kwargs, tensors, index)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        stream = self.current(index)
        elems, named = tree_map(_elem, args), tree_map(_elem, kwargs)
        if func in SYNCING or has_mask(func, args) or shaped_by_values(func, args, kwargs):
            return self._waited(func, elems, named, index, stream)
        if is_view(func):
            return self._view(func, elems, named, sims[0])
        if (target := written(func)) is not None:
            stream.push(functools.partial(func, *elems, **named), KERNEL)
            return target(args, kwargs)
        return self._compute(func, args, kwargs, elems, named, index, stream)

    def _waited(
        self, func: Any, elems: Any, named: dict[str, Any], index: int, stream: Stream
    ) -> Any:
        """An operation whose result, or its shape, the host must know."""
        self.schedule.synchronized(func.__name__.split(".")[0], warns=True)
        stream.wait_on_host()
        with torch.inference_mode():
            results = func(*elems, **named)

        def made(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            with torch.inference_mode():
                elem = torch.empty_like(value)
            born = self._born(elem, index, stream)
            with torch.inference_mode():
                elem.copy_(value)
            return born

        return tree_map(made, results)

    @staticmethod
    def _view(func: Any, elems: Any, named: Any, base: SimulatedTensor) -> Any:
        """Another look at the same memory."""
        with torch.inference_mode():
            seen = func(*elems, **named)

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            view = SimulatedTensor(value, base.memory)
            torch._functionalize_unsafe_set(view, base)  # it shares the storage
            return view

        with torch.inference_mode(base.is_inference()):
            return tree_map(wrapped, seen)

    def _compute(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        elems: Any,
        named: dict[str, Any],
        index: int,
        stream: Stream,
    ) -> Any:
        """New tensors, whose values come when the stream is there."""
        shapes = self._shapes_of(func, args, kwargs)
        # memory that nothing initialises may be written from any stream: its poison has a place
        fills = not func.__name__.startswith(("empty", "new_empty"))
        results: list[torch.Tensor] = []

        def made(shape: Any) -> Any:
            if not isinstance(shape, torch.Tensor):
                return shape
            with torch.inference_mode():
                elem = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
            results.append(elem)
            return self._born(elem, index, stream, fills)

        result = tree_map(made, shapes)

        def run() -> None:
            values = [v for v in tree_leaves(func(*elems, **named)) if isinstance(v, torch.Tensor)]
            for elem, value in zip(results, values, strict=True):
                elem.copy_(value)

        if fills:
            stream.push(run, KERNEL)
        return result

    def _born(
        self, elem: torch.Tensor, index: int, stream: Stream, written: bool = True
    ) -> SimulatedTensor:
        return SimulatedTensor(elem, self.devices[index].give(elem, stream, written))

    def _shapes_of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operation gives on tensors without values."""
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key not in self._shapes:
            named = {**kwargs, "device": "meta"} if makes(func) else kwargs
            with torch.inference_mode():
                self._shapes[key] = func(*tree_map(_meta, args), **tree_map(_meta, named))
        return self._shapes[key]

    def _checked(
        self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], index: int
    ) -> tuple[Any, Any]:
        """Refuse tensors of several devices, as the real operations do. Numbers of the host may
        take part, and so may its indices, which are copied.
        """
        host: dict[int, torch.Tensor] = {}
        for tensor in tensors:
            if isinstance(tensor, SimulatedTensor):
                fits = tensor.device.index == index
            else:
                indices = func.__name__.split(".")[0] in ("index", "index_put", "index_put_")
                fits = tensor.device.type == "cpu" and (tensor.ndim == 0 or indices)
                if tensor.ndim:
                    self.schedule.synchronized("pageable memory", warns=True)
                host[id(tensor)] = tensor.clone()
            if not fits:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:{index} and {tensor.device}! ({func})"
                )
        return tree_map(lambda x: host.get(id(x), x), (args, kwargs)) if host else (args, kwargs)

    def _to_copy(
        self,
        source: torch.Tensor,
        dtype: torch.dtype | None = None,
        layout: Any = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        target = device or source.device
        shape = torch.empty_like(
            _meta(source), dtype=dtype, memory_format=memory_format or torch.preserve_format
        )
        if target.type != "cuda":
            made = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
            poison(made)
            if non_blocking or pin_memory:  # as torch does: such a copy needs pinned memory
                self.pinned.made(made)
        else:
            with torch.inference_mode():
                elem = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
            index = self.number(target)
            made = self._born(elem, index, self.current(index))
        self._copy(made, source, non_blocking)
        return made

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
        """As aten/src/ATen/native/cuda/Copy.cu: on the current stream of the source's device, or of
        the target's if the source is on the host.
        """
        self.schedule.operation()
        into, out_of = _elem(to), _elem(source)
        there, here = isinstance(to, SimulatedTensor), isinstance(source, SimulatedTensor)
        plain = (
            to.dtype == source.dtype
            and to.shape == source.shape
            and to.is_contiguous()
            and source.is_contiguous()
        )
        stream = self.current((source if here else to).device.index)
        if there and here:
            other = self.current(to.device.index)
            if to.device != source.device:  # both streams take part
                stream.wait_stream(other)
            stream.push(lambda: into.copy_(out_of), COPY)
            if to.device != source.device:
                other.wait_stream(stream)
        elif there:
            pinned = self.pinned.holds(source) and plain
            if not pinned:  # staged: the host may write to it after the call
                out_of = out_of.clone()
            stream.push(lambda: into.copy_(out_of), COPY)
            if not (non_blocking and pinned) and source.numel() > 1:
                cause = "blocking copy to the device" if pinned else "pageable memory"
                self.schedule.synchronized(cause, warns=not non_blocking)
                stream.wait_on_host()
        else:
            pinned = self.pinned.holds(to) and to.is_contiguous()
            stream.push(lambda: into.copy_(out_of), COPY)
            if not (non_blocking and pinned):
                cause = "blocking copy to the host" if not non_blocking else "pageable memory"
                self.schedule.synchronized(cause, warns=not non_blocking)
                stream.wait_on_host()


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _elem(value: Any) -> Any:
    return value.elem if isinstance(value, SimulatedTensor) else value


def _meta(value: Any) -> Any:
    """The same without values, but a number of the host, which takes part as a number does."""
    if not isinstance(value, torch.Tensor) or not (
        value.ndim or isinstance(value, SimulatedTensor)
    ):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.size(), value.stride(), value.dtype, isinstance(value, SimulatedTensor))
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    return (type(value), value)
