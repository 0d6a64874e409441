"""How weights are held: their precision, and their quantisation, as requested or as stored."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from theloom.config.schema import Config
from theloom.errors import ModelError
from theloom.precision import BYTES

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Layouts of bitsandbytes. NF4: two weights a byte, and one absolute maximum for each block of
# weights; with double quantisation these scales are bytes themselves, with a maximum for each block
# of scales and a table of 256 values. LLM.int8(): a byte a weight, and a scale for each output row.
NF4_BLOCK = 64  # weights of one scale
SCALES_BLOCK = 256  # scales of one second-level scale
SCALES_TABLE = 256  # entries of the table that doubly quantised scales index
PACKED_ROWS = 32  # the kernel for CPUs takes weights whose output rows are a multiple of it


def nf4_scales(count: int, double: bool = False) -> list[tuple[int, int]]:
    """The tensors that NF4 keeps next to packed weights.

    Args:
        count: The number of weights of one matrix.
        double: Whether the scales are quantised too.

    Returns:
        Of each tensor its elements and the bytes of one.

    Examples:
        >>> nf4_scales(6400, double=False)
        [(100, 4)]
    """
    scales = -(-count // NF4_BLOCK)
    if not double:
        return [(scales, 4)]
    return [(scales, 1), (-(-scales // SCALES_BLOCK), 4), (SCALES_TABLE, 4)]


def quantized_bytes(quantization: str, count: int, rows: int, double: bool = False) -> int:
    """Bytes of a linear layer's quantised weight, scales included.

    Args:
        quantization: `int8` or `int4`.
        count: The number of weights.
        rows: The number of output rows, each of which has one scale in `int8`.
        double: Whether the scales of `int4` are quantised too.

    Returns:
        The bytes, by the layout of bitsandbytes 0.50.

    Examples:
        >>> quantized_bytes("int8", 64 * 64, rows=64)
        4352
        >>> quantized_bytes("int4", 64 * 64, rows=64)
        2304
    """
    if quantization == "int8":
        return count + 4 * rows
    return -(-count // 2) + sum(n * size for n, size in nf4_scales(count, double))


def quantizing_bytes(quantization: str, count: int, precision_bytes: int) -> int:
    """Bytes of a GPU that quantising a weight takes next to the result.

    bitsandbytes copies the weight to the GPU in the model's precision, and LLM.int8() converts it
    to FP16 as well.

    Args:
        quantization: `int8` or `int4`.
        count: The number of weights.
        precision_bytes: Bytes of one weight in the precision from which it is quantised.

    Returns:
        Bytes, beside the result.

    Examples:
        >>> quantizing_bytes("int8", 1000, precision_bytes=2)
        4000
    """
    return count * (precision_bytes + (2 if quantization == "int8" else 0))


def quantized_by_checkpoint(model_config: "PretrainedConfig") -> str | None:
    """Tell how a checkpoint is quantised.

    Args:
        model_config: of the checkpoint.

    Returns:
        `8bit` or `4bit` where bitsandbytes has quantised it; None where it is as it was trained.

    Raises:
        ModelError: another kind of quantisation, whose sizes are not known here.
    """
    said = quantization_config(model_config)
    method = said.get("quant_method")
    method = str(getattr(method, "value", method) or "an unnamed method")
    if not said or method == "gguf":  # GGUF is made whole when it is converted
        return None
    if not method.startswith("bitsandbytes"):
        raise ModelError(
            f"its weights are quantised by {method}, and TheLoom knows the memory of "
            "bitsandbytes alone; take its unquantised weights, with memory.quantization "
            "where they are too large"
        )
    return "4bit" if said.get("load_in_4bit") or said.get("_load_in_4bit") else "8bit"


def quantization_config(model_config: "PretrainedConfig") -> dict[str, Any]:
    """Read what a checkpoint says of its quantisation.

    Args:
        model_config: of the checkpoint.

    Returns:
        Plain values by name; empty where it is not quantised.
    """
    said: Any = getattr(model_config, "quantization_config", None) or {}
    return said if isinstance(said, dict) else said.to_dict()


def quantization_of(config: Config, found: "PretrainedConfig") -> str | None:
    """Find how a checkpoint is quantised itself.

    Args:
        config: the run's config.
        found: the model's.

    Returns:
        `8bit` or `4bit`; None where it is not.

    Raises:
        ModelError: the run's config asks for another.
    """
    own = quantized_as(found)
    requested = requested_quantization(config)
    if own is not None and requested not in (None, own):
        raise ModelError(
            f"memory.quantization={requested}: the weights of {config.model.source} are "
            f"quantised to {own} already; "
            "leave memory.quantization=null, or take the unquantised weights"
        )
    return own


@dataclass(frozen=True)
class WeightFormat:
    """How weights are held: their precision, and the quantisation of the linear layers, `int8` or
    `int4`.
    """

    precision: str
    quantization: str | None = None

    @property
    def name(self) -> str:
        """One of fp32, fp16, bf16; int8, int4 (other weights in 16 bits); int8+fp32, int4+fp32."""
        if self.quantization is None:
            return self.precision
        return (
            self.quantization
            if BYTES[self.precision] == 2
            else f"{self.quantization}+{self.precision}"
        )


WEIGHT_FORMATS = {
    kind.name: kind
    for kind in (
        *(WeightFormat(precision) for precision in BYTES),
        WeightFormat("bf16", "int8"),
        WeightFormat("bf16", "int4"),
        WeightFormat("fp32", "int8"),
        WeightFormat("fp32", "int4"),
    )
}


def weight_format_of(config: Config, precision: str, own: str | None = None) -> WeightFormat:
    """Find the format of the weights of a run.

    Args:
        config: the run's config.
        precision: what `precision_mode` was resolved to.
        own: the checkpoint's own quantisation, `8bit` or `4bit`.

    Returns:
        The format.
    """
    return weight_format_as(precision, own or requested_quantization(config))


def requested_quantization(config: Config) -> str | None:
    """The quantisation that a config asks for.

    Args:
        config: of a run.

    Returns:
        `8bit`, `4bit` or None.
    """
    return config.memory.quantization.name if config.memory.quantization else None


def weight_format_as(precision: str, bits: str | None) -> WeightFormat:
    """Make the format of weights.

    Args:
        precision: `fp32`, `fp16` or `bf16`.
        bits: `8bit`, `4bit` or None.

    Returns:
        The format.

    Examples:
        >>> weight_format_as("bf16", "4bit").name
        'int4'
    """
    return WeightFormat(precision, None if bits is None else {"8bit": "int8", "4bit": "int4"}[bits])


def quantized_as(model_config: "PretrainedConfig") -> str | None:
    """As `quantized_by_checkpoint`, without torch where the checkpoint is not quantised.

    Args:
        model_config: of the checkpoint.

    Returns:
        `8bit`, `4bit` or None.

    Raises:
        ModelError: a kind not known.
    """
    if getattr(model_config, "quantization_config", None) is None:
        return None

    return quantized_by_checkpoint(model_config)
