"""The halves of an encoder-decoder: a class whose forward pass is the encoder's, or the decoder's
behind its encoder.

A half takes `input_ids` and `attention_mask` of its own tokens, as a model of one list of blocks
does, so that all else reads, traces and checks it as one. The decoder takes the encoder's tokens
besides, as `source_ids` and `source_mask`.
"""

from functools import cache
from inspect import signature
from typing import Any

from theloom.config.model_dims import mark_side
from theloom.errors import ModelError

SOURCE_IDS, SOURCE_MASK = "source_ids", "source_mask"

# tokens of a source where a trial of the decoder gives none: the first ones of its own
_OF_A_TRIAL = 8


def has_halves(whole: Any) -> bool:
    """Whether a class is one of an encoder-decoder that reads token ids in both halves.

    Args:
        whole: of transformers.

    Returns:
        True by the arguments of its forward.
    """
    names = signature(whole.forward).parameters
    return "input_ids" in names and "decoder_input_ids" in names


@cache
def half(whole: Any, side: str) -> Any:
    """The class of one half of an encoder-decoder. That of the encoder has no decoder.

    Args:
        whole: the class of transformers, without a head.
        side: `encoder` or `decoder`.

    Returns:
        A class with the names of weights of the whole one.

    Raises:
        ModelError: it is no encoder-decoder of text.
    """
    if not has_halves(whole):
        raise ModelError(
            f"{whole.__name__} is no encoder-decoder of token ids: name its hook points without "
            f"{side!r}, as blocks.0.hook_resid_post"
        )

    def build(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)
        mark_side(self.config, side)
        if not all(hasattr(self, name) for name in ("encoder", "decoder")):
            raise ModelError(
                f"{whole.__name__} keeps its {side} where TheLoom does not know it: its hook "
                "points cannot be read"
            )
        if side == "encoder":
            keep_encoder(self)
            # FSMT gives a part of its decoder
            self.get_output_embeddings = lambda: None

    return remade(whole, build, _of_encoder if side == "encoder" else _of_decoder(whole))


def remade(whole: Any, build: Any = None, forward: Any = None) -> Any:
    """A class in the place of one of transformers, with its name and its names of weights.

    Args:
        whole: the class of transformers.
        build: its `__init__`; None: that of the whole.
        forward: its forward pass; None: that of the whole.

    Returns:
        The class, which can be made from a config as an auto class is.
    """

    def from_config(cls: Any, config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        return cls._from_config(config, **options)

    given = {"__init__": build, "forward": forward}
    parts: dict[str, Any] = {name: own for name, own in given.items() if own is not None}
    parts["from_config"] = classmethod(from_config)
    return type(whole.__name__, (whole,), {"__module__": whole.__module__, **parts})


def keep_encoder(model: Any) -> None:
    """Take the decoder out of an encoder-decoder.

    Args:
        model: of transformers, which is changed.
    """
    from theloom.model.pruning import leave_out

    leave_out(model, ["decoder"])
    if isinstance(model._tied_weights_keys, dict):
        model._tied_weights_keys = {
            name: source
            for name, source in model._tied_weights_keys.items()
            if not (name.startswith("decoder.") or source.startswith("decoder."))
        }
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"(^|\.)decoder\.",
    }


def _of_encoder(
    self: Any, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None, **more: Any
) -> Any:
    return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more)


def _of_decoder(whole: Any) -> Any:
    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        source_ids: Any = None,
        source_mask: Any = None,
        use_cache: Any = None,
        **more: Any,
    ) -> Any:
        if source_ids is None:
            source_ids = input_ids[:, :_OF_A_TRIAL]
        return whole.forward(
            self,
            input_ids=source_ids,
            attention_mask=source_mask,
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            use_cache=False,
            **more,
        )

    return forward
