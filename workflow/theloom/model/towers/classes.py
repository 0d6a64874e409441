"""Towers: models of images or audio, and the halves of models that compare those to texts.

A tower of images or audio also takes `input_ids`, of which only the number of windows and of rows
counts: it then makes an input of its own of that size. So all that tries, traces and measures a
model on token ids does the same with a tower. Extraction gives it what the processor made.
"""

import math
import sys
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import mark_side, mark_stages, stages_of
from theloom.errors import ModelError
from theloom.model.checkpoint.halves import keep_encoder, remade
from theloom.model.towers import chat, processor
from theloom.rows.modality import CHAT, SENSED, TEXT, image_shape, input_shape, mark, modality_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

_OF_ANY = {"images": ("pixel_values",), "audio": ("input_values", "input_features")}
_HALVES = {"images": "vision_config", "audio": "audio_config", TEXT: "text_config"}
_SECONDS = 1.0  # of sound in a trial that asks for no more rows than that has
_LONGEST_SECONDS = 30.0  # of sound that a run is planned for where it names no number of rows
_RATE = 16_000  # samples a second that models of raw sound take

# parameters that stand before the patches as rows of their own
_ROWS_BEFORE = ("cls_token", "class_embedding", "register_tokens", "distillation_token")


def chosen(
    config: "PretrainedConfig", modality: str | None, folder: "Path", source: str
) -> "PretrainedConfig":
    """The config of the tower that a run reads, marked as such.

    Args:
        config: of the model in the folder.
        modality: `images`, `audio` or `chat`; None: texts.
        folder: of the model, where its processor is.
        source: the model, for messages.

    Returns:
        The config itself where the model reads the modality as a whole; a part of it for one half
        of a model that compares images or audio to texts.

    Raises:
        ModelError: the model does not read the modality.
    """
    whole = class_of(config)
    if modality == CHAT:
        return chat.chosen(config, whole, source)
    if whole is None:
        return config
    found: Any
    own, compares = _modality(whole), hasattr(whole, "get_text_features")
    if modality is None and not compares and (own is None or _takes_ids(whole)):
        return config
    if own == modality and not compares:
        found = config
    elif compares:
        found = getattr(config, _HALVES[modality or TEXT], None)
        half = None if found is None else class_of(found)
        if half is None or _modality(half) != modality:
            if modality is None:
                return config
            raise _reads_other(config, whole, modality, source)
    elif modality is None:
        raise ModelError(
            f"model.source: {source} ({config.model_type}) reads {own}, and the corpus has "
            f"texts; set corpus={own} and corpus.path"
        )
    else:
        raise _reads_other(config, whole, modality, source)
    if modality is None:
        mark(found, TEXT)
        return found
    shape = None
    if processor.has_processor(folder):
        shape = processor.load_processor(folder, modality, source).shape
    mark(found, modality, shape)
    return found


def reads(config: "PretrainedConfig") -> str | None:
    """What a model reads, by its class alone.

    Args:
        config: of the model.

    Returns:
        `images` or `audio`; None for texts, and where it reads both.
    """
    whole = class_of(config)
    if whole is None or hasattr(whole, "get_text_features") or _takes_ids(whole):
        return None
    return _modality(whole)


def class_of(config: "PretrainedConfig") -> Any:
    """The class of transformers for a config, which `AutoModel` does not know for some halves.

    Args:
        config: of a model, or of half of one.

    Returns:
        A class without a head; None where transformers has none of that name.
    """
    import transformers

    found: Any = transformers.AutoModel._model_mapping.get(type(config), None)
    if found is None:
        return getattr(transformers, type(config).__name__.replace("Config", "Model"), None)
    return found[0] if isinstance(found, list | tuple) else found


def _modality(of_class: Any) -> str | None:
    """What a class of transformers reads, by the name of its main input; None: texts."""
    main = _main_input(of_class)
    return next((kind for kind, names in _OF_ANY.items() if main in names), None)


def _main_input(of_class: Any) -> str:
    """The name of a class's main input: that of its forward's first argument, where the name that
    it says is not among the arguments.
    """
    said = str(getattr(of_class, "main_input_name", "input_ids"))
    takes = list(signature(of_class.forward).parameters)[1:]
    return said if said in takes or not takes else takes[0]


def _takes_ids(of_class: Any) -> bool:
    return "input_ids" in signature(of_class.forward).parameters


def _reads_other(config: Any, whole: Any, modality: str, source: str) -> ModelError:
    own = _modality(whole) or "texts"
    return ModelError(
        f"model.source: {source} ({config.model_type}) reads {own}, and the corpus has "
        f"{modality}; give an encoder of {modality}, or another corpus"
    )


@cache
def tower(
    whole: Any,
    modality: str,
    side: str,
    shape: tuple[int, ...] | None = None,
    stages: tuple[str, ...] = (),
) -> Any:
    """The class of a tower.

    Args:
        whole: the class of transformers, without a head.
        modality: `images`, `audio` or `text`.
        side: `encoder` where it is an encoder-decoder, of which the decoder is left out.
        shape: of its input, where its processor makes one alone (`input_shape`).
        stages: the hook points in stages that are read of it.

    Returns:
        A class with the names of weights of the whole one; that of a text half is the same.
    """

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, config, *args, **options)
        mark(self.config, modality, shape)
        mark_stages(self.config, stages)
        if side:
            mark_side(self.config, side)
            keep_encoder(self)

    made = remade(whole, build, _forward(whole, side) if modality in SENSED else None)
    if modality in SENSED:
        made.main_input_name = _main_input(whole)
    return made


