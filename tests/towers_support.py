"""Tiny models of images and audio with their processors, the files that they read, and the hidden
states of the plain models of transformers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}
_TEXT = {**_SIZES, "vocab_size": 300, "max_position_embeddings": 40}
_SOUND = {
    **_SIZES,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 8],
    "conv_stride": [10, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 100,
    "vocab_size": 99,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}


@dataclass(frozen=True)
class Tower:
    """A kind of model: the config and the processor of a folder, what it reads, and the part of the
    whole model whose blocks are read.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    reads: str = "images"
    part: str = ""
    side: str = ""


def _image(name: str, **settings: Any) -> dict[str, Any]:
    return {"image_processor_type": name, "size": {"height": 32, "width": 32}, **settings}


_CLIP = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
_FREE = {"do_center_crop": False, "do_resize": False}
_RAW = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000}
_MEL = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 2}

TOWERS = {
    "vit": Tower(_IMAGE, _image("ViTImageProcessor")),
    "dinov2": Tower(_IMAGE, _image("BitImageProcessor", **_CLIP)),
    "dinov2_with_registers": Tower(_IMAGE, _image("BitImageProcessor", **_CLIP)),
    "siglip_vision_model": Tower(_IMAGE, _image("SiglipImageProcessor")),
    "siglip": Tower(
        {"vision_config": _IMAGE, "text_config": _TEXT},
        _image("SiglipImageProcessor"),
        part="vision_model",
    ),
    "clip": Tower(
        {"vision_config": _IMAGE, "text_config": _TEXT},
        _image("CLIPImageProcessor", **_CLIP),
        part="vision_model",
    ),
    "wav2vec2": Tower(_SOUND, {**_RAW, "do_normalize": True}, "audio"),
    "wav2vec2-stable": Tower(
        {**_SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        {**_RAW, "do_normalize": True, "return_attention_mask": True},
        "audio",
    ),
    "hubert": Tower(_SOUND, {**_RAW, "do_normalize": False}, "audio"),
    "whisper": Tower(_WHISPER, _MEL, "audio", part="encoder", side="encoder."),
    "altclip": Tower(  # its files call weights otherwise than its halves
        {"vision_config": _IMAGE, "text_config": {**_TEXT, "project_dim": 32}},
        _image("CLIPImageProcessor", **_CLIP),
        part="vision_model",
    ),
    "siglip2_vision_model": Tower(
        {**_SIZES, "patch_size": 8, "num_patches": 16},
        {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16},
    ),
    "qwen2_5_vl_vision": Tower(
        {
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 8,
            "merge_size": 2,
            "min_pixels": 256,
            "max_pixels": 4096,
        },
    ),
    "parakeet_encoder": Tower(
        {
            **_SIZES,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 400,
        },
        {"feature_extractor_type": "ParakeetFeatureExtractor", "feature_size": 16},
        "audio",
    ),
}


# its processor needs torchvision, which `make test` does not install
DINOV3 = Tower({**_IMAGE, "num_register_tokens": 2}, _image("DINOv3ViTImageProcessor"))


def tower_of(kind: str) -> Tower:
    """A kind of model by its name."""
    return DINOV3 if kind == "dinov3_vit" else TOWERS[kind]


def build(kind: str, folder: Path) -> Path:
    """Write a tiny model, and the config of its processor, into a folder."""
    tower = tower_of(kind)
    config = transformers.AutoConfig.for_model(kind.partition("-")[0], **tower.config)
    torch.manual_seed(0)
    whole = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in whole.parameters():  # parts that begin as zeros would hide a fault
            parameter.add_(torch.randn_like(parameter) * 0.02)
    whole.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(tower.processor))
    return folder


def write_media(folder: Path, reads: str) -> Path:
    """Write images of several sizes and kinds, or clips of several lengths, into a folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    if reads == "images":
        for number, shape in enumerate(
            [(32, 32, 3), (40, 64, 3), (90, 33, 4), (50, 50), (8, 8, 3)]
        ):
            values = random.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(values).save(folder / f"image{number}.png")
        return folder
    for number, count in enumerate([16000, 4801, 20011, 16000, 3203]):
        soundfile.write(folder / f"clip{number}.wav", random.normal(0, 0.1, count), 16000)
    return folder


def processed(
    file: Path, folder: Path, reads: str, masked: bool = False
) -> dict[str, torch.Tensor]:
    """What the processor of a folder makes of an image or a clip."""
    own: Any
    if reads == "images":
        own = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return dict(own(Image.open(file).convert("RGB"), return_tensors="pt"))
    own = transformers.AutoFeatureExtractor.from_pretrained(folder)
    values, rate = soundfile.read(file, dtype="float32")
    more = {"return_attention_mask": True} if masked else {}
    return dict(own(values, sampling_rate=rate, return_tensors="pt", **more))


def plain_states(folder: Path, kind: str, file: Path) -> dict[str, torch.Tensor]:
    """Every residual of one file by the plain model of transformers and its own processor."""
    tower = tower_of(kind)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    part = model.get_submodule(tower.part)
    inputs = processed(file, folder, tower.reads)
    if "image_grid_thw" in inputs:
        inputs = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
    kept = []
    lists = [m for m in part.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    lists[-1][-1].register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = part(**inputs, output_hidden_states=True).hidden_states
    states = [s.reshape(-1, s.shape[-1]) for s in (*states[:3], kept[0])]  # patches may be a list
    found = {f"blocks.{i}.hook_resid_pre": states[i] for i in range(3)}
    found |= {f"blocks.{i}.hook_resid_post": states[i + 1] for i in range(3)}
    return {tower.side + name: value for name, value in found.items()}
