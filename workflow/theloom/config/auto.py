"""What the value `auto` of a key stands for, where that follows from other values alone."""

import re
from collections.abc import Iterable

from theloom.config.schema import Config
from theloom.errors import ConfigError

SIDES = ("encoder.", "decoder.")  # how the names of hook points of an encoder-decoder begin

# How the name of a hook point in a block begins: what stands before the number, and the number,
# which in filters may count from the end.
OF_BLOCK = re.compile(r"^((?:encoder\.|decoder\.)?blocks\.|stages\.)(-?\d+)\.")

_STAGES = "stages."  # how the names of hook points in stages begin


def side(filters: Iterable[str]) -> str | None:
    """The half of an encoder-decoder that hook points name.

    Args:
        filters: Names of hook points or globs.

    Returns:
        `encoder`, `decoder`, or None where the names are those of a model of one list of blocks.

    Raises:
        ConfigError: They name both halves, or one half and a model of one list of blocks.

    Examples:
        >>> side(["decoder.blocks.*.hook_resid_post", "decoder.blocks.0.hook_cross_attn_out"])
        'decoder'
        >>> side(["blocks.*.hook_resid_post"]) is None
        True
    """
    first = {
        half: entry
        for entry in filters
        for half in (entry.partition(".")[0] if entry.startswith(SIDES) else "",)
    }
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise ConfigError(
            f"memory.activation_cache_filter: {one} and {other} have rows of different tokens; "
            "make a run for the encoder and another for the decoder"
        )
    return next(iter(first), "") or None


def stages(filters: Iterable[str]) -> list[str]:
    """The hook points in stages that a filter names.

    Args:
        filters: Names of hook points or globs.

    Returns:
        All of them; none where they are those of a model of one list of blocks.

    Raises:
        ConfigError: They name both kinds.

    Examples:
        >>> stages(["stages.1.hook_out"]), stages(["blocks.*.hook_resid_post"])
        (['stages.1.hook_out'], [])
    """
    entries = list(filters)
    found = [entry for entry in entries if entry.startswith(_STAGES)]
    if found and len(found) < len(entries):
        other = next(entry for entry in entries if entry not in found)
        raise ConfigError(
            f"memory.activation_cache_filter: {found[0]} is of a model in stages and {other} of "
            "one of blocks; name hook points of one kind"
        )
    return found


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
