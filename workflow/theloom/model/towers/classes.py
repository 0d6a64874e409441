"""Towers: models of images or audio, and the halves of models that compare those to texts.

A tower of images or audio also takes `input_ids`, of which only the number of windows and of rows
counts: it then makes an input of its own of that size. So all that tries, traces and measures a
model on token ids does the same with a tower. Extraction gives it what the processor made.
"""

import sys
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import mark_side, mark_stages, side_of, stages_of
from theloom.errors import ModelError
from theloom.model.checkpoint.codes import decoder_of
from theloom.model.checkpoint.halves import keep_encoder, remade
from theloom.model.towers import chat, decoder, processor
from theloom.model.towers.trial_inputs import trial_inputs
from theloom.rows.modality import (
    CHAT,
    SENSED,
    TEXT,
    mark,
    mark_half,
    mark_source,
    modality_of,
    source_of,
)
from theloom.rows.tower_inputs import Sample, samples_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

_OF_ANY = {"images": ("pixel_values",), "audio": ("input_values", "input_features")}
_HALVES = {
    "images": ("vision_config", "image_config"),
    "audio": ("audio_config", "speech_config"),
    TEXT: ("text_config",),
}


def chosen(
    config: "PretrainedConfig",
    modality: str | None,
    folder: "Path",
    source: str,
    side: str | None = None,
) -> "PretrainedConfig":
    """The config of the tower that a run reads, or of the decoder behind it, marked as such.

    Args:
        config: of the model in the folder.
        modality: `images`, `audio` or `chat`; None: texts.
        folder: of the model, where its processor is.
        source: the model, for messages.
        side: `encoder` or `decoder` where that half of an encoder-decoder is read.

    Returns:
        The config itself where the model reads the modality as a whole; a part of it for one half
        of a model that compares images or audio to texts.

    Raises:
        ModelError: the model does not read the modality.
    """
    whole = class_of(config)
    found: Any
    if modality == CHAT:
        return chat.chosen(config, whole, source)
    if modality is None and (of_codes := decoder_of(config)) is not None:
        mark_half(of_codes, config.model_type)
        return of_codes
    if whole is None:
        return config
    own, compares = _modality(whole), hasattr(whole, "get_text_features")
    if modality is None and not compares and (own is None or _takes_ids(whole)):
        return config
    if modality is None and not config.is_encoder_decoder and _writes(config):
        return config  # Whisper's decoder by itself
    half: Any = whole
    behind = side == "decoder" and own == modality and decoder.has_decoder(whole)
    if behind:
        found = config
    elif own == modality and not compares:
        found = _blocks_of(config)
        if found is not config:
            half = class_of(found)
            mark_half(found, config.model_type)
    elif compares:
        found = _half(config, modality or TEXT)
        half = None if found is None else class_of(found)
        if half is None or _modality(half) != modality:
            if modality is None:
                return config
            raise _reads_other(config, whole, modality, source)
        if modality is None:
            _check_no_captions(config, half, source)
        mark_half(found, config.model_type)
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
    samples: tuple[Sample, ...] = ()
    if processor.has_processor(folder):
        samples = processor.load_processor(folder, modality, source, half).samples
    (mark_source if behind else mark)(found, modality, samples)
    return found


def _blocks_of(config: "PretrainedConfig") -> Any:
    """The config that has the blocks: that of the encoder, where a model of audio has its head's
    beside it.
    """
    inner: Any = getattr(config, "encoder_config", None)
    if getattr(config, "num_hidden_layers", None) or inner is None or class_of(inner) is None:
        return config
    return inner


def _half(config: "PretrainedConfig", modality: str) -> Any:
    """The config of one half of a model; None where it has none."""
    return next((c for n in _HALVES[modality] if (c := getattr(config, n, None)) is not None), None)


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
        name = type(config).__name__.removesuffix("Config")
        return getattr(transformers, f"{name}Model", None) or getattr(transformers, name, None)
    return found[0] if isinstance(found, list | tuple) else found


def _modality(of_class: Any) -> str | None:
    """What a class of transformers reads, by the name of its main input; None: texts."""
    main = _main_input(of_class)
    if main == "hidden_states" and "grid_thw" in signature(of_class.forward).parameters:
        return "images"
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


def _writes(config: Any) -> bool:
    return any(name.endswith("ForCausalLM") for name in config.architectures or ())


