"""Whether the weights of a model's files are those of its class."""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model.checkpoint.classes import has_own_code, model_class
from theloom.model.checkpoint.folder import StoredTensor, stored_tensors, weight_files
from theloom.model.checkpoint.inner_keys import load_without_bytes
from theloom.model.checkpoint.key_mapping import key_mapping
from theloom.model.weight_format import quantization_config
from theloom.rows.modality import half_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


log = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")

# Weights of files that no hook point reads: buffers that models compute anew, poolers and heads,
# and blocks that predict several tokens at once. transformers knows others by their class.
_UNREAD = re.compile(
    r"(^|\.)(position_ids|token_type_ids|causal_mask|num_batches_tracked)$"
    r"|rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"
    r"|\.(attn|attention|self_attn|self_attention)\.(masked_)?bias$"
    r"|(^|\.)(lm_heads?|pooler|mtp|mtp_layers|mtp_block)\."
)

# weights that change others, wherever they lie
_CHANGES = re.compile(
    r"(^|\.)(lora_|ia3_|base_layer\.|base_model\.|modules_to_save\.)|(?<!logit)_scale(_inv)?$"
    r"|\.q(weight|zeros)$"
)


def tensors_in(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of the files that transformers loads, without their bytes.

    Args:
        folder: of the model.
        config: the `model` settings.

    Returns:
        Type and shape of each, by its key.

    Raises:
        ModelError: a file is broken.
    """
    import torch

    found = stored_tensors(folder, config)
    for file in weight_files(folder, config) if not found else ():
        try:
            # maps an archive, and reads a file of the format before it
            tensors = torch.load(file, map_location="meta", weights_only=True)
            found |= {k: StoredTensor(_type(t), tuple(t.shape)) for k, t in tensors.items()}
        except Exception as error:  # whatever torch raises at a file is a fault of its bytes
            raise ModelError(
                f"model.source: {config.source}: {file.name} cannot be read: "
                f"{' '.join(str(error).split())}"
            ) from None
    return found


def _type(tensor: "torch.Tensor") -> str:
    """The type of a tensor, as safetensors names floats."""
    import torch

    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    names = dict(zip(floats, _FLOATS, strict=True))
    return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def check_stored(model_config: "PretrainedConfig", folder: Path, config: ModelConfig) -> None:
    """Load a model without bytes, by the headers of its files alone, and check it as a loaded one.

    A folder's own code and quantised weights are checked when they are loaded.

    Args:
        model_config: of the model.
        folder: of the model.
        config: the `model` settings.

    Raises:
        ModelError: a file is broken; or weights are missing, left over, or of another shape or type
            than the model's.
    """
    stored = tensors_in(folder, config)
    if not stored or has_own_code(model_config, config.trust_remote_code):
        return
    if quantization_config(model_config):
        return
    model_class(model_config)  # raises where there is none
    try:
        mapping = key_mapping(model_config, stored)
        model, info = load_without_bytes(model_config, stored, mapping)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers raises at a config is a fault of its values
        raise ModelError(
            f"model.source: {config.source}: cannot be built by its config: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    check_loaded(model, info, config.source, stored)
    _check_types(model, info, stored, config.source)


def _check_types(
    model: "nn.Module", info: Mapping[str, Any], stored: Mapping[str, StoredTensor], source: str
) -> None:
    """Weights of floating point are stored so: integers and 8-bit floats have scales."""
    # by the ends of their names, whose beginnings files may have otherwise
    integers = {
        n.rpartition(".")[2] for n, t in model.state_dict().items() if not t.is_floating_point()
    }
    wrong = [
        key
        for key, tensor in sorted(stored.items())
        if tensor.dtype not in _FLOATS
        and key not in info["unexpected_keys"]
        and not _UNREAD.search(key)
        and key.rpartition(".")[2] not in integers
    ]
    if wrong:
        raise ModelError(
            f"model.source: {source} stores {len(wrong)} weights as {stored[wrong[0]].dtype} "
            f"({_few_names(wrong)}), and its config.json has no quantization_config that says how "
            "to read them; take the unquantised weights, in FP32, FP16 or BF16"
        )


def check_loaded(
    model: "nn.Module", info: Mapping[str, Any], source: str, stored: Collection[str] = ()
) -> None:
    """Check what became of the weights of files.

    Args:
        model: the loaded model.
        info: what `from_pretrained(…, output_loading_info=True, ignore_mismatched_sizes=True)`
            gives.
        source: the model's name, for messages.
        stored: the keys of the files, where they are known.

    Raises:
        ModelError: weights of the model are missing or have another shape, or weights of the files
            are left over that are of no part which hook points do not need.
    """
    name = type(model).__name__
    missing = [
        key
        for key in sorted(info["missing_keys"])
        if not key.startswith("pooler.")  # after all hook points
        and not _is_computed(key, model)
    ]
    if missing:
        raise ModelError(
            f"model.source: {source} lacks {len(missing)} weights of {name} ({missing[0]}, …); "
            "its files are incomplete or of another architecture"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, in_file, by_config = mismatched[0]
        raise ModelError(
            f"model.source: {source} has {len(mismatched)} weights of another shape than "
            f"its config says ({key}: "
            f"{tuple(in_file)} in the files, {tuple(by_config)} by the config); they are "
            "not of one model"
        )
    unexpected = sorted(info["unexpected_keys"])
    others = [key for key in unexpected if not _is_unread(key, model, stored or unexpected)]
    if others:
        raise ModelError(
            f"model.source: {source} has {len(others)} weights that have no place in {name}, as "
            f"its config.json has it ({_few_names(others)}); its rows would be another model's: "
            "correct the config, or take the weights that belong to it"
        )
    if unexpected:
        log.info("not read, as no hook point needs them: %s", _few_names(unexpected))


def _is_computed(key: str, model: "nn.Module") -> bool:
    """Whether a missing weight is a table of sines, which its module makes by itself (Marian)."""
    try:
        owner = model.get_submodule(key.rpartition(".")[0])
    except AttributeError:  # a part that the model has not
        return False
    return "Sinusoidal" in type(owner).__name__


def _is_unread(key: str, model: Any, stored: Collection[str]) -> bool:
    """Whether a weight without a place in the model is of a part that no hook point reads.

    That is a head: what lies next to the model itself where keys have its prefix, else what is in
    none of its parts.
    """
    if half_of(model.config) and key.split(".")[0] not in dict(model.named_children()):
        return True  # of the other half
    if _CHANGES.search(key):
        return False
    if _UNREAD.search(key) or _predicts_more(key, model):
        return True
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if any(other.startswith(prefix) for other in stored):
        return not key.startswith(prefix)
    return key.split(".")[0] not in dict(model.named_children())


def _predicts_more(key: str, model: Any) -> bool:
    """Whether a weight is of a block behind the last, one that predicts further tokens."""
    text = model.config.get_text_config()
    more = getattr(text, "num_nextn_predict_layers", None) or 0
    match = re.search(r"(^|\.)layers\.(\d+)\.", key)
    blocks = getattr(text, "num_hidden_layers", None)
    return match is not None and blocks is not None and blocks <= int(match[2]) < blocks + more


def _few_names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, … {names[-1]}"
