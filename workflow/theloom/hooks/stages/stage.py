"""The stages of an image model: each has its own width and its own number of positions, and gives
maps. A hook point `stages.i.hook_out` is entry i of the model's own `hidden_states`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from theloom.errors import HookError
from theloom.hooks.points import STAGE_OUT, HookCatalog, HookPoint, stage_point
from theloom.hooks.sites import Site

_STATES = ("hidden_states", "encoder_hidden_states", "vision_hidden_states")


@dataclass(frozen=True)
class Stage:
    """Where an entry of a model's own hidden states is made.

    Attributes:
        number: of the entry.
        site: the module whose input or output it is, read as rows.
        order: when the module is done, among all modules of a pass.
        axis: of the entry that has the channels.
        rows: positions of an image of the model's own size.
        width: channels.
    """

    number: int
    site: Site
    order: int
    axis: int
    rows: int
    width: int

    @property
    def point(self) -> HookPoint:
        """The hook point of the stage."""
        return stage_point(self.number, self.width, self.rows)


@dataclass(frozen=True)
class Stages:
    """The stages of a model, and the reasons for entries of its hidden states that are none.

    Attributes:
        found: by number, in ascending order.
        unsupported: by name of the hook point.
    """

    found: tuple[Stage, ...]
    unsupported: dict[str, str]

    @property
    def catalog(self) -> HookCatalog:
        """Their hook points."""
        return HookCatalog([stage.point for stage in self.found], self.unsupported)

    def on(self, modules: Sequence[nn.Module]) -> "Stages":
        """The same for another copy of the model.

        Args:
            modules: of that copy, one for each stage.

        Returns:
            Its stages.
        """
        sites = [replace(s.site, module=m) for s, m in zip(self.found, modules, strict=True)]
        there = zip(self.found, sites, strict=True)
        return replace(self, found=tuple(replace(stage, site=site) for stage, site in there))

    def of(self, point: HookPoint) -> Stage:
        """The stage of a hook point.

        Args:
            point: of the catalog.

        Returns:
            The stage.

        Raises:
            HookError: the model has no such stage.
        """
        found = next((s for s in self.found if s.number == point.block), None)
        if found is None or point.value != STAGE_OUT:
            reason = self.unsupported.get(point.name, "this model has no such hook point")
            raise HookError(f"{point.name}: {reason}")
        return found

    def last(self, points: Iterable[HookPoint]) -> Stage:
        """Of the stages of some hook points the one that a pass reaches last.

        Args:
            points: of the catalog, at least one.

        Returns:
            The stage.
        """
        return max(map(self.of, points), key=lambda stage: stage.order)


def as_rows(axis: int) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """Read a map by its positions, row by row.

    Args:
        axis: of the map that has the channels.

    Returns:
        A function that gives (batch, positions, channels), a view where that is possible.

    Examples:
        >>> as_rows(1)(torch.zeros(2, 8, 3, 5), None).shape
        torch.Size([2, 15, 8])
        >>> as_rows(2)(torch.zeros(2, 15, 8), None).shape
        torch.Size([2, 15, 8])
    """
    return lambda value, batch: value.movedim(axis, -1).flatten(1, -2)


def own_states(output: Any) -> list[torch.Tensor]:
    """The hidden states in a model's output.

    Args:
        output: of a pass with `output_hidden_states`.

    Returns:
        One after the other, those of lists within the list too; none where it has no such field.
    """
    states = next((s for n in _STATES if (s := getattr(output, n, None)) is not None), ())
    return list(_tensors(states))


def _tensors(states: Any) -> Iterator[torch.Tensor]:
    for state in states:
        if isinstance(state, torch.Tensor):
            yield state
        elif isinstance(state, tuple | list):
            yield from _tensors(state)
