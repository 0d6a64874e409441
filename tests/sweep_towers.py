"""Models of images and audio in the sweep: a processor of their own kind, files to read, and the
halves of models that compare those to texts.
"""

import json
from contextlib import suppress
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from towers_support import processed
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
)

# kind of the sweep: what that half of a model reads, and the configs that it may have
HALVES = {
    "image-half": ("images", ("vision_config", "image_config")),
    "audio-half": ("audio", ("audio_config", "speech_config")),
    "text-half": ("text", ("text_config",)),
}
READS = {"pixel_values": "images", "input_values": "audio", "input_features": "audio"}
# Halves have no processor of their own name: that of the whole model, or of what they come from
_ENDS = ("_vision_model", "_vision", "_encoder", "_audio", "_vit_model", "_hiera_det_model")
# ViT's processor takes the place of theirs: it needs torchvision (DINOv3), or makes images of
# several sizes for a model in stages
_BY_VIT = ("dinov3_vit", "glpn")


@cache
def halves() -> dict[str, dict[str, str]]:
    """Kind of half, model type and class of all models that compare images or audio to texts."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in HALVES}
    for model_type, classes in modeling_auto.MODEL_MAPPING_NAMES.items():
        name = classes if isinstance(classes, str) else classes[0]
        parts = set(CONFIG_MAPPING[model_type].sub_configs)
        kinds = [kind for kind, (_, configs) in HALVES.items() if parts.intersection(configs)]
        if len(kinds) > 1 and hasattr(getattr(transformers, name), "get_text_features"):
            for kind in kinds:
                found[kind][model_type] = name
    return found


def half_of(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The module of a model that is one half of it.

    Args:
        model: The whole.
        kind: Of `HALVES`.

    Returns:
        The outermost module that has the half's config.

    Raises:
        LookupError: None has it.
    """
    config = next(c for n in HALVES[kind][1] if (c := getattr(model.config, n, None)) is not None)
    for module in model.modules():
        own = getattr(module, "config", None)
        if module is not model and type(own) is type(config):
            return module
    raise LookupError(f"{type(model).__name__} has no module for its {type(config).__name__}")


def write_processor(model: PreTrainedModel, model_type: str, reads: str, folder: Path) -> None:
    """Write the config of a processor of this model type, for inputs of the tiny model's size.

    Args:
        model: The tiny model.
        model_type: Its name in transformers.
        reads: `images` or `audio`.
        folder: Of the model.

    Raises:
        LookupError: Transformers names no processor that works without torchvision.
    """
    names: dict[str, Any] = (
        image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
        if reads == "images"
        else feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING_NAMES
    )
    if model_type == "wav2vec2-bert":  # its checkpoints name another one than transformers' table
        names = names | {model_type: "SeamlessM4TFeatureExtractor"}
    found = next((names[n] for n in _owners(model_type) if n in names), None)
    if found is None and "grid_thw" in signature(model.forward).parameters:
        found = names["qwen2_vl"]
    if found is None and reads == "images":
        found = {"pil": "ViTImageProcessorPil"}
    if model_type in _BY_VIT:
        found = {"pil": "ViTImageProcessorPil"}
    name = found.get("pil") if isinstance(found, dict) else found
    if name is None:
        raise LookupError(f"transformers has no processor without torchvision for {model_type}")
    settings = _of_images(model) if reads == "images" else _of_audio(model)
    processor = next(filter(None, (_made(name, kept, reads) for kept in settings)), None)
    if processor is None:
        raise LookupError(f"{name} does not take {reads} by its default settings")
    written = json.loads(processor.to_json_string())
    key = "image_processor_type" if reads == "images" else "feature_extractor_type"
    written[key] = name.removesuffix("Pil")
    (folder / "preprocessor_config.json").write_text(json.dumps(written))


def plain_inputs(model: PreTrainedModel, file: Path, folder: Path, reads: str) -> dict[str, Any]:
    """What a model is given of a file: all that its processor makes and it has an argument for.

    Args:
        model: The tower itself.
        file: An image or a clip.
        folder: Of the processor.
        reads: `images` or `audio`.

    Returns:
        Tensors by the names of its forward.
    """
    takes = signature(model.forward).parameters
    made = processed(file, folder, reads, "input_features_mask" in takes)
    if reads == "images" and made["pixel_values"].ndim == 5:  # one tile
        made["pixel_values"] = made["pixel_values"][:, 0]
        made.pop("pixel_attention_mask", None)
    if "grid_thw" in takes and "pixel_values" not in takes:
        made["hidden_states"] = made["pixel_values"]
    for name in list(made):
        made[name.removeprefix("image_")] = made[name]
        made[f"pixel_{name.removeprefix('image_')}"] = made[name]
    if "input_features_mask" in takes:
        made["input_features_mask"] = made["attention_mask"]
    return {name: value for name, value in made.items() if name in takes}


