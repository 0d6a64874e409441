"""The router of a block's mixture of experts: its logits, and which experts each token goes to.

transformers declares the module whose output `output_router_logits` gives, and at which index of
that output the logits are. What else the module returns is known by its shape: experts are
integers, a row of k for each token, and their scores are floats of the same shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from theloom.hooks.points import EXPERT_INDICES, ROUTER, ROUTER_LOGITS, ROUTER_SCORES
from theloom.hooks.sites import Site

NO_ROUTER = "this block has no router that transformers declares (_can_record_outputs)"


def declared_routers(model: nn.Module) -> list[Any]:
    """List what transformers declares of a model's router logits.

    Args:
        model: the whole model.

    Returns:
        transformers' records: the class of the module, the index in its output, part of its name.
    """
    found: list[Any] = []
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        recorded = getattr(kind, "_can_record_outputs", None)
        listed = recorded.get("router_logits") if isinstance(recorded, dict) else None
        found += listed if isinstance(listed, list) else [listed] * (listed is not None)
    return [r for r in found if isinstance(getattr(r, "target_class", None), type)]


def router_sites(
    declared: Sequence[Any],
    block: nn.Module,
    attention: nn.Module | None,
    outputs: dict[nn.Module, list[torch.Tensor | None]],
) -> dict[str, Site | str]:
    """Where a block has the values of its router, or why it has not.

    Args:
        declared: What `declared_routers` gave for the whole model.
        block: One of its blocks.
        attention: Its attention, whose own router (JetMoE) is not that of the MLP.
        outputs: What modules gave that give more than one tensor, in a pass over three tokens.

    Returns:
        For each of `ROUTER` a site, or a reason.
    """
    outside = set() if attention is None else set(attention.modules())
    routers = [
        (module, one.index)
        for one in declared
        for name, module in block.named_modules()
        if isinstance(module, one.target_class)
        and module not in outside
        and (one.layer_name or "") in f"mlp.{name}"
        and module in outputs
    ]
    if len(routers) != 1:
        reason = NO_ROUTER if not routers else "it has several routers"
        return dict.fromkeys(ROUTER, reason)
    module, index = routers[0]
    given = outputs[module]
    tokens = _rows(given[index]) if index < len(given) else None
    if tokens is None:
        return dict.fromkeys(ROUTER, f"{type(module).__name__} gives no logits for each token")
    found: dict[str, Site | str] = {ROUTER_LOGITS: Site(module, "output", index=index)}
    chosen = [n for n, value in enumerate(given) if _is_of_tokens(value, tokens, floats=False)]
    reason = f"{type(module).__name__} does not give the experts of each token"
    found |= {EXPERT_INDICES: reason, ROUTER_SCORES: reason}
    if len(chosen) == 1:
        found[EXPERT_INDICES] = Site(module, "output", index=chosen[0])
        indices = given[chosen[0]]
        scores = [
            n
            for n, value in enumerate(given)
            if n != index and _is_of_tokens(value, tokens, floats=True)
            if value is not None and indices is not None and value.shape == indices.shape
        ]
        found[ROUTER_SCORES] = (
            Site(module, "output", index=scores[0])
            if len(scores) == 1
            else f"{type(module).__name__} does not give one score for each chosen expert"
        )
    return found


def _rows(value: torch.Tensor | None) -> int | None:
    """Rows of a value, one for each token."""
    if value is None or value.ndim < 2 or not value.is_floating_point():
        return None
    return value.numel() // value.shape[-1]


def _is_of_tokens(value: torch.Tensor | None, tokens: int, floats: bool) -> bool:
    """Whether a value has a row for each token, of floats or of integers."""
    if value is None or value.ndim < 2 or value.numel() != tokens * value.shape[-1]:
        return False
    if value.dtype == torch.bool:
        return False
    return value.is_floating_point() == floats
