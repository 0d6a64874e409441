"""Blocks whose inside is computed again in the backward pass, instead of being kept from the
forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint


class Checkpointed:
    """While the context is open, these blocks run under torch.utils.checkpoint, in training and in
    eval mode alike.

    transformers' own checkpointing works in training mode alone, which is also that of dropout, and
    only for the classes that have it; where a model has it switched on, it is off for these blocks,
    so that nothing is computed three times. The backward pass may come after the context is closed.
    """

    def __init__(self, blocks: Sequence[nn.Module], use_reentrant: bool) -> None:
        self._blocks, self._use_reentrant = blocks, use_reentrant
        self._were: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> "Checkpointed":
        for block in self._blocks:
            self._were.append((block, vars(block).get("forward")))
            vars(block)["forward"] = _recomputed(block, block.forward, self._use_reentrant)
        return self

    def __exit__(self, *_: object) -> None:
        while self._were:
            block, forward = self._were.pop()
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _recomputed(
    block: nn.Module, forward: Callable[..., Any], use_reentrant: bool
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        # the reentrant kind sees tensors that are arguments themselves, and nothing in tuples or
        # behind names
        leaves, structure = _pytree.tree_flatten((args, kwargs))

        def run(*leaves: Any) -> Any:
            args, kwargs = _pytree.tree_unflatten(leaves, structure)
            with _own_checkpointing_off(block):
                return forward(*args, **kwargs)

        if use_reentrant and not any(
            isinstance(v, torch.Tensor) and v.requires_grad for v in leaves
        ):
            leaves = _with_a_gradient(leaves)
        return checkpoint(run, *leaves, use_reentrant=use_reentrant)

    return call


def _with_a_gradient(leaves: list[Any]) -> list[Any]:
    """The reentrant kind gives weights no gradient unless an input has one, as behind a frozen
    embedding.
    """
    first = next(
        (i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor) and v.is_floating_point()),
        None,
    )
    if first is None:
        return leaves
    return [*leaves[:first], leaves[first].detach().requires_grad_(), *leaves[first + 1 :]]


@contextmanager
def _own_checkpointing_off(block: nn.Module) -> Iterator[None]:
    on = [m for m in block.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]
