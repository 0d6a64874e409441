"""Streams and events, and copies with all their ordering: between host and device, and from one GPU
to another.

Only CUDA and ROCm have streams here. Copies of XPU and MPS block, so nothing needs an order there.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from theloom.devices.accelerator import has_streams

if TYPE_CHECKING:
    import torch


class Mark:
    """A point in the work of a stream: what was queued before it has come to pass, or will.

    `held` is kept alive until somebody has waited for the mark.
    """

    def __init__(self, stream: Any, timing: bool = False, held: Any = None) -> None:
        import torch

        self._device, self._held = stream.device, held
        # blocking: a thread that waits sleeps, and does not spin a core
        self._event = torch.cuda.Event(enable_timing=timing, blocking=True)
        self._event.record(stream)

    def synchronize(self) -> None:
        """Wait in this thread."""
        self._event.synchronize()
        self._held = None

    def query(self) -> bool:
        """Whether it has come to pass.

        Returns:
            True where all that was queued before it is done.
        """
        return bool(self._event.query())

    def before_next(self) -> None:
        """Let what is queued from now on, on the current stream of its device, come after it."""
        import torch

        torch.cuda.current_stream(self._device).wait_event(self._event)

    def on(self, stream: Any) -> None:
        """Let what is queued from now on, on that stream, come after it.

        Args:
            stream: Of the same or another device.
        """
        stream.wait_event(self._event)

    def let_go(self) -> None:
        """Let what is held go, of its own device: what is queued there from now on, which may get
        its memory, comes after the mark. This thread does not wait.
        """
        self.before_next()
        self._held = None

    def seconds_to(self, later: "Mark") -> float:
        """The time up to a later mark.

        Args:
            later: Of the same device; both were made with `timing`, and have come to pass.

        Returns:
            Seconds.
        """
        return float(self._event.elapsed_time(later._event)) / 1000


class _Done(Mark):
    """A mark where nothing is queued: all has come to pass."""

    def __init__(self) -> None:
        self._held = None

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def before_next(self) -> None:
        pass

    def on(self, stream: Any) -> None:
        pass


DONE: Mark = _Done()


class SideStreams:
    """Streams for copies next to the computation: one for each device, made when it is needed."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def of(self, device: "torch.device") -> Any:
        """Find or make the stream of a device.

        Args:
            device: Any device.

        Returns:
            Its stream; None where there are no streams.
        """
        import torch

        if not has_streams(device):
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def mark(device: "torch.device", timing: bool = False) -> Mark:
    """Mark the work queued on a device's current stream.

    Args:
        device: Any device.
        timing: Whether `Mark.seconds_to` is to work.

    Returns:
        The mark; one that has come to pass where there are no streams.
    """
    import torch

    return Mark(torch.cuda.current_stream(device), timing) if has_streams(device) else DONE


def use(stream: Any) -> AbstractContextManager[Any]:
    """Have work and memory be a side stream's within a context.

    Args:
        stream: Of `SideStreams.of`; None: nothing changes.

    Returns:
        The context manager.
    """
    import torch

    return nullcontext() if stream is None else torch.cuda.stream(stream)


def copy_out(value: "torch.Tensor", place: "torch.Tensor", sides: SideStreams) -> Mark:
    """Copy a value to the host, next to the computation where the device can.

    Args:
        value: On any device. Nothing may write to it after the call; it is kept alive until the
            copy has been waited for.
        place: On the host, pinned for a copy that does not stop the host.
        sides: Streams of copies; the one of the value's own device is taken.

    Returns:
        A mark: `place` may be read once it has been waited for.
    """
    side = sides.of(value.device)
    if side is None:
        place.copy_(value)
        return DONE
    computed = mark(value.device)
    with use(side):
        computed.on(side)
        place.copy_(value, non_blocking=True)
    return Mark(side, held=value)


def copy_in(
    source: "torch.Tensor", there: "torch.Tensor", sides: SideStreams, *after: Mark
) -> Mark:
    """Copy from the host to a device, next to the computation where the device can.

    Args:
        source: On the host, pinned for a copy that does not stop the host; it may be overwritten
            once the mark that is returned has been waited for.
        there: On the device.
        sides: Streams of copies; the one of the device of `there` is taken.
        after: Marks of what must come first: the last work with the memory of `there`, which for a
            new tensor is all that was queued when it was allocated (`mark`), since its memory may
            have been another tensor's; and the copy that brought `source` to the host, if any.

    Returns:
        A mark: call its `before_next` before work with `there` is queued.
    """
    side = sides.of(there.device)
    if side is None:
        there.copy_(source)
        return DONE
    with use(side):
        for earlier in after:
            earlier.on(side)
        there.copy_(source, non_blocking=True)
    return Mark(side, held=source)


def copy_across(
    value: "torch.Tensor", device: "torch.device", sides: SideStreams
) -> "tuple[torch.Tensor, Mark]":
    """Copy from one GPU to another. The first one's computation goes on; torch itself has the other
    one's wait for the copy, and the copy for what that has queued.

    Args:
        value: On a GPU. Nothing may write to it after the call; it is kept alive until the mark
            lets it go.
        device: The other GPU.
        sides: Streams for copies to `device` alone: a copy waits for all that were queued before.

    Returns:
        The copy, which work on `device` may read, and the mark behind it.
    """
    side = sides.of(value.device)
    if side is None:
        return value.to(device), DONE
    computed = mark(value.device)
    with use(side):
        computed.on(side)
        there = value.to(device, non_blocking=True)
    return there, Mark(side, held=value)


def used_by_computation(tensor: "torch.Tensor") -> None:
    """Have the memory of a tensor that a side stream made given out again, once it is freed, only
    after what the current stream has queued by then.

    Args:
        tensor: On a device with streams.
    """
    import torch

    tensor.record_stream(torch.cuda.current_stream(tensor.device))
