"""Batches of rows of uneven length, padded on either side or not at all.

For a forward pass the tokens of every row move to its front. So padding is always on the right,
where a causal model needs neither a mask nor position ids: position ids some models do not take and
others get wrong, and left padding without them gives wrong values from models with learned
positions. Afterwards values go back to their tokens' columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from theloom.errors import InputError
from theloom.hooks.points import HookPoint

# In a tokenizer's output, what says something of its tokens, and what a model does not take
MARKS = ("special_tokens_mask", "assistant_masks")
_NO_INPUTS = ("input_ids", "attention_mask", "length", "offset_mapping")

Tokens = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]


@dataclass(frozen=True)
class PaddedTokens:
    """A batch with every row's tokens at its front.

    `ids` is (batch, longest), `first` the column of each row's first token in what was given,
    `lengths` its tokens, `width` the columns of what was given, `others` further inputs of the
    model, (batch, longest) as well, and `marks` what a tokenizer says of its tokens.
    """

    ids: torch.Tensor
    first: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    marks: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def uneven(self) -> bool:
        """Whether any row has padding behind its tokens."""
        return min(self.lengths) < self.ids.shape[1]

    @property
    def as_given(self) -> bool:
        """Whether nothing was padding, so that all columns are where they were."""
        return min(self.lengths) == self.width

    def only(self, rows: Sequence[int]) -> "PaddedTokens":
        """Some of the rows, as wide as the longest of them.

        Args:
            rows: Their numbers.

        Returns:
            A copy, in the order of `rows`.

        Examples:
            >>> rows_of([[5, 6, 7], [8], [9, 4]]).only([2, 1]).ids.tolist()
            [[9, 4], [8, 0]]
        """
        chosen, longest = list(rows), max(self.lengths[row] for row in rows)
        return PaddedTokens(
            self.ids[chosen, :longest],
            tuple(self.first[row] for row in rows),
            tuple(self.lengths[row] for row in rows),
            self.width,
            {name: value[chosen, :longest] for name, value in self.others.items()},
            {name: value[chosen, :longest] for name, value in self.marks.items()},
        )

    def mask(self) -> torch.Tensor:
        """Where there is a token, in the rows as they run.

        Returns:
            (batch, longest) of bool.
        """
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]

    def mask_given(self, until: int | None = None) -> torch.Tensor:
        """Where there is a token, in the columns that were given.

        Args:
            until: Of each row, its first tokens alone, so many; None: all.

        Returns:
            (batch, width) of bool.

        Examples:
            >>> rows = rows_of([[0, 5], [6, 7]], attention_mask=[[0, 1], [1, 1]])
            >>> rows.mask_given().int().tolist(), rows.mask_given(until=1).int().tolist()
            ([[0, 1], [1, 1]], [[0, 1], [1, 0]])
        """
        column, first = torch.arange(self.width), torch.tensor(self.first)[:, None]
        lengths = torch.tensor(self.lengths)[:, None].clamp(
            max=self.width if until is None else until
        )
        return (column >= first) & (column < first + lengths)


def rows_of(tokens: Tokens, attention_mask: Any = None, pad: int = 0) -> PaddedTokens:
    """Token ids, and which of them are padding, as rows with every token at the front.

    Args:
        tokens: Token ids, [batch, position] or [position]; lists of uneven length count as padded
            on the right. A mapping is a tokenizer's output, whose other tensors go to the model.
        attention_mask: 0 where there is padding; None: the mapping's own, or no padding.
        pad: The id that padding runs as.

    Returns:
        The rows, as wide as the longest of them.

    Raises:
        InputError: Shapes do not fit, a row has padding between its tokens, or there is no token.

    Examples:
        >>> rows = rows_of([[5, 6, 7], [8]])
        >>> rows.ids.tolist(), rows.lengths
        ([[5, 6, 7], [8, 0, 0]], (3, 1))
        >>> rows_of([[0, 5], [6, 7]], attention_mask=[[0, 1], [1, 1]]).first
        (1, 0)
    """
    others: dict[str, Any] = {}
    if isinstance(tokens, Mapping):
        if "input_ids" not in tokens:
            raise InputError(
                "tokens: a mapping needs 'input_ids', found "
                f"{', '.join(map(repr, tokens)) or 'nothing'}"
            )
        others = {k: v for k, v in tokens.items() if k not in _NO_INPUTS}
        attention_mask = tokens.get("attention_mask") if attention_mask is None else attention_mask
        tokens = tokens["input_ids"]
    ids, own_mask = _matrix(tokens)
    if attention_mask is None:
        mask = own_mask
    else:
        given = (
            attention_mask
            if isinstance(attention_mask, Sequence)
            else torch.as_tensor(attention_mask).bool()
        )
        mask = _matrix(given)[0].bool()
        if mask.shape != ids.shape:
            raise InputError(
                f"attention_mask is {tuple(mask.shape)} and the tokens are {tuple(ids.shape)}"
            )
        mask &= own_mask
    lengths = mask.sum(1)
    first = mask.int().argmax(1)
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    broken = (lengths > 0) & (last - first != lengths)
    if broken.any():
        raise InputError(
            f"attention_mask: row {int(broken.nonzero()[0])} has padding between its tokens"
        )
    longest = int(lengths.max())
    if longest == 0:
        raise InputError("tokens: there is no token but padding")
    column = first[:, None] + torch.arange(longest)
    behind = torch.arange(longest) >= lengths[:, None]
    column = column.clamp(max=ids.shape[1] - 1)

    def to_the_front(values: torch.Tensor, filling: int) -> torch.Tensor:
        return values.gather(1, column).masked_fill(behind, filling)

    moved = {name: to_the_front(_like(name, value, ids), 0) for name, value in others.items()}
    marks = {name: moved.pop(name) for name in MARKS if name in moved}
    return PaddedTokens(
        to_the_front(ids, pad),
        tuple(first.tolist()),
        tuple(lengths.tolist()),
        ids.shape[1],
        moved,
        marks,
    )


def blank(value: torch.Tensor, point: HookPoint, rows: PaddedTokens, start: int) -> torch.Tensor:
    """Put the fill of a hook point where a chunk of rows has padding.

    Args:
        value: The chunk, of rows as they run; it is changed.
        point: The hook point.
        rows: All rows.
        start: Position of the chunk's first token.

    Returns:
        `value`.
    """
    axis = point.position_axis
    for row, length in enumerate(rows.lengths):
        begin = max(0, length - start)
        if begin < value.shape[axis]:
            value[row].narrow(axis - 1, begin, value.shape[axis] - begin).fill_(point.fill)
    return value


def empty(value: torch.Tensor, point: HookPoint, rows: PaddedTokens) -> torch.Tensor:
    """Room for all rows of a hook point in the columns that were given; all of it padding.

    Args:
        value: One whose dtype, device and other axes it takes.
        point: The hook point.
        rows: All rows.

    Returns:
        [batch, width, …], filled with the fill of the hook point.
    """
    shape = list(value.shape)
    shape[0], shape[point.position_axis] = len(rows.lengths), rows.width
    if point.over_keys:
        shape[3] = rows.width
    return value.new_full(shape, point.fill)


def put_back(
    value: torch.Tensor,
    point: HookPoint,
    rows: PaddedTokens,
    start: int,
    whole: torch.Tensor,
    chosen: Sequence[int] | None = None,
) -> None:
    """Put rows as they ran into the columns that were given.

    Args:
        value: Of the hook point, of the rows as they ran.
        point: The hook point.
        rows: The rows that ran.
        start: Position of the first token of `value`.
        whole: Takes them, as `empty` made it.
        chosen: Numbers of these rows in `whole`; None: all, in their order.
    """
    numbers = range(len(rows.lengths)) if chosen is None else chosen
    for row, number, first, length in zip(
        range(len(rows.lengths)), numbers, rows.first, rows.lengths, strict=True
    ):
        count = min(length - start, value.shape[point.position_axis])
        if count <= 0:
            continue
        columns = slice(first + start, first + start + count)
        if point.over_keys:  # (head, position, key)
            keys = min(length, value.shape[3])
            whole[number, :, columns, first : first + keys] = value[row, :, :count, :keys]
        else:
            whole[number, columns] = value[row, :count]


def _matrix(values: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers as (batch, position) on the CPU, and a mask that is false where a list ended
    before others.
    """
    if isinstance(values, str) or (
        isinstance(values, Sequence) and values and isinstance(values[0], str)
    ):
        raise InputError(
            "tokens: text was given where token ids are needed; tokenizer(text, "
            "return_tensors='pt')"
        )
    if isinstance(values, Sequence) and values and isinstance(values[0], Sequence | torch.Tensor):
        rows = [torch.as_tensor(row).reshape(-1) for row in values]
        matrix = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
    else:
        matrix = torch.as_tensor(values)
        matrix = matrix[None] if matrix.ndim == 1 else matrix
        lengths = torch.full((len(matrix),), matrix.shape[-1]) if matrix.ndim else torch.empty(0)
    if matrix.ndim != 2 or matrix.numel() == 0 or matrix.is_floating_point() or matrix.is_complex():
        raise InputError(
            f"tokens: integers of shape (batch, position) or (position,) are needed, "
            f"found {tuple(matrix.shape)} of {str(matrix.dtype).removeprefix('torch.')}"
        )
    matrix = matrix.detach().cpu().long()
    return matrix, torch.arange(matrix.shape[1]) < lengths[:, None]


def _like(name: str, value: Any, ids: torch.Tensor) -> torch.Tensor:
    matrix = _matrix(value)[0]
    if matrix.shape != ids.shape:
        raise InputError(
            f"tokens: {name!r} is {tuple(matrix.shape)} and 'input_ids' are {tuple(ids.shape)}"
        )
    return matrix
