"""Element types of hidden states: in HDF5, as NumPy's bits, and of tensors."""

from typing import TYPE_CHECKING

import h5py
import numpy as np

from theloom.errors import StoreError
from theloom.precision import SCALED

if TYPE_CHECKING:
    import torch


def bfloat16() -> h5py.h5t.TypeID:
    """Make the HDF5 type of bfloat16: 16 bits, of which 8 are the exponent and 7 the fraction.

    Returns:
        The type, little endian.
    """
    t = h5py.h5t.IEEE_F32LE.copy()
    t.set_fields(15, 7, 8, 0, 7)
    t.set_size(2)
    t.set_ebias(127)
    return t


def hdf5_type(precision: str) -> h5py.h5t.TypeID:
    """The HDF5 type of a precision.

    Args:
        precision: `fp32`, `fp16`, `bf16`, `fp8_e4m3` or `int8`.

    Returns:
        The type, little endian; of codes an integer.
    """
    if precision == "bf16":
        return bfloat16()
    return {
        "fp32": h5py.h5t.IEEE_F32LE,
        "fp16": h5py.h5t.IEEE_F16LE,
        "fp8_e4m3": h5py.h5t.STD_U8LE,
        "int8": h5py.h5t.STD_I8LE,
    }[precision]


def precision_of(dataset: h5py.Dataset) -> str:
    """The precision of a dataset: the inverse of `hdf5_type`.

    Args:
        dataset: of an open file.

    Returns:
        As `hdf5_type` takes it.

    Raises:
        StoreError: the dataset has another type.
    """
    t = dataset.id.get_type()
    precisions = ("fp32", "fp16", "bf16", *SCALED)
    for precision in precisions:
        if t.equal(hdf5_type(precision)):
            return precision
    raise StoreError(f"{dataset.file.filename}: {dataset.name} is none of {', '.join(precisions)}")


def bits(tensor: "torch.Tensor") -> np.ndarray:
    """The bits of a CPU tensor as unsigned integers, since NumPy has no bfloat16.

    Args:
        tensor: of elements of two or four bytes.

    Returns:
        An array of the same shape; it shares memory with a contiguous tensor.

    Examples:
        >>> import torch
        >>> hex(bits(torch.ones(1, dtype=torch.bfloat16)).item())
        '0x3f80'
    """
    return shared_bits(tensor.contiguous())


def shared_bits(tensor: "torch.Tensor") -> np.ndarray:
    """The bits of a CPU tensor over its own memory, to be written to.

    Args:
        tensor: of elements of two or four bytes, of any strides.

    Returns:
        An array of unsigned integers of the same shape and strides.

    Examples:
        >>> import torch
        >>> rows = torch.zeros(2, 3)
        >>> shared_bits(rows[:, 1])[:] = 0x3F800000
        >>> rows[0].tolist()
        [0.0, 1.0, 0.0]
    """
    import torch

    integer = {2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
    return tensor.view(integer).numpy()


def raw_bytes(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a tensor, row by row.

    Args:
        tensor: on the CPU.

    Returns:
        A view of its memory if it is contiguous, else of a copy.
    """
    return bits(tensor).data.cast("B") if tensor.numel() else memoryview(b"")


def tensor_from_bits(array: np.ndarray, precision: str) -> "torch.Tensor":
    """The inverse of `bits`.

    Args:
        array: bits of elements.
        precision: `fp32`, `fp16` or `bf16`.

    Returns:
        A tensor of the same shape over the same memory.

    Examples:
        >>> tensor_from_bits(np.array([0x3F80], "<u2"), "bf16")
        tensor([1.], dtype=torch.bfloat16)
    """
    import torch

    from theloom.precision import torch_dtype

    return torch.from_numpy(array).view(torch_dtype(precision))


def bits_dtype(precision: str) -> np.dtype:
    """The integer that holds one element.

    Args:
        precision: `fp32`, `fp16`, `bf16`, `fp8_e4m3` or `int8`.

    Returns:
        The dtype of NumPy, little endian.

    Examples:
        >>> bits_dtype("bf16")
        dtype('uint16')
    """
    return np.dtype(
        {"fp32": "<u4", "fp16": "<u2", "bf16": "<u2", "fp8_e4m3": "u1", "int8": "i1"}[precision]
    )
