"""Decoders of codes: models of which a position is several codes at once, one of each codebook of
an audio codec, as those of MusicGen.

A decoder of codes takes `input_ids` of (batch, position, codebook), so that all else cuts, pads and
batches positions as it does token ids. Where it is given (batch, position) it takes each id for the
code of every codebook, so that all that tries, traces and measures a model on token ids does the
same with it.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

from theloom.errors import CorpusError, ModelError
from theloom.model.checkpoint.halves import remade

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# by model type, the class of transformers without a head; AutoModel knows none of their configs
_CLASSES = {
    "musicgen_decoder": "MusicgenModel",
    "musicgen_melody_decoder": "MusicgenMelodyModel",
}
_WHOLE = {"musicgen": "Musicgen", "musicgen_melody": "MusicgenMelody"}


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


def check_whole(config: "PretrainedConfig", source: str) -> None:
    """Check that a model is no decoder of codes with its encoder and codec around it.

    Args:
        config: of the model.
        source: the model, for the message.

    Raises:
        ModelError: it is.
    """
    if config.model_type in _WHOLE:
        name = _WHOLE[config.model_type]
        raise ModelError(
            f"model.source: {source} ({config.model_type}) is a decoder of codes together with an "
            f"encoder of texts and a codec; save the decoder by itself: {name}"
            f"ForConditionalGeneration.from_pretrained(...).decoder.save_pretrained(FOLDER), and "
            "set model.source=FOLDER"
        )


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
    """
    import transformers

    return _class_of(getattr(transformers, _CLASSES[config.model_type]), codebooks(config))


@cache
def _class_of(whole: Any, count: int) -> Any:
    def build(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)

    def forward(self: Any, input_ids: Any = None, **given: Any) -> Any:
        return whole.forward(self, input_ids=_folded(input_ids, count), **given)

    return remade(whole, build, forward)


def _folded(ids: Any, count: int) -> Any:
    """Codes as transformers has them, (batch x codebooks, position)."""
    codes = ids[..., None].expand(*ids.shape, count) if ids.ndim == 2 else ids
    return codes.transpose(1, 2).reshape(-1, ids.shape[1])
