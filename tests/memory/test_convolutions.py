"""Buffers of convolutions on the CPU, against its allocator."""

import pytest
import torch
from support import allocator_peak
from theloom.memory.convolutions import convolution_buffers

NUMBERS = ((1,), (8,), (1,), False, (0,), 4)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_whose_channels_lie_last_are_copied_where_kernels_do(
    onednn: bool, transposed: bool, dtype: torch.dtype
) -> None:
    value = torch.randn(3, 64, 101, dtype=dtype)
    if transposed:
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.randn(64, 16, 16, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=onednn), torch.inference_mode():
        held = [torch.ops.aten.convolution(value, weight, None, *NUMBERS)]
        measured = allocator_peak(
            lambda: held.append(torch.ops.aten.convolution(value, weight, None, *NUMBERS))
        )
        predicted = convolution_buffers(value, weight, None, *NUMBERS)
    assert predicted + held[-1].untyped_storage().nbytes() == measured
