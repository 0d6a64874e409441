"""Models of texts with images in them: the language model's rows behind the model's own vision
part.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any

from theloom.errors import ModelError
from theloom.model.checkpoint.halves import remade
from theloom.rows.modality import CHAT, mark

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BOTH = ("input_ids", "pixel_values")


def chosen(config: "PretrainedConfig", whole: Any, source: str) -> "PretrainedConfig":
    """The config of a model that reads conversations with images, marked as such.

    Args:
        config: of the model.
        whole: its class without a head; None: transformers has none.
        source: the model, for messages.

    Returns:
        The config itself.

    Raises:
        ModelError: the model has no vision part, or compares texts to images.
    """
    takes = () if whole is None else signature(whole.forward).parameters
    if not all(name in takes for name in _BOTH) or hasattr(whole, "get_text_features"):
        raise ModelError(
            f"model.source: {source} ({config.model_type}) has no vision part that puts images "
            "into a text, and model.modality is chat; give a vision-language model, or take "
            "model.modality and corpus.images out"
        )
    if config.is_encoder_decoder:
        raise ModelError(
            f"model.source: {source} ({config.model_type}) is an encoder-decoder, whose "
            "conversations with images are not read; give a decoder-only vision-language model"
        )
    mark(config, CHAT)
    return config


@cache
def seeing(whole: Any) -> Any:
    """The class of a model that reads conversations with images.

    Args:
        whole: the class of transformers, without a head.

    Returns:
        A class with its names of weights and its forward pass, which takes pixels of any dtype.
    """

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, config, *args, **options)
        mark(self.config, CHAT)

    @wraps(whole.forward)
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        given = {
            name: value.to(self.dtype) if name.startswith("pixel_values") else value
            for name, value in given.items()
        }
        return whole.forward(self, *args, **given)

    return remade(whole, build, forward)


@contextmanager
def images_placed(model: "PreTrainedModel", given: bool) -> Iterator[None]:
    """Leave out what a model does with the values of token ids, which fake tensors have not: it
    counts those of images, and Qwen's kind gives each a place in the image. The places take the
    same bytes.

    Args:
        model: the model.
        given: whether it is given images; where not, nothing is left out.
    """
    import torch

    modules = {c.__module__ for m in model.modules() for c in type(m).__mro__} if given else ()
    found: list[Any] = [sys.modules[n] for n in modules if hasattr(sys.modules.get(n), _COUNTED)]
    kept = [getattr(module, _COUNTED) for module in found]

    def places(input_ids: Any, *_: Any, **__: Any) -> Any:
        return input_ids.new_zeros(3, *input_ids.shape), torch.zeros_like(input_ids[:, :1])

    placing = given and hasattr(model, _PLACES)
    for module in found:
        setattr(module, _COUNTED, lambda *_: None)
    if placing:
        setattr(model, _PLACES, places)
    try:
        yield
    finally:
        for module, check in zip(found, kept, strict=True):
            setattr(module, _COUNTED, check)
        if placing:
            delattr(model, _PLACES)


_COUNTED, _PLACES = "torch_compilable_check", "get_rope_index"
