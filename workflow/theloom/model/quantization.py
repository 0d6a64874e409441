"""Quantised weights: what a checkpoint says of its own, what is resident of them, and their shapes
for traces.

Linear layers are made here as bitsandbytes holds and runs them, in shapes alone, where no kernel
runs.

Sizes follow bitsandbytes 0.50: LLM.int8() keeps a byte a weight and a 4-byte scale for each output
row, and its product makes the rows in int8, an int32 result and a float16 one; NF4 keeps half a
byte a weight and a 4-byte scale for each 64 weights, and the whole weight is made 16-bit for each
product. Where these scales are quantised once more, they are a byte each, with a 4-byte scale for
each 256 and a table of 256 numbers.

On the CPU the 8-bit product is scaled in FP32, with three tables of its size beside it. Where the
processor has AVX512-BF16, a 4-bit weight is packed anew at its first product, which takes 7 bytes a
weight, and products are in BF16.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from theloom.errors import ModelError
from theloom.model.weight_format import NF4_BLOCK, PACKED_ROWS
from theloom.precision import torch_dtype

log = logging.getLogger(__name__)


def check_runs_on_the_cpu(model: nn.Module) -> None:
    """Check that bitsandbytes' product for 4-bit weights on this CPU takes their widths.

    Args:
        model: quantised.

    Raises:
        ModelError: it does not take those of a layer.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    for name, layer in layers if packed_on_the_cpu() else ():
        for what, found, unit in (
            ("width", layer.in_features, NF4_BLOCK),
            ("number of rows", layer.out_features, PACKED_ROWS),
        ):
            if found % unit:
                raise ModelError(
                    f"bitsandbytes runs 4-bit weights on this CPU where their {what} is a "
                    f"multiple of {unit}, "
                    f"which that of {name} is not; set memory.quantization=8bit or null"
                )


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers of a real model, and of the scales that bitsandbytes keeps
    beside them.

    Args:
        model: on any device.

    Returns:
        Bytes, tied tensors once.
    """
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(held.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in [*model.parameters(), *model.buffers()]:
        yield from with_scales(tensor)
    for module in model.modules():
        found = [getattr(getattr(module, "state", None), name, None) for name in ("CB", "SCB")]
        yield from (v for v in found if isinstance(v, torch.Tensor))


def with_scales(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A weight and what bitsandbytes keeps beside it, before the first product.

    Args:
        tensor: a parameter or buffer.

    Yields:
        The tensor, then its scales; none where it is not quantised.
    """
    yield tensor
    yield from (
        v for name in ("CB", "SCB") if isinstance(v := getattr(tensor, name, None), torch.Tensor)
    )
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        parts = vars(state)
        yield from (v for v in parts.values() if isinstance(v, torch.Tensor))
        state = parts.get("state2")


def packed_on_the_cpu() -> bool:
    """Whether bitsandbytes packs 4-bit weights anew for this CPU's AVX-512 BF16.

    Returns:
        True where the CPU has it.
    """
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own switch


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """Have transformers load in this thread, so that at most one tensor waits in host memory for
    its device.
    """
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before


def bitsandbytes_config(bits: str, compute: str, stays: list[str] | None = None) -> Any:
    """Make the config of bitsandbytes.

    Args:
        bits: `8bit` or `4bit` (NF4).
        compute: the precision of products with 4-bit weights; 8-bit ones compute in FP16.
        stays: names of modules that are not quantised; None: those that it finds.

    Returns:
        A `BitsAndBytesConfig`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"memory.quantization={bits} needs bitsandbytes: pip install 'theloom[quantization]'"
        )
    if bits == "8bit":
        # it says at every product of every layer that it computes in float16
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        log.info("8-bit weights: bitsandbytes computes their products in float16")
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=stays)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch_dtype(compute),
        llm_int8_skip_modules=stays,
    )
