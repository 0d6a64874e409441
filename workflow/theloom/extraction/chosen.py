"""The rows that a call keeps of the tokens it runs, each or pooled: the argument `rows`."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from theloom.corpus.batching import Batch
from theloom.engine.selection import Selection
from theloom.errors import HookError, InputError
from theloom.extraction.padding import PaddedTokens
from theloom.extraction.result import Rows
from theloom.hooks.points import HookPoint
from theloom.rows import expression, roles
from theloom.rows.document import Document
from theloom.rows.pooling import ADDED_UP, POOLS, pooled
from theloom.store.shard_file import ShardTokens

log = logging.getLogger(__name__)

_MARKS = {"special": "special_tokens_mask", "assistant": "assistant_masks"}


class Chosen:
    """The rows of a call, and what they are made of.

    Args:
        requested: `rows` as the call has it.
        padded: The tokens that run.
        points: The hook points.

    Raises:
        InputError, ConfigError: `rows` cannot be evaluated, or keeps nothing.
        HookError: A hook point has no rows of a common width.
    """

    def __init__(
        self, requested: str | Mapping[str, str], padded: PaddedTokens, points: Sequence[HookPoint]
    ) -> None:
        text, self.pool = _asked(requested)
        over_keys = next((p.name for p in points if p.over_keys), None)
        if over_keys is not None:
            raise HookError(
                f"rows: {over_keys} is over the keys of each row's own tokens; leave it out, or "
                "leave out rows"
            )
        words = ("all", "first", "last", *(w for w, mark in _MARKS.items() if mark in padded.marks))
        others = (
            f"is not known of token ids; here are {', '.join(words)} and [a:b]; a tokenizer's "
            "output with return_special_tokens_mask=True has special, and that of a chat template "
            "with return_assistant_tokens_mask=True has assistant"
        )
        keep = expression.parse(text, "rows", words, others)
        tokens = _tokens(keep, self.pool, padded)
        assert tokens.kept is not None
        assert tokens.row_token is not None
        batch = tokens.document[tokens.row_token]
        position = tokens.position[tokens.row_token] + np.array(padded.first)[batch]
        self.rows = Rows(
            torch.arange(tokens.rows),
            torch.from_numpy(batch),
            torch.from_numpy(position),
            tokens.rows,
            self.pool,
        )
        self._lengths, self._offset = padded.lengths, tokens.row_offset
        self._selection = Selection(tokens, self.pool, None)
        self._counts = np.bincount(
            np.searchsorted(tokens.row_token, tokens.kept.nonzero()[0]), minlength=tokens.rows
        )

    def taken(
        self, hook: str, value: torch.Tensor, start: int, running: Sequence[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that are complete with a step.

        Args:
            hook: Name of the hook point.
            value: Its values, (row of the tokens, position, …).
            start: The position of the first of them.
            running: The rows of the tokens that run; None: all.

        Returns:
            The numbers of the rows, and their values.
        """
        step = self._selection.step(self._batch(running), start, value.shape[1])
        there = step.take(value)
        on_host = there.cpu() if self.pool in ADDED_UP else there
        numbers, values = [torch.empty(0, dtype=torch.long)], [on_host[:0]]
        for window, first, rows in step.rows(hook, on_host):
            numbers.append(torch.arange(len(rows)) + int(self._offset[window]) + first)
            values.append(rows)
        return torch.cat(numbers), torch.cat(values).to(value.device)

    def with_graph(self, value: torch.Tensor) -> torch.Tensor:
        """All rows, of values of all tokens, as a function of them that autograd knows.

        Args:
            value: Of a hook point, [batch, position, …], in the rows as they run.

        Returns:
            [row, …]; pooled rows are the mean of their tokens where `pool` is `mean`.
        """
        rows = self._selection.step(self._batch(None), 0, value.shape[1]).take(value)
        if self.pool == "mean":
            counts = torch.from_numpy(self._counts).to(rows)
            rows = rows / counts.reshape(-1, *(1 for _ in rows.shape[1:]))
        return rows

    def _batch(self, running: Sequence[int] | None) -> Batch:
        numbers = tuple(range(len(self._lengths)) if running is None else running)
        return Batch(numbers, tuple(self._lengths[n] for n in numbers))


def _asked(requested: str | Mapping[str, str]) -> tuple[str, str]:
    """The expression, and how the rows are pooled."""
    given = {"keep": requested} if isinstance(requested, str) else requested
    if not isinstance(given, Mapping) or not all(
        key in ("keep", "pool") and isinstance(value, str) for key, value in given.items()
    ):
        raise InputError(
            f"rows: found {requested!r}; give an expression such as 'last & ~special', or "
            "{'keep': …, 'pool': …}"
        )
    pool = given.get("pool", "none")
    if pool not in POOLS:
        raise InputError(f"rows: pool is {pool!r}; give one of {', '.join(POOLS)}")
    return given.get("keep", "all"), pool


def _tokens(keep: expression.Expression, pool: str, padded: PaddedTokens) -> ShardTokens:
    """The tokens as a shard has them, each row a document."""
    masks, last, first, empty = [], [], 0, []
    marks = {word: padded.marks.get(mark) for word, mark in _MARKS.items()}
    assistant = marks["assistant"]
    if assistant is not None and "assistant" in keep.text and not assistant.any():
        raise InputError(
            "rows: assistant_masks marks no token; the chat template has no {% generation %}"
        )
    for number, length in enumerate(padded.lengths):
        own = {word: m[number, :length].numpy() for word, m in marks.items() if m is not None}
        role = own.get("assistant")
        document = Document(
            f"row {number}",
            length,
            special=own.get("special"),
            role=None if role is None else np.where(role, roles.code("assistant"), 0),
        )
        mask, of_rows = pooled(keep.mask(document), np.zeros(length, "i4"), pool)
        if not len(of_rows):
            empty.append(number)
        masks.append(mask)
        last.append(first + of_rows)
        first += length
    if not any(map(len, last)):
        raise InputError(f"rows: {keep.text} keeps no token of the {len(masks)} rows of tokens")
    if empty:
        named = ", ".join(map(str, empty[:5])) + ", …" * (len(empty) > 5)
        log.warning("rows: %s keeps no token of %d rows: %s", keep.text, len(empty), named)
    lengths = np.array(padded.lengths)
    ends = np.cumsum(lengths)
    offset = np.concatenate([[0], ends])
    return ShardTokens(
        first_row=0,
        input_ids=padded.ids[padded.mask()].numpy(),
        document=np.repeat(np.arange(len(lengths)), lengths),
        position=np.arange(offset[-1]) - np.repeat(offset[:-1], lengths),
        document_offset=offset,
        document_id=np.array([], "S1"),
        window_offset=offset,
        window_document=np.arange(len(lengths)),
        kept=np.concatenate(masks).astype("u1"),
        row_token=np.concatenate(last),
    )
