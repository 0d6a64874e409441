"""The dimensions of a model, as its config or a profile gives them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from theloom.config.schema import ArchitectureConfig
from theloom.errors import ModelError
from theloom.rows.modality import senses, source_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


LAYERS = 1_000  # at most: the deepest models have a few hundred
SIZE = (1 << 31) - 1  # of a dimension at most, and ids are stored as int32


@dataclass(frozen=True)
class ModelDims:
    """What a config says of a decoder's size. All sizes in elements, `context_length` in tokens (0:
    not said).
    """

    model_type: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    sliding_window: bool = (
        False  # whether the attention of any block sees less than the whole context
    )
    side: str = ""  # encoder or decoder, where it is half of a model
    senses: bool = False  # whether it reads images or audio instead of texts


_SIDE = "theloom_side"  # attribute of a config whose model is read in one half


def mark_side(config: "PretrainedConfig", side: str | None) -> None:
    """Say on a model's config which half of an encoder-decoder is read.

    Args:
        config: Of the model; it is changed.
        side: `encoder`, `decoder`, or None: nothing is said.
    """
    if side:
        setattr(config, _SIDE, side)


def side_of(config: "PretrainedConfig") -> str:
    """The half of an encoder-decoder that is read.

    Args:
        config: Of a model.

    Returns:
        `encoder` or `decoder`; empty where the model is read as one.
    """
    return str(getattr(config, _SIDE, ""))


_STAGES = "theloom_stages"  # attribute of a config whose model is read by its stages


def mark_stages(config: "PretrainedConfig", stages: Sequence[str]) -> None:
    """Say on a model's config that it is read by its stages.

    Args:
        config: Of the model; it is changed.
        stages: The hook filter that names them; empty: it is read by its blocks.
    """
    if stages:
        setattr(config, _STAGES, tuple(stages))


def stages_of(config: "PretrainedConfig") -> tuple[str, ...]:
    """The filter of the hook points in stages that are read of a model.

    Args:
        config: Of a model.

    Returns:
        Names or globs; none where it is read by its blocks.
    """
    return tuple(getattr(config, _STAGES, ()))


_LAYERS = {
    "encoder": ("encoder_num_hidden_layers",),
    "decoder": ("num_decoder_layers", "decoder_layers", "decoder_num_hidden_layers"),
}


def _blocks(text: "PretrainedConfig") -> Any:
    """The number of blocks: of a half that is read by itself its own, where it has one."""
    names = _LAYERS.get(side_of(text), ())
    own = next((n for name in names if (n := getattr(text, name, None))), None)
    return own or getattr(text, "num_hidden_layers", None)


def numbers(config: "PretrainedConfig") -> ModelDims:
    """The numbers of a model's text decoder.

    Args:
        config: Of the model, as transformers reads it.

    Returns:
        Its dimensions, in elements.

    Raises:
        ModelError: The config has no blocks, width or vocabulary, or a number beyond what is
            possible.
    """
    if stages_of(config):  # each has its own width, which a trace tells (`Traced`)
        return ModelDims(config.model_type, 1, 1, 1, 1, 1, 1, 1, 0, senses=True)
    text, sensing = config.get_text_config(), senses(config) or bool(source_of(config))
    if senses(config) and side_of(config) == "encoder":
        text = getattr(config, "encoder_config", None) or text
    blocks = _blocks(text)
    hidden = getattr(text, "hidden_size", None)
    vocabulary = getattr(text, "vocab_size", None)
    if senses(config):
        vocabulary = 1  # patches and frames have no ids
    if not blocks or not hidden or not vocabulary:
        if senses(config):
            raise ModelError(
                f"{config.model_type}: its config has no num_hidden_layers or hidden_size; it is "
                "no transformer of patches or frames that TheLoom can read; an image model in "
                "stages has other hook points (stages.0.hook_out, …), which `theloom hooks` lists"
            )
        raise ModelError(
            f"{config.model_type}: its config has no num_hidden_layers, hidden_size or vocab_size; "
            "it is no model of text tokens that TheLoom can read"
        )
    for name, value, most in (
        ("num_hidden_layers", blocks, LAYERS),
        ("hidden_size", hidden, SIZE),
        ("vocab_size", vocabulary, SIZE),
    ):
        if not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(
                f"{config.model_type}: {name}={str(value)[:40]} in its config is no number from 1 "
                f"to {most:,}; correct it"
            )
    heads = _said(text, "num_attention_heads") or 1
    return ModelDims(
        model_type=config.model_type,
        hidden_size=hidden,
        num_blocks=blocks,
        num_heads=heads,
        num_kv_heads=_said(text, "num_key_value_heads") or heads,
        head_dim=_said(text, "head_dim") or hidden // heads,
        intermediate_size=_said(text, "intermediate_size") or _said(text, "n_inner") or 4 * hidden,
        vocab_size=vocabulary,
        context_length=_context_length(text),
        sliding_window=bool(getattr(text, "sliding_window", None))
        and getattr(text, "use_sliding_window", True),
        side=side_of(config if sensing else text),
        senses=senses(config),
    )


# number positions from one after that of the padding token, so that the first ones are never used
POSITIONS_AFTER_PADDING = (
    *(
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
    ),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def _context_length(text: "PretrainedConfig") -> int:
    own = side_of(text) == "decoder" and getattr(text, "max_target_positions", None)
    limit = max(0, own or getattr(text, "max_position_embeddings", None) or 0)
    if limit and text.model_type in POSITIONS_AFTER_PADDING:
        return max(0, limit - 1 - (text.pad_token_id or 0))
    if getattr(text, "axial_pos_embds", False):
        return _whole_chunks(text, min(limit, math.prod(text.axial_pos_shape)))
    return limit


def _whole_chunks(text: "PretrainedConfig", limit: int) -> int:
    """The tokens that fit positions of which a pass takes whole chunks of attention (Reformer)."""
    chunks = {getattr(text, f"{kind}_attn_chunk_length") or 1 for kind in text.attn_layers}
    return limit - limit % math.lcm(*chunks) or min(limit, *chunks)


def _said(config: "PretrainedConfig", name: str) -> Any:
    """What a config says, the largest where it says something for every block by itself (Gemma 4),
    or None.
    """
    per_block = getattr(config, "per_layer_config", None) or []
    value = max((getattr(c, name, None) or 0 for c in per_block), default=0) or getattr(
        config, name, None
    )
    return max(value) if isinstance(value, list) else value


def dims_of_profile(declared: ArchitectureConfig) -> ModelDims:
    """The same as `numbers`, from what a profile declares, without transformers.

    Args:
        declared: `model.architecture` of the config.

    Returns:
        The model's dimensions, in elements.
    """
    return ModelDims(
        model_type=declared.model_type,
        hidden_size=declared.hidden_size,
        num_blocks=declared.num_hidden_layers,
        num_heads=declared.num_attention_heads,
        num_kv_heads=declared.num_key_value_heads,
        head_dim=declared.head_dim or declared.hidden_size // declared.num_attention_heads,
        intermediate_size=declared.intermediate_size,
        vocab_size=declared.vocab_size,
        context_length=declared.max_position_embeddings,
    )
