"""Decoders of codes: models of which a position is several codes at once, one of each codebook of
an audio codec, as those of MusicGen.

A decoder of codes takes `input_ids` of (batch, position, codebook), so that all else cuts, pads and
batches positions as it does token ids. Where it is given (batch, position) it takes each id for the
code of every codebook, so that all that tries, traces and measures a model on token ids does the
same with it.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import side_of
from theloom.errors import CorpusError, ModelError
from theloom.model.checkpoint.halves import remade

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# by model type, the class of transformers without a head; AutoModel knows none of their configs
_CLASSES = {
    "musicgen_decoder": "MusicgenModel",
    "musicgen_melody_decoder": "MusicgenMelodyModel",
}


def codebooks(config: "PretrainedConfig") -> int:
    """The codes of a position.

    Args:
        config: of a model.

    Returns:
        How many; 0: a position is one token id.

    Examples:
        >>> from transformers import GPT2Config, MusicgenConfig
        >>> codebooks(MusicgenConfig().decoder), codebooks(GPT2Config())
        (4, 0)
    """
    return int(getattr(config, "num_codebooks", 0)) if config.model_type in _CLASSES else 0


def decoder_of(config: "PretrainedConfig") -> "PretrainedConfig | None":
    """The decoder of codes of a model that has an encoder of texts and a codec around it.

    Args:
        config: of the model.

    Returns:
        The part of the config that is the decoder's; None where the model is of another kind.

    Examples:
        >>> from transformers import GPT2Config, MusicgenConfig
        >>> decoder_of(MusicgenConfig()).model_type, decoder_of(GPT2Config())
        ('musicgen_decoder', None)
    """
    part = getattr(config, "decoder", None)
    return part if getattr(part, "model_type", None) in _CLASSES else None


def check_corpus(count: int, source: str, given: bool) -> None:
    """Check that the corpus of a model of codes has codes.

    Args:
        count: codes of a position.
        source: the model, for the message.
        given: whether `corpus.input_ids` is set.

    Raises:
        CorpusError: it has texts.
    """
    if not given:
        raise CorpusError(
            f"model.source: {source} reads {count} codes a position, and the corpus has texts; set "
            f"corpus.input_ids to a column of codes, [{count}, frames] each"
        )


def codes_class(config: "PretrainedConfig") -> Any:
    """The class of a decoder of codes.

    Args:
        config: of the model, with `codebooks`.

    Returns:
        A class with the names of weights of that of transformers, without a head.

    Raises:
        ModelError: hook points are named as those of a half.
    """
    import transformers

    if side := side_of(config):
        raise ModelError(
            f"{config.model_type} is one list of blocks: name its hook points without {side!r}, as "
            "blocks.0.hook_resid_post"
        )
    return _class_of(getattr(transformers, _CLASSES[config.model_type]), codebooks(config))


@cache
def _class_of(whole: Any, count: int) -> Any:
    def forward(self: Any, input_ids: Any = None, **given: Any) -> Any:
        return whole.forward(self, input_ids=_folded(input_ids, count), **given)

    return remade(whole, forward=forward)


def _folded(ids: Any, count: int) -> Any:
    """Codes as transformers has them, (batch x codebooks, position)."""
    codes = ids[..., None].expand(*ids.shape, count) if ids.ndim == 2 else ids
    return codes.transpose(1, 2).reshape(-1, ids.shape[1])
