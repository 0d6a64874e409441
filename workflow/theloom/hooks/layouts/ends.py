"""Where the residual stream enters and leaves blocks that do not have it as their first input and
output. It is seen in a pass of three tokens, by the model's own hidden states.

Blocks may be no modules: XLM and Flaubert hold a list of attentions, one of norms and one of MLPs,
and run them in turn in a loop of their own. And a block may take several streams, as Reformer's
reversible ones do.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from theloom.errors import ModelError
from theloom.hooks.sites import Site

Ends = tuple[Site, Site]  # of a block: where the stream enters, and where it is after the block
Run = Callable[[], Any]  # runs the model on three tokens, with its hidden states


class ListedBlock(nn.Module):
    """A block that is no module of the model: the modules that make it, one of each list.

    It is never called.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def not_loaded(self) -> bool:
        """Whether one of its modules is not loaded."""
        return any(getattr(part, "not_loaded", False) for part in self.children())


def parts_of(block: nn.Module) -> list[nn.Module]:
    """The modules that a model calls to run a block.

    Args:
        block: of a model.

    Returns:
        The block itself; of a listed one its modules, in the order in which they run.

    Examples:
        >>> parts_of(nn.Identity()), parts_of(ListedBlock({"norm": nn.Identity()}))
        ([Identity()], [Identity()])
    """
    return [*block.children()] if isinstance(block, ListedBlock) else [block]


def listed_blocks(
    owner: nn.Module, lists: Sequence[Sequence[nn.Module]], run: Run
) -> tuple[list[nn.Module], list[Ends]] | None:
    """Find blocks that lie in several lists, one module of each.

    Args:
        owner: the module that has the lists and runs what is in them.
        lists: of the same length.
        run: a pass of three tokens.

    Returns:
        The blocks and their ends; None where the lists do not run in turn, or the model's own
        hidden states are not what goes from one turn to the next.
    """
    names = {m: name.split(".")[-2] for name, m in owner.named_modules() if "." in name}
    inside = {module for modules in lists for module in modules}
    calls: list[nn.Module] = []
    given: dict[nn.Module, torch.Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(module)
        given[module] = Site.input(args, kwargs)

    ended: list[torch.Tensor] = []
    with ExitStack() as opened:
        for module in inside:
            opened.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        at_end = Site(owner, "output", index=0)
        opened.callback(
            owner.register_forward_hook(lambda _, __, out: ended.append(at_end.chosen(out))).remove
        )
        states = _own_states(run())
    turns = [calls[at : at + len(lists)] for at in range(0, len(calls), len(lists))]
    order = [next((n for n, of in enumerate(lists) if m is of[0]), -1) for m in calls[: len(lists)]]
    in_turn = sorted(order) == [*range(len(lists))] and turns == [
        [lists[n][i] for n in order] for i in range(len(lists[0]))
    ]
    if not in_turn or len(states) != len(turns) + 1 or len(ended) != 1:
        return None
    seen = [*(given[turn[0]] for turn in turns), ended[0]]
    if not all(a is b for a, b in zip(seen, states, strict=True)):
        return None
    places = [*(Site(turn[0], "input") for turn in turns), at_end]
    blocks: list[nn.Module] = [ListedBlock({names[m]: m for m in turn}) for turn in turns]
    return blocks, [*pairwise(places)]


def of_several_streams(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks take their hidden states behind another stream, by the names of their
    arguments.

    Args:
        blocks: of a model.

    Returns:
        True for reversible ones.
    """
    names = [*inspect.signature(blocks[0].forward).parameters]
    return "hidden_states" in names[1:] and "attn_output" in names[0]


def ends_of_streams(name: str, blocks: Sequence[nn.Module], run: Run) -> list[Ends]:
    """Find which of their streams are the model's own hidden states.

    Args:
        name: of the model, for the message.
        blocks: that take and give several streams.
        run: a pass of three tokens.

    Returns:
        Where that stream enters and leaves each block.

    Raises:
        ModelError: none of the streams is.
    """
    entering: list[list[torch.Tensor]] = []
    leaving: list[list[torch.Tensor]] = []
    with ExitStack() as opened:
        for block in blocks:
            opened.callback(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: entering.append(Site.inputs(args, kwargs)),
                    with_kwargs=True,
                ).remove
            )
            opened.callback(
                block.register_forward_hook(lambda _, __, output: leaving.append([*output])).remove
            )
        states = _own_states(run())
    found = [
        (_place(values, state), _place(results, after))
        for values, state, results, after in zip(
            entering, states, leaving, states[1:], strict=False
        )
    ]
    if len(states) != len(blocks) + 1 or len(set(found)) != 1 or None in found[0]:
        raise ModelError(
            f"{name}: its blocks have several streams, and which of them its own hidden_states are "
            "cannot be told"
        )
    into, out = found[0]
    return [(Site(b, "input", index=into), Site(b, "output", index=out)) for b in blocks]


def on_copy(
    model: nn.Module, copy: nn.Module, blocks: Sequence[nn.Module], ends: Sequence[Ends]
) -> tuple[list[nn.Module], list[Ends]]:
    """The blocks of a copy of a model, and their ends.

    Args:
        model: that has the blocks.
        copy: of the same class; parts that do not run may be missing.
        blocks: of the model.
        ends: of the blocks; empty: their inputs and outputs.

    Returns:
        Those of the copy.
    """
    names = {module: name for name, module in model.named_modules()}

    def there(module: nn.Module) -> nn.Module:
        if isinstance(module, ListedBlock):
            return ListedBlock({n: there(part) for n, part in module.named_children()})
        return copy.get_submodule(names[module])

    moved = [
        (replace(a, module=there(a.module)), replace(b, module=there(b.module))) for a, b in ends
    ]
    return [there(block) for block in blocks], moved


def _own_states(output: Any) -> list[torch.Tensor]:
    return [*(getattr(output, "hidden_states", None) or ())]


def _place(values: Sequence[Any], wanted: torch.Tensor) -> int | None:
    """Which of some values a tensor is."""
    return next((number for number, value in enumerate(values) if value is wanted), None)
