"""bitsandbytes' 8 and 4 bits on simulated GPUs: its own code with its CPU's kernels. Only its
classes of weights, which put memory of a GPU in place of that of the host, are helped to do so.
"""

import functools
from typing import Any

import torch

from simulated_cuda.tensors import SimulatedTensor


@functools.cache
def combined(cls: type) -> type:
    """A class of weights whose memory is simulated."""

    def get(self: Any) -> SimulatedTensor:
        return SimulatedTensor(self.elem, self.memory)

    def put(self: Any, value: SimulatedTensor) -> None:
        assert value.shape == self.shape
        self.elem, self.memory = value.elem, value.memory

    body = {"data": property(get, put), "__torch_dispatch__": SimulatedTensor.__torch_dispatch__}
    return type(cls)(cls.__name__, (cls, SimulatedTensor), body)


def make_subclass(cls: type, data: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As torch.Tensor._make_subclass."""
    if not isinstance(data, SimulatedTensor):
        return torch._C.TensorBase._make_subclass(cls, data, *args, **kwargs)
    whole = cls if issubclass(cls, SimulatedTensor) else combined(cls)
    return SimulatedTensor.__new__(whole, data.elem, data.memory)


def int8(weight: Any, device: torch.device) -> Any:
    """As Int8Params._quantize, with a new tensor for the quantised weight."""
    import bitsandbytes

    half = weight.data.contiguous().to(device=device, dtype=torch.float16)
    quantised, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(half)
    return bitsandbytes.nn.Int8Params(quantised, requires_grad=False, CB=quantised, SCB=scales)


def nf4(weight: Any, device: torch.device) -> Any:
    """As Params4bit._quantize, with a new tensor for the quantised weight."""
    import bitsandbytes

    quantised, state = bitsandbytes.functional.quantize_4bit(
        weight.data.contiguous().to(device),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    made = bitsandbytes.nn.Params4bit(
        quantised,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=weight.module,
        bnb_quantized=True,
    )
    if weight.module is not None:
        weight.module.quant_state = state
    return made
