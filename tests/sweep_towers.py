"""Models of images and audio in the sweep: a processor of their own kind, and files to read."""

import json
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers
from PIL import Image
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
    for kept in (settings, {}):
        try:
            processor = getattr(transformers, name)(**kept)
            break
        except (TypeError, ValueError):
            if not kept:
                raise
    written = json.loads(processor.to_json_string())
    key = "image_processor_type" if reads == "images" else "feature_extractor_type"
    written[key] = name.removesuffix("Pil")
    (folder / "preprocessor_config.json").write_text(json.dumps(written))


def _owners(model_type: str) -> list[str]:
    whole = [model_type.removesuffix(end) for end in _ENDS if model_type.endswith(end)]
    return [model_type, model_type.replace("_", "-"), *whole]


def _of_images(model: PreTrainedModel) -> dict[str, Any]:
    size = getattr(model.config, "image_size", None)
    if isinstance(size, list | tuple):
        height, width = size
    elif isinstance(size, int):
        height = width = size
    else:
        return {}
    square = {"height": height, "width": width}
    return {"size": square, "crop_size": square}


def _of_audio(model: PreTrainedModel) -> dict[str, Any]:
    bins = getattr(model.config, "num_mel_bins", None)
    return {"feature_size": bins} if isinstance(bins, int) else {}


def inputs_of(file: Path, folder: Path, reads: str, main: str) -> dict[str, torch.Tensor]:
    """What plain transformers gives the model for a file."""
    own: Any
    if reads == "images":
        own = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        made = own(Image.open(file).convert("RGB"), return_tensors="pt")
    else:
        own = transformers.AutoFeatureExtractor.from_pretrained(folder)
        values, rate = soundfile.read(file, dtype="float32")
        made = own(values, sampling_rate=rate, return_tensors="pt")
    return {main: made[main]}
