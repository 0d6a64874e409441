"""Weights that are called otherwise in the files than in the class that they are loaded into."""

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from theloom.model.checkpoint.classes import model_class
from theloom.model.checkpoint.inner_keys import without_inner_part
from theloom.model.checkpoint.limits import bounded_build
from theloom.rows.modality import TEXT, half_of, modality_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# words in the names of modules, where both halves of a model are of one class
_WORDS = {"images": ("vision", "image"), "audio": ("audio", "speech"), TEXT: ("text",)}


def key_mapping(model_config: "PretrainedConfig", stored: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a model's files that `from_pretrained` would not know: those of a head that stands
    for an embedding, those of one half of the model in the files, and those with one more part
    (`without_inner_part`).

    Args:
        model_config: of the model.
        stored: the tensors in its files, which have a `shape`, by their keys.

    Returns:
        Patterns of keys and what to call them, as `key_mapping` of `from_pretrained` takes them.
    """
    found = _of_half(model_config, stored) | _tied_heads(model_config, stored)
    return without_inner_part(model_config, stored, found) | found


def _of_half(model_config: "PretrainedConfig", stored: Collection[str]) -> dict[str, str]:
    """The prefix under which the files have all weights of a half."""
    import torch
    from transformers import initialization

    if not stored or not half_of(model_config):
        return {}
    with bounded_build(), torch.device("meta"), initialization.meta_device_safe_creation_ops():
        made = model_class(model_config)._from_config(model_config)
    names, keys = list(made.state_dict()), set(stored)
    prefixes = [key.removesuffix(names[0]) for key in sorted(keys) if key.endswith(f".{names[0]}")]
    if len(prefixes) > 1:
        words = _WORDS[modality_of(model_config)]
        prefixes = [p for p in prefixes if any(word in p for word in words)]
    if names[0] in keys or len(prefixes) != 1:
        return {}
    return {**_of_whole(model_config), f"^{re.escape(prefixes[0])}": ""}


def _of_whole(model_config: "PretrainedConfig") -> dict[str, str]:
    """What transformers calls otherwise in the files of the whole model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: dict[str, str] = {}
    for change in get_checkpoint_conversion_mapping(half_of(model_config)) or ():
        if type(change) is WeightRenaming:
            found |= dict(zip(change.source_patterns, change.target_patterns, strict=True))
    return found


def _tied_heads(model_config: "PretrainedConfig", stored: Collection[str]) -> dict[str, str]:
    """Weights of a head that stand for those of the model that they are tied to, where the files
    have the head's alone.
    """
    import transformers
    from transformers import AutoModel

    if not stored or type(model_config) not in AutoModel._model_mapping:
        return {}
    if not getattr(model_config.get_text_config(), "tie_word_embeddings", False):
        return {}
    mapping = transformers.AutoModelForCausalLM._model_mapping
    heads = [getattr(transformers, name, None) for name in model_config.architectures or ()]
    heads += [mapping[type(model_config)]] if type(model_config) in mapping else []
    inside = _ties(model_class(model_config))
    for head, embedding in ((h, e) for c in heads for h, e in _ties(c).items()):
        prefix = f"{model_class(model_config).base_model_prefix}."
        names = {embedding, embedding.removeprefix(prefix)}
        names |= {tied for tied, source in inside.items() if source in names}
        names |= {prefix + name for name in names}
        # files may have them below other modules than the class has
        ends = {".".join(name.split(".")[-2:]) for name in names}
        there = {key for key in stored if ".".join(key.split(".")[-2:]) in ends} - {head}
        if head in stored and head not in names and not there:
            return {f"^{re.escape(head)}$": embedding}
    return {}


def _ties(of_class: Any) -> Mapping[str, str]:
    found = getattr(of_class, "_tied_weights_keys", None)
    return found if isinstance(found, dict) else {}
