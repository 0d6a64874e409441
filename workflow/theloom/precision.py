"""Which precision a run uses: the fallback chain BF16 → FP16 → FP32, with every step recorded.

The thresholds are those of NVIDIA's CUDA programming guide, table "Feature Support per Compute
Capability": bfloat16 arithmetic from 8.0, float16 arithmetic from 5.3.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

BF16_CAPABILITY = (8, 0)
FP16_CAPABILITY = (5, 3)

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# What only the store has: a row of codes of one byte, each times the row's scale, which is FP32. By
# type the largest code that is a number.
SCALED = {"fp8_e4m3": 448, "int8": 127}
SCALE_BYTES = 4

# The format in which `verify` computes the rounding error of another.
FINER = {"fp32": "fp64", "fp16": "fp32", "bf16": "fp32"}

# Largest error, as a share of a hook point's largest absolute value, that the order of
# floating-point sums explains. FP32: at most 4e-6 was seen between chunked and whole forwards; 16
# bits: a few units in the last place.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}


@dataclass(frozen=True)
class Resolved:
    """A resolved precision.

    Attributes:
        requested: What was requested: auto, fp32, fp16 or bf16.
        resolved: What is used: fp32, fp16 or bf16.
        steps: A message for each fallback between them.
    """

    requested: str
    resolved: str
    steps: tuple[str, ...]


def choose_precision(
    requested: str,
    capability: tuple[int, int] | None,
    cpu_has_fp16: bool = True,
    lacking: Collection[str] | None = None,
) -> Resolved:
    """As `follow`, and log a warning for each fallback.

    Args:
        requested: as of `follow`; so are the others.
        capability: the CUDA compute capability; None for all but NVIDIA's GPUs.
        cpu_has_fp16: whether this build of torch runs FP16 on the CPU.
        lacking: what a GPU that is not NVIDIA's was found to lack; None: it is no such GPU.

    Returns:
        The precision, with the steps that led to it.

    Examples:
        >>> choose_precision("fp16", None).resolved
        'fp16'
    """
    choice = follow(requested, capability, cpu_has_fp16, lacking)
    for step in choice.steps:
        log.warning("precision_mode=%s: %s", requested, step)
    return choice


def follow(
    requested: str,
    capability: tuple[int, int] | None,
    cpu_has_fp16: bool = True,
    lacking: Collection[str] | None = None,
) -> Resolved:
    """Follow the fallback chain BF16 → FP16 → FP32 on a device.

    Args:
        requested: auto, fp32, fp16 or bf16. On the CPU auto is FP32.
        capability: The CUDA compute capability; None for the CPU, which always has BF16, and for
            GPUs that are not NVIDIA's.
        cpu_has_fp16: Whether this build of torch runs FP16 on the CPU (`cpu_has_fp16`).
        lacking: What a GPU that is not NVIDIA's was found to lack; None: it is no such GPU.

    Returns:
        The precision, with the steps that led to it.

    Examples:
        >>> follow("bf16", (7, 5)).resolved
        'fp16'
        >>> follow("auto", None).resolved
        'fp32'
        >>> follow("auto", None, lacking=["bf16"]).resolved
        'fp16'
    """
    steps: list[str] = []
    if lacking is not None:
        precision = "bf16" if requested == "auto" else requested
        for short, instead in (("bf16", "fp16"), ("fp16", "fp32")):
            if precision == short and short in lacking:
                steps.append(f"{short} is not available on this GPU: using {instead}")
                precision = instead
    elif capability is None:
        precision = "fp32" if requested == "auto" else requested
        if precision == "fp16" and not cpu_has_fp16:
            steps.append("fp16 is not available on this CPU: using fp32")
            precision = "fp32"
    else:
        precision = "bf16" if requested == "auto" else requested
        version = f"{capability[0]}.{capability[1]}"
        if precision == "bf16" and capability < BF16_CAPABILITY:
            steps.append(
                f"bf16 needs compute capability 8.0 or more, this GPU has {version}: using fp16"
            )
            precision = "fp16"
        if precision == "fp16" and capability < FP16_CAPABILITY:
            steps.append(
                f"fp16 needs compute capability 5.3 or more, this GPU has {version}: using fp32"
            )
            precision = "fp32"
    return Resolved(requested, precision, tuple(steps))


def torch_dtype(precision: str) -> "torch.dtype":
    """The torch dtype of a precision.

    Args:
        precision: `fp64`, `fp32`, `fp16` or `bf16`.

    Returns:
        The dtype.

    Examples:
        >>> torch_dtype("bf16")
        torch.bfloat16
    """
    import torch

    return {
        "fp64": torch.float64,
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
    }[precision]


def row_bytes(store: str, elements: int) -> int:
    """The size on disk of a row of one hook point.

    Args:
        store: the precision of the store: `fp32`, `fp16`, `bf16`, `fp8_e4m3` or `int8`.
        elements: of the row.

    Returns:
        Bytes, with the scale where the row has one.

    Examples:
        >>> row_bytes("bf16", 576), row_bytes("int8", 576)
        (1152, 580)
    """
    return elements + SCALE_BYTES if store in SCALED else elements * BYTES[store]


def read_as(store: str) -> str:
    """The precision in which stored rows are read.

    Args:
        store: the precision of the store.

    Returns:
        `fp32` for rows with a scale, which are decoded; else the same.

    Examples:
        >>> read_as("fp8_e4m3"), read_as("bf16")
        ('fp32', 'bf16')
    """
    return "fp32" if store in SCALED else store


def handed(store: str, computed: str) -> str:
    """The precision in which rows are handed to the writer, which then encodes them.

    Args:
        store: the precision of the store.
        computed: that of the forward pass.

    Returns:
        That of the forward pass where rows get a scale; else that of the store.

    Examples:
        >>> handed("int8", computed="bf16"), handed("fp16", computed="fp32")
        ('bf16', 'fp16')
    """
    return computed if store in SCALED else store


def precision_of(dtype: "torch.dtype") -> str:
    """The inverse of `torch_dtype`.

    Args:
        dtype: float32, float16 or bfloat16.

    Returns:
        `fp32`, `fp16` or `bf16`.

    Examples:
        >>> precision_of(torch_dtype("fp16"))
        'fp16'
    """
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[
        str(dtype).removeprefix("torch.")
    ]


def cpu_has_fp16() -> bool:
    """Whether this build of torch runs the operations of a forward pass in float16 on the CPU.

    Returns:
        False where an operation raises; tried anew at each call.
    """
    import torch

    x = torch.ones(1, 1, 8, 8, dtype=torch.float16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch.nn.functional.layer_norm(torch.nn.functional.linear(x, x[0, 0]), (8,))
    except RuntimeError:
        return False
    return True