def _check_no_captions(config: Any, half: Any, source: str) -> None:
    """Check that a text half reads texts alone. BLIP's captioners have its weights too, and their
    forward makes a decoder of it, behind an image. Raises ModelError.
    """
    writes = ("ForConditionalGeneration", "ForQuestionAnswering")
    named = next((a for a in config.architectures or () if a.endswith(writes)), None)
    if named is not None and "is_decoder" in signature(half.forward).parameters:
        raise ModelError(
            f"model.source: {source} is a {named}, whose texts are read behind an image alone; "
            f"give a checkpoint that compares images to texts, such as {class_of(config).__name__}"
        )


def _reads_other(config: Any, whole: Any, modality: str, source: str) -> ModelError:
    own = _modality(whole) or "texts"
    if hasattr(whole, "get_text_features"):
        halves = {kind: _half(config, kind) for kind in _HALVES}
        own = " and ".join(
            "texts" if kind == TEXT else kind
            for kind, half in halves.items()
            if half is not None
            and (c := class_of(half))
            and _modality(c) == (None if kind == TEXT else kind)
        )
    return ModelError(
        f"model.source: {source} ({config.model_type}) reads {own}, and the corpus has "
        f"{modality}; give an encoder of {modality}, or another corpus"
    )


def sensing_class(config: "PretrainedConfig", whole: Any) -> Any:
    """The class of a model that is marked as a tower, or as a decoder behind one.

    Args:
        config: of the model.
        whole: the class of transformers, without a head.

    Returns:
        A class that is made from the config as an auto class is.

    Raises:
        ModelError: a half is named of a model that has none, or none of one that has.
    """
    modality, side, samples = modality_of(config), side_of(config), samples_of(config)
    if source := source_of(config):
        return decoder.decoder(whole, _main_input(whole), source, samples)
    if modality in SENSED and hasattr(whole, "get_decoder") and config.is_encoder_decoder:
        if side != "encoder":
            halves = sides_of(config) or ("encoder",)
            sides = " or ".join(f"{half}.blocks.0.hook_resid_post" for half in halves)
            raise ModelError(
                f"{config.model_type}: its encoder reads {modality}; write {sides} in "
                "memory.activation_cache_filter"
            )
    elif side:
        raise ModelError(
            f"{config.model_type} is one list of blocks: name its hook points without "
            f"{side!r}, as blocks.0.hook_resid_post"
        )
    return tower(whole, modality, side, samples, stages_of(config))


def sides_of(config: "PretrainedConfig") -> tuple[str, ...]:
    """The halves that can be read of an encoder-decoder whose encoder reads no texts.

    Args:
        config: of the model.

    Returns:
        `encoder`, or an empty text where the encoder has a config of its own and is read as a model
        of one list of blocks; and `decoder` where that is one of texts. None for any other model.
    """
    if not config.is_encoder_decoder or reads(config) not in SENSED:
        return ()
    encoder = "encoder" if _blocks_of(config) is config else ""
    return (encoder, "decoder") if decoder.has_decoder(class_of(config)) else (encoder,)


@cache
def tower(
    whole: Any,
    modality: str,
    side: str,
    samples: tuple[Sample, ...] = (),
    stages: tuple[str, ...] = (),
) -> Any:
    """The class of a tower.

    Args:
        whole: the class of transformers, without a head.
        modality: `images`, `audio` or `text`.
        side: `encoder` where it is an encoder-decoder, of which the decoder is left out.
        samples: of its input, where its processor is known (`samples_of`).
        stages: the hook points in stages that are read of it.

    Returns:
        A class with the names of weights of the whole one; that of a text half is the same.
    """

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, config, *args, **options)
        mark(self.config, modality, samples)
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
    takes = signature(whole.forward).parameters

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        use_cache: Any = None,
        **given: Any,
    ) -> Any:
        if main not in given:
            given |= trial_inputs(self, *input_ids.shape)
        elif attention_mask is not None and "attention_mask" in takes:
            given["attention_mask"] = attention_mask
        if "use_cache" in takes and not side:
            given["use_cache"] = False
        given = {n: v.to(self.dtype) if _is_float(v) else v for n, v in given.items()}
        _forget(whole)
        return self.encoder(**given) if side else whole.forward(self, **given)

    return forward


def _is_float(value: Any) -> bool:
    return hasattr(value, "is_floating_point") and value.is_floating_point()


def _forget(whole: Any) -> None:
    """Empty what the functions beside a class have kept of passes before, as DINOv3's do: a pass on
    tensors without bytes would leave its own to the next one.
    """
    for function in vars(sys.modules[whole.__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            clear = getattr(cell.cell_contents, "cache_clear", None)
            if clear is not None:
                clear()