def _forward(whole: Any, side: str) -> Any:
    main = _main_input(whole)

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        use_cache: Any = None,
        **given: Any,
    ) -> Any:
        if main not in given:
            given[main] = trial_input(self, *input_ids.shape)
        given[main] = given[main].to(self.dtype)
        _forget(whole)
        return self.encoder(**given) if side else whole.forward(self, **given)

    return forward


def _forget(whole: Any) -> None:
    """Empty what the functions beside a class have kept of passes before, as DINOv3's do: a pass on
    tensors without bytes would leave its own to the next one.
    """
    for function in vars(sys.modules[whole.__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            clear = getattr(cell.cell_contents, "cache_clear", None)
            if clear is not None:
                clear()


def trial_input(model: Any, windows: int, rows: int) -> "torch.Tensor":
    """An input of a tower that stands for any document.

    Args:
        model: the tower, real or fake.
        windows: how many side by side.
        rows: that each shall have, at least, where the size of the model's input is free.

    Returns:
        (windows, …), in the dtype and on the device of the model, of a few different values.
    """
    import torch

    shape = shape_of(model, rows)
    made = torch.zeros((windows, *shape), dtype=model.dtype, device=model.device)
    for step, value in ((3, 0.9), (5, -0.7), (7, 0.4), (11, -0.3), (13, 0.6)):
        made.view(-1)[::step].fill_(value)
    return made


def shape_of(model: Any, rows: int) -> tuple[int, ...]:
    """The shape of an input that has a number of rows.

    Args:
        model: the tower.
        rows: at least; a model whose input has one size alone has those of that.

    Returns:
        Axes without that of the batch.
    """
    config = model.config
    fixed = input_shape(config)
    if modality_of(config) == "images":
        return _image(model, rows, fixed)
    if fixed is not None:
        return fixed
    if model.main_input_name == "input_features":
        part = getattr(model, "encoder", model)
        strides = [m.stride[0] for m in _convolutions(part, 1)]
        try:
            return config.num_mel_bins, config.max_source_positions * math.prod(strides)
        except AttributeError:
            raise ModelError(
                f"{config.model_type}: takes features of clips of any length, and its config does "
                "not say how many rows they have; TheLoom reads models of raw sound, and those of "
                "features whose clips are padded to one length"
            ) from None
    return (_samples(model, rows),)


def longest_shape(model: Any) -> tuple[int, ...]:
    """The shape of the largest input that a run is planned for where its config names no number.

    Args:
        model: the tower.

    Returns:
        Axes without that of the batch: of an image of the model's own size, of 30 seconds of sound.
    """
    free = modality_of(model.config) == "audio" and input_shape(model.config) is None
    if free and model.main_input_name != "input_features":
        return (int(_LONGEST_SECONDS * _RATE),)
    return shape_of(model, 0)


def _convolutions(module: Any, axes: int) -> list[Any]:
    from torch import nn

    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    return [m for m in module.modules() if isinstance(m, kind)]


def _samples(model: Any, rows: int) -> int:
    """Samples of which the convolutions of a model of raw sound make so many frames."""
    samples = rows
    front = getattr(model, "feature_extractor", None) or getattr(model, "encoder", model)
    for layer in reversed(_convolutions(front, 1)):
        samples = (samples - 1) * layer.stride[0] + layer.kernel_size[0]
    return max(samples, int(_SECONDS * _RATE))


def rows_before(model: Any) -> int:
    """Rows before the patches of an image: the class token and registers.

    Args:
        model: a tower of images.

    Returns:
        Their number.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in _ROWS_BEFORE
    }
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in found.values())


def patch_size(model: Any) -> tuple[int, int] | None:
    """Height and width of a patch, by the convolution that embeds it.

    Args:
        model: a tower of images.

    Returns:
        Pixels; None where no convolution takes patches that do not overlap.
    """
    for layer in _convolutions(model, 2):
        if layer.stride == layer.kernel_size and max(layer.stride) > 1:
            return layer.stride
    return None


def _image(model: Any, rows: int, fixed: tuple[int, ...] | None) -> tuple[int, ...]:
    """Channels, height and width of an image of so many rows."""
    if fixed is not None:
        return fixed
    own, patch = image_shape(model.config), patch_size(model)
    _, height, width = own
    whole: Any = type(model).__mro__[1]
    strict = "interpolate_pos_encoding" in signature(whole.forward).parameters
    wanted = rows - rows_before(model)
    if patch is None or strict or wanted < 4 or stages_of(model.config):
        return own
    if wanted == (height // patch[0]) * (width // patch[1]):
        return own
    height = max((h for h in range(1, math.isqrt(wanted) + 1) if wanted % h == 0), default=1)
    if wanted // height > 4 * height:  # no image is so long: one of some rows more
        height = math.isqrt(wanted)
    return own[0], height * patch[0], -(-wanted // height) * patch[1]
