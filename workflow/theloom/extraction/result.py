"""What the functions of `extraction` return."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from theloom.extraction.padding import PaddedTokens
from theloom.hooks.points import HookPoint
from theloom.precision import Resolved


@dataclass(frozen=True, eq=False)
class Rows:
    """Which token of what was given each row of a result is of; of a pooled row the last one.

    Attributes:
        number: [row], the place of a row among all rows of the call: its own, but in a chunk.
        batch: [row], the row of the tokens given.
        position: [row], the column of the tokens given.
        total: Rows of the whole call.
        pool: How the kept tokens of a row were made one.
    """

    number: torch.Tensor
    batch: torch.Tensor
    position: torch.Tensor
    total: int
    pool: str

    def __len__(self) -> int:
        return len(self.number)

    @classmethod
    def joined(cls, parts: "Sequence[Rows]") -> "Rows":
        """Those of several chunks, in their order in the whole.

        Args:
            parts: Of one call, at least one.

        Returns:
            All rows of the parts.
        """
        numbers = torch.cat([part.number for part in parts])
        batch = torch.cat([part.batch for part in parts])
        position = torch.cat([part.position for part in parts])
        whole = cls(numbers, batch, position, parts[0].total, parts[0].pool)
        return whole.part(numbers.argsort())

    def part(self, number: torch.Tensor) -> "Rows":
        """Some of them.

        Args:
            number: [row], their places here.

        Returns:
            These rows, in this order.
        """
        of_part = (self.number[number], self.batch[number], self.position[number])
        return Rows(*of_part, self.total, self.pool)


@dataclass(frozen=True, eq=False, repr=False)
class HiddenStates(Mapping[str, torch.Tensor]):
    """The result of an extraction: a mapping from hook names to tensors.

    Attributes:
        hidden_states: By hook name, in the order of the forward pass, a tensor [batch, position, …]
            on the model's device, in the dtype of the forward pass. Attention scores and patterns
            are [batch, head, position, key].
        attention_mask: [batch, position], bool, on the CPU: true for tokens, false for padding.
        start: The position of a chunk's first token, counted from the first token of its row; 0 for
            a result that is no chunk.
        precision: The requested and the used precision with each fallback, where one was requested.
        points: The hook points, in the order of `hidden_states`.
        rows: Where a call had `rows`, which tokens its rows are of; the tensors are then [row, …].
    """

    hidden_states: dict[str, torch.Tensor]
    attention_mask: torch.Tensor
    start: int
    precision: Resolved | None
    points: tuple[HookPoint, ...]
    padded: PaddedTokens
    rows: Rows | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.hidden_states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.hidden_states)

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {tuple(value.shape)}" for name, value in self.hidden_states.items()
        )
        return f"HiddenStates({shapes})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td>"
            f"<td>{' × '.join(map(str, value.shape))}</td><td>{value.dtype}</td></tr>"
            for name, value in self.hidden_states.items()
        )
        heading = "<tr><th style='text-align:left'>hook point</th><th>shape</th><th>dtype</th></tr>"
        return f"<table>{heading}{cells}</table>"
