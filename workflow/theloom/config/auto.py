"""What the value `auto` of a key stands for, where that follows from other values alone."""

from theloom.config.schema import Config


def store_precision(config: Config, precision: str) -> str:
    """The precision of the values on disk.

    Args:
        config: Its `store.dtype` is read.
        precision: That of the forward pass, for which `auto` stands.

    Returns:
        `fp32`, `fp16`, `bf16`, `fp8_e4m3` or `int8`.
    """
    requested = config.store.dtype.name
    return precision if requested == "auto" else requested


def traceable_attention(requested: str) -> str | None:
    """The attention implementation of a model that is only traced, on tensors without bytes.

    A trace runs on fake CPU tensors, for which FlashAttention is not built: the default of
    transformers stands in for it, which is fused as well.

    Args:
        requested: A value of `extraction.attention`.

    Returns:
        The name to pass to transformers as `attn_implementation`; None for its default.

    Examples:
        >>> traceable_attention("eager")
        'eager'
        >>> traceable_attention("flash_attention_2") is None
        True
    """
    return None if requested in ("auto", "flash_attention_2") else requested
