"""What a convolution takes within itself on the CPU: copies in the layout of oneDNN's kernels, or
columns. Which of them it is depends on processor, shapes and versions, and nothing says it: so the
same convolution runs once, on zeros, and PyTorch's profiler tells.
"""

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
    windows, shape = int(value.shape[0]), tuple(map(int, value.shape[1:]))
    if value.ndim == weight.ndim - 1:  # without an axis of windows
        windows, shape = 1, tuple(map(int, value.shape))
    numbers = tuple(map(tuple, (stride, padding, dilation, output_padding)))
    dense = value.ndim < 4 or value.is_contiguous()
    kind = (shape, tuple(map(int, weight.shape)), bias is not None, numbers, bool(transposed))
    asked = (*kind, groups, value.dtype, dense, torch.get_num_threads())
    one, _ = _tried(1, *asked)
    most = max(2, _TRIED // max(1, one))
    if windows <= most:
        return _tried(windows, *asked)[1]
    (_, less), (_, more) = (_tried(count, *asked) for count in (most // 2, most))
    per_window = (more - less) / (most - most // 2)
    return int(more + per_window * (windows - most))


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
    dense: bool,
    threads: int,
) -> tuple[int, int]:
    """Bytes of input and output, and those that one convolution takes beyond its output."""
    stride, padding, dilation, output_padding = map(list, numbers)
    with _disable_current_modes(), torch.inference_mode():
        value = torch.zeros(windows, *shape, dtype=dtype)
        if not dense:
            value = value.to(memory_format=torch.channels_last)
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
    return value.untyped_storage().nbytes() + made, max(0, peak - made)
