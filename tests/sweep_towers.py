"""Models of images and audio in the sweep: a processor of their own kind, and files to read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import feature_extraction_auto, image_processing_auto

READS = {"pixel_values": "images", "input_values": "audio", "input_features": "audio"}
# Halves have no processor of their own name: that of the whole model, or of what they come from
_ENDS = ("_vision_model", "_vision", "_encoder", "_audio", "_vit_model", "_hiera_det_model")


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
    found = next((names[n] for n in _owners(model_type) if n in names), None)
    if found is None and reads == "images":
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


def _owners(model_type: str) -> list[str]:
    whole = [model_type.removesuffix(end) for end in _ENDS if model_type.endswith(end)]
    return [model_type, model_type.replace("_", "-"), *whole]


def _made(name: str, settings: dict[str, Any], reads: str) -> Any:
    """A processor with these settings; None if it does not take them, or an input."""
    value = np.zeros((48, 32, 3), "u1") if reads == "images" else np.zeros(16000, "f4")
    more = {} if reads == "images" else {"sampling_rate": 16000}
    try:
        processor = getattr(transformers, name)(**settings)
        processor(value, return_tensors="pt", **more)
    except ImportError:
        raise
    except Exception:
        return None
    return processor


def _of_images(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Settings to try, those for the size of the tiny model first."""
    size = getattr(model.config, "image_size", None)
    if isinstance(size, list | tuple):
        height, width = size
    elif isinstance(size, int):
        height = width = size
    elif getattr(model.config, "hidden_size", None):
        return [{}]
    else:  # stages of a model that takes any size
        height = width = 64
    square = {"height": height, "width": width}
    return [
        {"size": square, "crop_size": square},
        {"size": {"shortest_edge": height}, "crop_size": square},
        {"size": {"shortest_edge": height}},
        {},
    ]


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
