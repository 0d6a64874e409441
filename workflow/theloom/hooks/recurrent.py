"""Mixers that carry a state from token to token: state spaces, gated delta nets and their kin.

Most keep their state in the cache that transformers hands from one step to the next; RWKV, xLSTM,
RecurrentGemma and MiniMax have ways of their own (`_OWN`). It is read behind the mixer, so that it
is the state after the last position of the step.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from theloom.errors import HookError
from theloom.hooks.points import (
    CONV_STATE,
    MAX_STATE,
    MIXER_IN,
    MIXER_OUT,
    NORMALIZER_STATE,
    NOT_RECURRENT,
    SSM_STATE,
    STATES,
)
from theloom.hooks.sites import Batch, Site

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_KEPT_IN = {SSM_STATE: "recurrent_states", CONV_STATE: "conv_states"}
_UPDATES = {SSM_STATE: "update_recurrent_state", CONV_STATE: "update_conv_state"}

# by class of mixer, what its module keeps or returns in place of a layer of the cache: (batch, …)
_OWN: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "RwkvSelfAttention": {  # of `state`, (batch, width, layer): 0 is that of the feed-forward
        CONV_STATE: lambda mixer, output: output[1][1][:, :, mixer.layer_id, None],
        SSM_STATE: lambda mixer, output: output[1][2][:, :, mixer.layer_id],
        NORMALIZER_STATE: lambda mixer, output: output[1][3][:, :, mixer.layer_id],
        MAX_STATE: lambda mixer, output: output[1][4][:, :, mixer.layer_id],
    },
    "xLSTMLayer": {
        SSM_STATE: lambda _, output: output[1][0],
        NORMALIZER_STATE: lambda _, output: output[1][1],
        MAX_STATE: lambda _, output: output[1][2],
    },
    "RecurrentGemmaRecurrentBlock": {
        SSM_STATE: lambda mixer, _: mixer.rg_lru.recurrent_states,
        CONV_STATE: lambda mixer, _: mixer.conv1d_state,
    },
    "MiniMaxLightningAttention": {SSM_STATE: lambda _, output: output[1]},
}
# these return it in any case; xLSTM's cache does not fit keys whose width is no multiple of 64
_WITHOUT_CACHE = ("xLSTMLayer", "MiniMaxLightningAttention")
_LACKS = {
    SSM_STATE: "its mixer is a convolution alone, whose state is ssm.hook_conv_state",
    CONV_STATE: "its mixer has no convolution",
    NORMALIZER_STATE: "the state of its mixer has no normalizer",
    MAX_STATE: "the state of its mixer has no running maximum",
}


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
    """Arguments that have a model keep what it carries on, from nothing.

    Args:
        model: of transformers.

    Returns:
        Arguments of its forward: an empty cache, if it takes one.
    """
    own = {type(module).__name__ for module in model.modules() if _own(module)}
    if not own.isdisjoint(_WITHOUT_CACHE):
        return {"use_cache": False}
    module: Any
    for module in model.modules():
        if _own(module) and hasattr(module, "conv1d_state"):
            module.conv1d_state = None  # the module then begins with zeros
    name = cache_name(model)
    takes_cache = name in inspect.signature(model.forward).parameters
    return {"use_cache": True} | ({name: DynamicCache(config=model.config)} if takes_cache else {})


def recurrent_sites(block: nn.Module) -> dict[str, Site | str]:
    """Where the values of a block's recurrent mixer are.

    Args:
        block: of a model.

    Returns:
        By value the site, or the reason why the block does not have it.
    """
    kept = {module: values for module in block.modules() if (values := _kept(module))}
    scans = [module for module, values in kept.items() if SSM_STATE in values]
    mixers = scans or [*kept]  # a short convolution is a mixer where there is no other
    if len(mixers) != 1:
        return dict.fromkeys(
            (MIXER_IN, MIXER_OUT, *STATES),
            "it has several such mixers" if mixers else NOT_RECURRENT,
        )
    (mixer,) = mixers
    found: dict[str, Site | str] = {
        MIXER_IN: Site(mixer, "input"),
        MIXER_OUT: Site(mixer, "output"),
    }
    for value in STATES:
        found[value] = Site(mixer, "state") if value in kept[mixer] else _LACKS[value]
    return found


def state_of(
    cache: "Cache | None", mixer: nn.Module, output: Any, value: str, batch: Batch
) -> torch.Tensor:
    """The state of a mixer after a step.

    Args:
        cache: that the model was called with; None: it keeps its states elsewhere.
        mixer: of a block.
        output: what the mixer returned.
        value: one of `points.STATES`.
        batch: windows and positions of the step.

    Returns:
        (batch, position, …) FP32, a view that has the state after the last position at every one.

    Raises:
        HookError: the mixer did not see all positions at once, or keeps no state, or several.
    """
    name = type(mixer).__name__
    seen = Site.output(output).shape
    if tuple(seen[:2]) != batch:
        raise HookError(
            f"{value}: {name} saw {tuple(seen[:2])} of {batch} windows and positions at once, so "
            "that its state is not that of the document; set corpus.context_length to at most "
            f"{seen[1]}"
        )
    own = _own(mixer)
    states = [own[value](mixer, output)] if own else _in_cache(cache, mixer, value)
    states = [state for state in states if isinstance(state, torch.Tensor)]
    if len(states) != 1:
        raise HookError(
            f"{value}: {len(states)} such states of {name} are kept, where one is meant; take it "
            "out of memory.activation_cache_filter"
        )
    state = states[0].float()
    return state[:, None].expand(batch[0], batch[1], *state.shape[1:])


def check_carried(model: "PreTrainedModel", states: Sequence[str]) -> None:
    """Check that a step has the states of the step before: those in the cache alone are handed on.

    Args:
        model: of transformers.
        states: names of the hook points that are read.

    Raises:
        HookError: the model keeps its states elsewhere.
    """
    own = next((type(module).__name__ for module in model.modules() if _own(module)), None)
    if states and own:
        raise HookError(
            f"{states[0]}: {own} does not take over its state from one chunk of a document to the "
            "next; set memory.streaming_chunk_size to no less than corpus.context_length"
        )


def _in_cache(cache: Any, mixer: nn.Module, value: str) -> list[Any]:
    number: Any = mixer.layer_idx
    return [*(getattr(cache.layers[number], _KEPT_IN[value], None) or {}).values()]


def _kept(module: nn.Module) -> set[str]:
    """The states that a module keeps from step to step."""
    if own := _own(module):
        return set(own)
    if not isinstance(getattr(module, "layer_idx", None), int):
        return set()
    return {value for value, update in _UPDATES.items() if update in _names(module)}


def _own(module: nn.Module) -> Mapping[str, Callable[[Any, Any], Any]]:
    """How the states of a module are read that are not in transformers' cache; else empty."""
    return _OWN.get(type(module).__name__, {}) if _is_of_transformers(module) else {}


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("transformers.", "transformers_modules."))


def _names(module: nn.Module) -> set[str]:
    """Names that the code of a module's own methods uses."""
    methods = [f for c in type(module).__mro__ for f in vars(c).values() if inspect.isfunction(f)]
    if not _is_of_transformers(module):
        return set()
    found: set[str] = set()
    for method in methods:
        code: CodeType = inspect.unwrap(method).__code__
        found.update(code.co_names)
    return found
