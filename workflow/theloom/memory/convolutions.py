"""What a convolution takes within itself on the CPU: copies in the layout of oneDNN's kernels, or
columns. Which of them it is depends on processor, shapes and versions, and nothing says it: so the
same convolution runs once, on zeros, and PyTorch's profiler tells.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState
from torch.utils._python_dispatch import _disable_current_modes

# Of the older profiler, since the newer one takes longer and may write to the job's log
_MEMORY = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())

_TRIED = 16 << 20  # bytes of input and output that are tried at most; more are extrapolated


def convolution_buffers(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    """Bytes that a convolution takes beyond its output, on the CPU.

    Args:
        value: input, (windows, channels, …), real or fake.
        weight: of `aten.convolution`; so are the others.
        bias: of the output; None: it has none.
        stride: of the window.
        padding: around the input.
        dilation: of the window.
        transposed: it is a transposed one.
        output_padding: of a transposed one.
        groups: of channels.

    Returns:
        Bytes, at most at one time.
    """
    if value.ndim == weight.ndim - 1:  # without an axis of windows
        value = value.unsqueeze(0)
    windows, shape = int(value.shape[0]), tuple(map(int, value.shape[1:]))
    numbers = tuple(map(tuple, (stride, padding, dilation, output_padding)))
    # kernels copy an input whose axes lie in another order in memory
    order = tuple(sorted(range(value.ndim), key=value.stride, reverse=True))
    rest: Any = (tuple(map(int, weight.shape)), bias is not None, numbers, bool(transposed))
    rest += (groups, value.dtype, order, torch.get_num_threads(), torch.backends.mkldnn.enabled)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    steps = math.prod(stride) if not transposed else 1 / math.prod(stride)
    positions = math.prod(shape[1:])
    one = value.element_size() * positions * (shape[0] + channels / steps)
    if windows * one <= _TRIED:
        return _tried(windows, shape, *rest)
    if 4 * one <= _TRIED:
        most = int(_TRIED // one)
        less, more = (_tried(count, shape, *rest) for count in (most // 2, most))
        return round(more + (more - less) / (most - most // 2) * (windows - most))
    axis = max(range(1, len(shape)), key=lambda a: shape[a])  # parts of one window
    most = max(2, int(shape[axis] * _TRIED / (2 * one)))
    less, more = (
        _tried(1, (*shape[:axis], length, *shape[axis + 1 :]), *rest)
        for length in (most // 2, most)
    )
    return round(windows * (more + (more - less) / (most - most // 2) * (shape[axis] - most)))


@cache
def _tried(
    windows: int,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    biased: bool,
    numbers: tuple[tuple[int, ...], ...],
    transposed: bool,
    groups: int,
    dtype: torch.dtype,
    order: tuple[int, ...],
    threads: int,
    onednn: bool,
) -> int:
    """Bytes that one convolution takes beyond its output, by the threads and kernels of now."""
    stride, padding, dilation, output_padding = map(list, numbers)
    with _disable_current_modes(), torch.inference_mode():
        value = torch.empty_permuted((windows, *shape), order, dtype=dtype).zero_()
        weight = torch.zeros(weight_shape, dtype=dtype)
        outputs = weight_shape[1] * groups if transposed else weight_shape[0]
        bias = torch.zeros(outputs, dtype=dtype) if biased else None
        rest: Any = (stride, padding, dilation, transposed, output_padding, groups)
        made = torch.ops.aten.convolution(value, weight, bias, *rest).untyped_storage().nbytes()
        torch.autograd._enable_profiler_legacy(_MEMORY)
        try:
            torch.ops.aten.convolution(value, weight, bias, *rest)
        finally:
            events = torch.autograd._disable_profiler_legacy()
    live = peak = 0
    for event in (e for thread in events for e in thread if e.kind() == "memory_alloc"):
        live += event.cpu_memory_usage()
        peak = max(peak, live)
    return max(0, peak - made)
