"""Tiny vision-language models with their processors, conversations with images, and the hidden
states of the plain models of transformers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 270,
    "max_position_embeddings": 512,
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_LLAVA = {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _CLIP}
_PINPOINTS = [[64, 32], [32, 64], [64, 64]]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
_QWEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {**_LLAVA, "image_token_id": 256},
    "llava_next": {**_LLAVA, "image_token_id": 256, "image_grid_pinpoints": _PINPOINTS},
    "qwen2_vl": {
        "text_config": {**_TEXT, **_QWEN_IDS, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        "image_token_id": 256,
        "video_token_id": 257,
        "vision_start_token_id": 258,
        "vision_end_token_id": 259,
    },
    "gemma3": {
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "vision_config": {**_CLIP, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 256,
        "boi_token_index": 258,
        "eoi_token_index": 259,
    },
}
_OF_QWEN = {**_QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}

# its code looks at values, of grids and of cut lengths
WINDOWED = {
    "qwen2_5_vl": {
        **CONFIGS["qwen2_vl"],
        "vision_config": {**_OF_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
    },
}
# adds something of the images to the stream between its blocks
ADDING = {
    "qwen3_vl": {
        **CONFIGS["qwen2_vl"],
        "text_config": {**CONFIGS["qwen2_vl"]["text_config"], "head_dim": 8},
        "vision_config": {
            **_OF_QWEN,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
    },
}
_CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
_COUNTED = {"patch_size": 8, "vision_feature_select_strategy": "default"}
_COUNTED |= {"num_additional_image_tokens": 1, "image_token": "<image>"}
_QWEN = {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 4096}

# the config of the image processor, and that of the whole
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {"image_processor_type": "CLIPImageProcessor", **_CROPPED},
        {"processor_class": "LlavaProcessor", **_COUNTED},
    ),
    "llava_next": (
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": _PINPOINTS,
            **_CROPPED,
        },
        {"processor_class": "LlavaNextProcessor", **_COUNTED},
    ),
    "qwen2_vl": ({"image_processor_type": "Qwen2VLImageProcessor", **_QWEN}, {}),
    "gemma3": (
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
}
ADDED = {
    "llava": ["<image>", "<s>"],
    "llava_next": ["<image>", "<s>"],
    "qwen2_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "gemma3": ["<image_soft_token>", "<bos>", "<start_of_image>", "<end_of_image>", "<turn>"],
}
_OF_LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] if c['type'] == 'image' %}<image>\n"
    "{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def _in_turn(image: str, begin: str = "", turn: str = "<turn>") -> str:
    """A template that writes the parts of a message in their order."""
    return (
        f"{begin}{{% for m in messages %}}{turn}{{{{ m['role'] }}}}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        f"{{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
        f"{{% if add_generation_prompt %}}{turn}assistant\n{{% endif %}}"
    )


TEMPLATES = {
    "llava": _OF_LLAVA,
    "llava_next": _OF_LLAVA,
    "qwen2_vl": _in_turn("<|vision_start|><|image_pad|><|vision_end|>", turn="##"),
    "gemma3": _in_turn("<start_of_image>", "{{ bos_token }}"),
}


def build(kind: str, folder: Path, **sizes: int) -> Path:
    """Write a tiny vision-language model, its tokenizer and its processor into a folder."""
    torch.manual_seed(0)
    numbers = (CONFIGS | WINDOWED | ADDING)[kind]
    numbers = numbers | {"text_config": numbers["text_config"] | sizes}
    if kind.startswith("qwen"):  # whose vision part ends in the width of the text
        ends = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
        width = {ends: sizes.get("hidden_size", 32)}
        numbers |= {"vision_config": numbers["vision_config"] | width}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **numbers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:  # parts that begin as zeros would hide a fault
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    _save_tokenizer(kind, folder)
    images, whole = PROCESSORS[_like(kind)]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if whole:
        (folder / "processor_config.json").write_text(json.dumps(whole))
    return folder


def _like(kind: str) -> str:
    """The kind that has the same tokens and processor."""
    return "qwen2_vl" if kind.startswith("qwen") else kind


def _save_tokenizer(kind: str, folder: Path) -> None:
    kind = _like(kind)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ADDED[kind])
    named: dict[str, Any] = {}
    if "<s>" in ADDED[kind]:  # which the template does not write
        named = {"bos_token": "<s>"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 257)]
        )
    if kind == "gemma3":
        names = ("image_token", "boi_token", "eoi_token")
        tokens = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
        named = {
            "bos_token": "<bos>",
            "extra_special_tokens": dict(zip(names, tokens, strict=True)),
        }
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATES[kind], **named
    ).save_pretrained(folder)


def image_part(name: str) -> dict[str, str]:
    return {"type": "image", "path": name}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def write_chats(folder: Path) -> Path:
    """Write images of several sizes, and conversations that show none, one or two of them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, shape in enumerate([(40, 64, 3), (30, 30), (33, 90, 4)]):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    says = {"role": "assistant", "content": [text_part("A cat")]}
    chats = [
        [{"role": "user", "content": [image_part("0.png"), text_part("What?")]}, says],
        [{"role": "user", "content": [text_part("No image, " * 20)]}, says],
        [
            {"role": "user", "content": [text_part("See "), image_part("1.png"), text_part("é")]},
            says,
            {"role": "user", "content": [image_part("2.png"), text_part("and?")]},
            says,
        ],
        [{"role": "user", "content": [text_part("x")]}],
    ]
    lines = [json.dumps({"messages": messages}) for messages in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def messages_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The conversations of a folder that `write_chats` wrote."""
    lines = (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def opened(folder: Path, messages: list[dict[str, Any]]) -> list[Image.Image]:
    """The images of a conversation."""
    parts = [part for message in messages for part in message["content"]]
    return [Image.open(folder / p["path"]).convert("RGB") for p in parts if p["type"] == "image"]


def plain_inputs(
    kind: str, model: Path, folder: Path, messages: list[dict[str, Any]]
) -> dict[str, Any]:
    """The inputs of a conversation by transformers alone: the model's processor; where that needs
    torchvision, its image processor, and the tokens of the images counted by hand.
    """
    images = opened(folder, messages)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if _like(kind) != "qwen2_vl":
        own: Any = transformers.AutoProcessor.from_pretrained(model)
        special = not text.startswith("<bos>")
        return dict(
            own(text=text, images=images or None, add_special_tokens=special, return_tensors="pt")
        )
    if not images:
        return dict(tokenizer(text, return_tensors="pt"))
    of_images: Any = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    found = dict(of_images(images, return_tensors="pt"))
    first, *rest = text.split("<|image_pad|>")
    for grid, piece in zip(found["image_grid_thw"].prod(-1).tolist(), rest, strict=True):
        first += "<|image_pad|>" * (grid // 4) + piece
    found |= dict(tokenizer(first, return_tensors="pt"))
    return found | {"mm_token_type_ids": (found["input_ids"] == 256).long()}


def plain_states(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every residual of the language model by the whole model with its LM head."""
    kept = []
    last = model.model.language_model.layers[-1]
    handle = last.register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    handle.remove()
    found = {f"blocks.{i}.hook_resid_pre": states[i][0] for i in range(3)}
    found |= {f"blocks.{i}.hook_resid_post": states[i + 1][0] for i in range(2)}
    return found | {"blocks.2.hook_resid_post": kept[0][0] if kept[0].ndim == 3 else kept[0]}
