"""Mixers that carry a state from token to token: state spaces, gated delta nets and their kin.

Their state is in the cache that transformers hands from one step to the next. It is read there,
behind the mixer, so that it is the state after the last position of the step.
"""

import inspect
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from theloom.errors import HookError
from theloom.hooks.points import CONV_STATE, MIXER_IN, MIXER_OUT, NOT_RECURRENT, SSM_STATE
from theloom.hooks.sites import Batch, Site

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_KEPT_IN = {SSM_STATE: "recurrent_states", CONV_STATE: "conv_states"}
_UPDATES = {SSM_STATE: "update_recurrent_state", CONV_STATE: "update_conv_state"}


def cache_name(model: "PreTrainedModel") -> str:
    """The name of the cache among the arguments of a model's forward.

    Args:
        model: of transformers.

    Returns:
        `past_key_values`; of Mamba and its kin `cache_params`.
    """
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def fresh_cache(model: "PreTrainedModel") -> dict[str, Any]:
    """Arguments that have a model keep what it carries on, in an empty cache.

    Args:
        model: of transformers.

    Returns:
        Arguments of its forward.
    """
    return {"use_cache": True, cache_name(model): DynamicCache(config=model.config)}


def recurrent_sites(block: nn.Module) -> dict[str, Site | str]:
    """Where the values of a block's recurrent mixer are.

    Args:
        block: of a model.

    Returns:
        By value the site, or the reason why the block does not have it.
    """
    mixers = [m for m in block.modules() if _UPDATES[SSM_STATE] in _names(m)]
    values = (MIXER_IN, MIXER_OUT, *_KEPT_IN)
    if len(mixers) != 1 or not isinstance(getattr(mixers[0], "layer_idx", None), int):
        return dict.fromkeys(
            values, "it has several such mixers" if len(mixers) > 1 else NOT_RECURRENT
        )
    (mixer,) = mixers
    conv = _UPDATES[CONV_STATE] in _names(mixer)
    return {
        MIXER_IN: Site(mixer, "input"),
        MIXER_OUT: Site(mixer, "output"),
        SSM_STATE: Site(mixer, "state"),
        CONV_STATE: Site(mixer, "state") if conv else "its mixer has no convolution",
    }


def state_of(cache: "Cache", mixer: nn.Module, value: str, batch: Batch) -> torch.Tensor:
    """The state of a mixer after a step.

    Args:
        cache: that the model was called with.
        mixer: of a block.
        value: `ssm.hook_state` or `ssm.hook_conv_state`.
        batch: windows and positions of the step.

    Returns:
        (batch, position, …) FP32, a view that has the state after the last position at every one.

    Raises:
        HookError: the cache holds none, or several.
    """
    layers: Any = cache.layers
    number: Any = mixer.layer_idx
    held: Any = getattr(layers[number], _KEPT_IN[value], None) or {}
    states = [state for state in held.values() if state is not None]
    if len(states) != 1:
        raise HookError(
            f"{value}: the cache holds {len(states)} such states of {type(mixer).__name__}, where "
            "one is meant"
        )
    state = states[0].float()
    return state[:, None].expand(batch[0], batch[1], *state.shape[1:])


def _names(module: nn.Module) -> set[str]:
    """Names that the code of a module's own methods uses."""
    methods = [f for c in type(module).__mro__ for f in vars(c).values() if inspect.isfunction(f)]
    if not type(module).__module__.startswith(("transformers.", "transformers_modules.")):
        return set()
    found: set[str] = set()
    for method in methods:
        code: CodeType = inspect.unwrap(method).__code__
        found.update(code.co_names)
    return found
