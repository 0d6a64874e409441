"""The model of a run before it is loaded: its estimator, its halves, what it reads."""

from collections.abc import Sequence

from theloom.config.auto import traceable_attention
from theloom.config.frozen import to_config, to_plain
from theloom.config.model_dims import dims_of_profile, numbers
from theloom.config.schema import Config
from theloom.memory import closed_form
from theloom.memory.estimators import ClosedForm, Estimator, Traced, config_of
from theloom.model import files
from theloom.model.checkpoint.classes import has_own_code, is_whole_encoder_decoder
from theloom.model.files import hf_config
from theloom.model.weight_format import quantization_of
from theloom.rows.modality import sensed_by


def estimator_of(
    config: Config, trace: bool = False, filters: Sequence[str] | None = None, held: bool = False
) -> Estimator:
    """Choose the estimator of a model: closed form if it covers model and hook points, else trace.

    Args:
        config: the run's config.
        trace: trace the model even if a closed form exists.
        filters: hook filter to use instead of the config's.
        held: hook points stay on the device until the end of the pass.

    Returns:
        The estimator.

    Raises:
        HookError: the model lacks a requested hook point.
    """
    declared, attention = config.model.architecture, config.extraction.attention.name
    own, own_code = None, False
    if declared is None:
        model_config = hf_config(config.model)
        size, own = numbers(model_config), quantization_of(config, model_config)
        own_code = bool(has_own_code(model_config, config.model.trust_remote_code))
    else:
        size = dims_of_profile(declared)
    covered = own is None and not own_code and closed_form.covers(size)
    if covered and attention != "eager" and not trace:
        closed = ClosedForm(size)
        requested = config.memory.activation_cache_filter if filters is None else filters
        if closed.covers(closed.catalog().select(requested), held):
            return closed
    return Traced(
        model_config if declared is None else config_of(declared),
        traceable_attention(attention),
        config.model.trust_remote_code,
    )


def halves(config: Config) -> list[Config]:
    """The run's config for each half of its model.

    Args:
        config: the run's config.

    Returns:
        A config for each half that can be read, where the model has an encoder and a decoder and
        the hook points name neither; else the config itself.

    Raises:
        ModelError: the model's own config cannot be read.
    """
    if config.model.architecture is not None:
        return [config]
    model_config = hf_config(config.model)
    if has_own_code(model_config, config.model.trust_remote_code) or config.model.side is not None:
        return [config]
    if is_whole_encoder_decoder(model_config):
        return [with_side(config, side) for side in ("encoder", "decoder")]
    sides = files.sides(config.model) if sensed_by(model_config) else ()
    return [with_side(config, side) if side else config for side in sides] or [config]


def as_it_reads(config: Config, modality: str | None = None) -> Config:
    """The same config for a model of images or audio, whatever the corpus is.

    Args:
        config: the run's config.
        modality: what is read of a model that reads several; None: what it reads alone.

    Returns:
        A copy where the model reads no texts, with no half of an encoder-decoder chosen that the
        config does not name; else the config itself.

    Raises:
        ModelError: the model's own config cannot be read, or it does not read the modality.
    """
    if config.model.architecture is not None or config.model.modality is not None:
        return config
    modality = modality or files.reads(config.model)
    if modality is None:
        return config
    plain = to_plain(config)
    return to_config(plain | {"model": plain["model"] | {"modality": modality}})


def with_side(config: Config, side: str) -> Config:
    """The same config with one half of an encoder-decoder chosen.

    Args:
        config: the run's config.
        side: `encoder` or `decoder`.

    Returns:
        A copy.
    """
    plain = to_plain(config)
    return to_config(plain | {"model": plain["model"] | {"side": side}})


def likely_precision(config: Config) -> str:
    """Predict what `precision_mode` resolves to.

    It does not look at this machine's device, since the job may run on another machine.

    Args:
        config: the run's config.

    Returns:
        `fp32`, `fp16` or `bf16`.
    """
    requested = config.memory.precision_mode.name
    if requested == "auto":
        return "fp32" if config.extraction.device == "cpu" else "bf16"
    return requested