def _owners(model_type: str) -> list[str]:
    whole = [model_type.removesuffix(end) for end in _ENDS if model_type.endswith(end)]
    return [model_type, model_type.replace("_", "-"), *whole]


def _made(name: str, settings: dict[str, Any], reads: str) -> Any:
    """A processor with these settings; None if it does not take them, or an input."""
    value = np.zeros((48, 32, 3), "u1") if reads == "images" else np.zeros(16000, "f4")
    more = {} if reads == "images" else {"sampling_rate": 16000}
    try:
        made = getattr(transformers, name)
        if getattr(made, "do_image_splitting", False):
            side = {"longest_edge": settings.get("size", {}).get("height", 364)}
            settings = {"do_image_splitting": False, "size": side, "max_image_size": side}
        if getattr(made, "pad_size", None) and "height" in settings.get("size", {}):
            square = settings["size"]
            settings = {"size": {"longest_edge": square["height"]}, "pad_size": square}
        processor = made(**settings)
        processor(value, return_tensors="pt", **more)
    except ImportError:
        raise
    except Exception:
        return None
    return processor


def _of_images(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Settings to try, those for the size of the tiny model first."""
    size = getattr(model.config, "image_size", None)
    if size is None:
        size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if isinstance(size, list | tuple):
        height, width = size
    elif isinstance(size, int):
        height = width = size
    elif getattr(model.config, "hidden_size", None):
        sizes = {
            "patch_size": "patch_size",
            "merge_size": "spatial_merge_size",
            "temporal_patch_size": "temporal_patch_size",
        }
        own = {
            n: v for n, c in sizes.items() if isinstance(v := getattr(model.config, c, None), int)
        }
        return [own, {}]
    else:  # stages of a model that takes any size
        height = width = 64
    square = {"height": height, "width": width}
    return [
        {"size": square, "crop_size": square},
        {"size": {"shortest_edge": height}, "crop_size": square, "do_center_crop": True},
        {"size": {"shortest_edge": height}},
        {},
    ]


def spread(model: PreTrainedModel) -> None:
    """Give batch norms the statistics of an image of noise, where a model has any: values of random
    weights else vanish from stage to stage.

    Args:
        model: The tiny model, which is changed.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if not norms or model.main_input_name != "pixel_values":
        return

    def look(norm: torch.nn.Module, args: tuple) -> None:
        norm.running_mean = args[0].mean((0, 2, 3))
        norm.running_var = args[0].var((0, 2, 3)) + 1e-30

    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    size = getattr(model.config, "image_size", None)
    sides = size if isinstance(size, list | tuple) else (size or 64, size or 64)
    with torch.no_grad(), suppress(Exception):  # what takes other inputs stays as it is
        model(pixel_values=torch.randn(2, getattr(model.config, "num_channels", 3), *sides))
    for handle in handles:
        handle.remove()


def resolutions(model: PreTrainedModel, inputs: dict[str, Any]) -> list[list[int]]:
    """The entries of a model's own hidden states by their number of positions.

    Args:
        model: The tiny model.
        inputs: What its processor makes of an image.

    Returns:
        Their numbers, together where a run can have them together.
    """
    groups: dict[int, list[int]] = {}
    for number, state in enumerate(stage_states(model, inputs)):
        width = state.shape[1 if state.ndim == 4 and not _channels_last(model) else -1]
        groups.setdefault(state.numel() // width, []).append(number)
    return list(groups.values())


def stage_states(model: PreTrainedModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Every entry of a model's own hidden states, as plain transformers gives them.

    Args:
        model: The tiny model.
        inputs: What its processor makes of an image.

    Returns:
        Maps (1, channels, height, width) or (1, height, width, channels), or (1, positions,
        channels).
    """
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True)
    names = ("hidden_states", "encoder_hidden_states", "vision_hidden_states")
    states = next(s for name in names if (s := getattr(output, name, None)) is not None)
    flat = [e for s in states for e in (s if isinstance(s, tuple | list) else [s])]
    return [state for state in flat if isinstance(state, torch.Tensor)]


def positions(model: PreTrainedModel, state: torch.Tensor) -> torch.Tensor:
    """A hidden state as rows, (positions, channels)."""
    if state.ndim == 3:
        return state[0]
    return (state[0] if _channels_last(model) else state[0].permute(1, 2, 0)).flatten(0, 1)


def _channels_last(model: PreTrainedModel) -> bool:
    """Whether a model has its maps as (height, width, channels): SAM's alone."""
    return type(model).__name__.startswith("Sam")


def _of_audio(model: PreTrainedModel) -> list[dict[str, Any]]:
    config = model.config
    bins, positions = (getattr(config, n, None) for n in ("num_mel_bins", "max_source_positions"))
    settings: dict[str, Any] = {}
    if isinstance(bins, int):
        settings["feature_size"] = bins
    if isinstance(positions, int) and positions % 50 == 0:
        settings["chunk_length"] = positions // 50
    return [settings, {}]
