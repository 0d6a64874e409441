"""Where a value is in a model, and how to read it there as TransformerLens shapes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from theloom.errors import HookError

Batch = tuple[int, int]
Read = Callable[[torch.Tensor, Batch], torch.Tensor]


@dataclass(frozen=True)
class Site:
    """Where a value is: a module's input or output, or inside an attention module; and how to read it there."""

    module: nn.Module
    place: str  # input, output, inside
    read: Read = lambda value, batch: whole(value, batch)

    @staticmethod
    def input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The first tensor that a module is called with."""
        return next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))

    @staticmethod
    def output(output: Any) -> torch.Tensor:
        """The first tensor that a module returns."""
        return output if isinstance(output, torch.Tensor) else next(v for v in output if isinstance(v, torch.Tensor))


def whole(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(batch, position, width), also where the module sees all tokens in a row, or one sequence for all."""
    if tuple(value.shape[:-1]) == batch:
        return value
    if value.numel() == batch[1] * value.shape[-1]:
        return value.reshape(1, batch[1], value.shape[-1]).expand(*batch, -1)
    if value.numel() != batch[0] * batch[1] * value.shape[-1]:
        raise HookError(
            f"a value of shape {tuple(value.shape)} is not one row for each of {batch[0]}×{batch[1]} tokens"
        )
    return value.reshape(*batch, value.shape[-1])


def by_head(heads: int) -> Read:
    """(batch, position, heads, head size)."""
    return lambda value, batch: whole(value, batch).reshape(*batch, heads, -1)


def columns(start: int, stop: int, heads: int | None = None) -> Read:
    """Some columns of the width, by head if so many are given."""

    def read(value: torch.Tensor, batch: Batch) -> torch.Tensor:
        found = whole(value, batch)[..., start:stop]
        return found if heads is None else found.reshape(*batch, heads, -1)

    return read


def grouped(heads: int, kv_heads: int, size: int, which: str) -> Read:
    """Queries, keys or values of a projection that has them by key heads."""
    group = heads // kv_heads

    def read(value: torch.Tensor, batch: Batch) -> torch.Tensor:
        parts = whole(value, batch).reshape(*batch, kv_heads, group + 2, size)
        if which == "q":
            return parts[:, :, :, :group].reshape(*batch, heads, size)
        return parts[:, :, :, group if which == "k" else group + 1]

    return read
