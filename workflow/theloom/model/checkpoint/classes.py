"""The class of transformers, or of a folder's own code, that a model loads into."""

from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import side_of
from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model.checkpoint.codes import codebooks, codes_class
from theloom.model.checkpoint.folder import own_model_code
from theloom.model.checkpoint.halves import half, has_halves, remade
from theloom.model.towers.chat import seeing
from theloom.model.towers.classes import class_of, sensing_class
from theloom.rows.modality import CHAT, SENSED, modality_of, source_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Auto classes by which a folder's own code may be known, the first that it has is taken
_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")


def auto_class(model_config: "PretrainedConfig", trust_remote_code: bool = False) -> Any:
    """The Auto class that builds a config's model, without a head where there is one.

    A folder's own code may have the model with a head alone, and is taken with it.

    Args:
        model_config: of the model.
        trust_remote_code: whether code of the model's folder may run.

    Returns:
        A class of transformers, such as `AutoModel`.

    Examples:
        >>> from transformers import GPT2Config
        >>> auto_class(GPT2Config()).__name__
        'AutoModel'
    """
    import transformers

    if own := has_own_code(model_config, trust_remote_code):
        if side_of(model_config) or modality_of(model_config) in (*SENSED, CHAT):
            raise ModelError(
                f"{model_config.model_type}: its class is code of its own folder, of which neither "
                "halves nor towers can be read; set model.ignore_own_code=true where transformers "
                "has the class"
            )
        name = next((n for n in _AUTO_CLASSES if n in own), own[0])
        return getattr(transformers, name)
    if side_of(model_config) or modality_of(model_config) or codebooks(model_config):
        return model_class(model_config)
    if _encoder_alone(model_config) is not None:
        return transformers.AutoModelForTextEncoding
    if _decoder_alone(model_config) is not None:
        return transformers.AutoModelForCausalLM
    if is_whole_encoder_decoder(model_config):
        raise _unnamed(model_config)
    if type(model_config) not in transformers.AutoModel._model_mapping:
        # such as the text half of a model, which has a config of its own
        return _alike(_whole_class(model_config))
    return transformers.AutoModel


def is_whole_encoder_decoder(model_config: "PretrainedConfig") -> bool:
    """Whether a model has an encoder and a decoder of token ids, and neither half is chosen.

    Args:
        model_config: of the model.

    Returns:
        False too where the folder holds one half alone.

    Examples:
        >>> from transformers import GPT2Config, T5Config
        >>> is_whole_encoder_decoder(T5Config()), is_whole_encoder_decoder(GPT2Config())
        (True, False)
    """
    from transformers import AutoModel

    if side_of(model_config) or type(model_config) not in AutoModel._model_mapping:
        return False
    if _encoder_alone(model_config) is not None or _decoder_alone(model_config) is not None:
        return False
    return bool(model_config.is_encoder_decoder) and has_halves(_whole_class(model_config))


def _unnamed(model_config: "PretrainedConfig") -> ModelError:
    return ModelError(
        f"{model_config.model_type}: it has an encoder and a decoder, and the hook points name "
        "neither; write encoder.blocks.0.hook_resid_post or decoder.blocks.0.hook_resid_post in "
        "memory.activation_cache_filter"
    )


def has_own_code(model_config: "PretrainedConfig", trust_remote_code: bool) -> list[str]:
    """The Auto classes for which code of the model's folder is run.

    Args:
        model_config: of the model.
        trust_remote_code: whether that code may run.

    Returns:
        Names of Auto classes; none where the class is that of transformers.

    Examples:
        >>> from transformers import GPT2Config
        >>> has_own_code(GPT2Config(), trust_remote_code=True)
        []
    """
    own = own_model_code({"auto_map": getattr(model_config, "auto_map", None)})
    return [name for name in own if name != "AutoConfig"] if trust_remote_code else []


def _encoder_alone(model_config: "PretrainedConfig") -> Any:
    """The class of the encoder of an encoder-decoder, where the folder holds nothing else."""
    from transformers import AutoModelForTextEncoding

    mapping = AutoModelForTextEncoding._model_mapping
    found: Any = mapping.get(type(model_config), None)
    return found if found and found.__name__ in (model_config.architectures or ()) else None


def _decoder_alone(model_config: "PretrainedConfig") -> Any:
    """The class with a head of a decoder that has none without: what AutoModel has for its config
    is an encoder-decoder, or nothing.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    found: Any = AutoModelForCausalLM._model_mapping.get(type(model_config), None)
    if found is None or isinstance(found, list | tuple):
        return None
    whole: Any = AutoModel._model_mapping.get(type(model_config), None)
    if whole is None:
        return found
    named = found.__name__ in (model_config.architectures or ())
    both = hasattr(whole, "forward") and "decoder_input_ids" in signature(whole.forward).parameters
    return found if named and both and not model_config.is_encoder_decoder else None


def causal_class(model_config: "PretrainedConfig", model: ModelConfig) -> Any:
    """The Auto class of the model that writes text.

    Args:
        model_config: of the model.
        model: the `model` settings.

    Returns:
        `AutoModelForCausalLM`.

    Raises:
        ModelError: the model writes no text.
    """
    from transformers import AutoModelForCausalLM

    own = has_own_code(model_config, model.trust_remote_code)
    known = type(model_config) in AutoModelForCausalLM._model_mapping
    encodes = _encoder_alone(model_config) is not None or model_config.is_encoder_decoder
    if not ("AutoModelForCausalLM" in own or (known and not own and not encodes)):
        raise ModelError(
            f"answers.source=model: {model.source} ({model_config.model_type}) does not write "
            "text; set model.source to a causal language model, or answers.source=column"
        )
    return AutoModelForCausalLM


def model_class(model_config: "PretrainedConfig") -> Any:
    """The class of transformers for a config, without a head where it has one.

    Args:
        model_config: of the model.

    Returns:
        A class of `PreTrainedModel`; where transformers has several, that which the config names.

    Raises:
        ModelError: transformers has none.

    Examples:
        >>> from transformers import GPT2Config
        >>> model_class(GPT2Config()).__name__
        'GPT2Model'
    """
    if modality_of(model_config) == CHAT:
        return seeing(_whole_class(model_config))
    if modality_of(model_config) or source_of(model_config):
        return sensing_class(model_config, class_of(model_config) or _whole_class(model_config))
    if codebooks(model_config):
        return codes_class(model_config)
    if side := side_of(model_config):
        return half(_whole_class(model_config), side)
    for alone in (_encoder_alone(model_config), _decoder_alone(model_config)):
        if alone is not None:
            return alone
    if is_whole_encoder_decoder(model_config):
        raise _unnamed(model_config)
    return _whole_class(model_config)


@cache
def _alike(whole: Any) -> Any:
    """A class of transformers as one that is made from a config as an auto class is."""
    return remade(whole)


def _whole_class(model_config: "PretrainedConfig") -> Any:
    from transformers import AutoModel

    found: Any = AutoModel._model_mapping.get(type(model_config), None) or class_of(model_config)
    if found is None:
        raise ModelError(
            f"transformers has no model for a config of the class {type(model_config).__name__}"
        )
    if not isinstance(found, list | tuple):
        return found
    classes: list[Any] = list(found)
    named = {c.__name__: c for c in classes}
    return next((named[n] for n in model_config.architectures or () if n in named), classes[0])
