"""What a call keeps of the values that its forward passes give."""

from contextlib import nullcontext

import torch

from theloom.extraction import padding
from theloom.extraction.request import Request
from theloom.extraction.result import HiddenStates
from theloom.precision import Resolved


class Kept:
    """The values of one forward pass, copied as they arise and, if they are the whole, in the
    columns given; of a call with `rows`, these rows.
    """

    def __init__(
        self, requested: Request, whole: bool, graph: bool = False, progress: bool = False
    ) -> None:
        from tqdm.auto import tqdm

        self._requested, self._whole, self._graph = requested, whole, graph
        self._points = {p.name: p for p in requested.points}
        self.running: list[int] | None = None  # rows of the tokens that run now; None: all
        self._start = self._width = 0  # position of the chunk that runs, and its tokens
        self.values: dict[str, torch.Tensor] = {}
        self._numbers: torch.Tensor | None = None  # of the rows of a chunk
        total = len(requested.points) if whole else requested.rows.ids.shape[1]
        unit = "hook points" if whole else "tokens"
        self._bar = tqdm(total=total, unit=unit, disable=not progress)

    def passes(self, count: int) -> None:
        """Say how many forward passes there are, for the progress bar.

        Args:
            count: Forward passes of the call.
        """
        self._bar.reset(count * len(self._points))

    def keep(self, name: str, value: torch.Tensor) -> None:
        """Take a hook point's value.

        Args:
            name: Of the hook point.
            value: [batch, position, …] of the rows that run now, with the axes of the hook point.
        """
        self._width = value.shape[self._points[name].position_axis]
        # outside of inference mode, so that the copy can be an input of autograd
        with (
            nullcontext() if self._graph else torch.inference_mode(False),
            torch.set_grad_enabled(self._graph),
        ):
            if self._requested.chosen is not None:
                self._keep_rows(name, value)
            elif self._whole and not self._requested.rows.as_given:
                point, rows = self._points[name], self._requested.rows
                if name not in self.values:
                    self.values[name] = padding.empty(value, point, rows)
                running = rows if self.running is None else rows.only(self.running)
                padding.put_back(value, point, running, 0, self.values[name], self.running)
            else:
                self.values[name] = value.clone()
        if self._whole:
            self._bar.update()

    def _keep_rows(self, name: str, value: torch.Tensor) -> None:
        chosen = self._requested.chosen
        assert chosen is not None
        if self._graph:
            self.values[name] = chosen.with_graph(value)
            return
        numbers, rows = chosen.taken(name, value, self._start, self.running)
        if not self._whole:
            self.values[name], self._numbers = rows, numbers
            return
        if name not in self.values:
            self.values[name] = rows.new_empty((chosen.rows.total, *rows.shape[1:]))
        self.values[name][numbers.to(rows.device)] = rows

    def result(self, start: int, resolved: Resolved | None) -> HiddenStates:
        """What was kept, which is then no longer here.

        Args:
            start: The position of its first token.
            resolved: The precision, where one was requested.

        Returns:
            The hidden states of what ran since the last call, with the mask of their tokens.
        """
        requested, values, self.values = self._requested, self.values, {}
        padded, chosen = requested.rows, requested.chosen
        states = {p.name: values.pop(p.name) for p in requested.points}
        mask, rows = padded.mask_given(), None if chosen is None else chosen.rows
        if not self._whole:
            self._start = start + self._width
            mask = padded.mask()[:, start : self._start]
            self._bar.update(mask.shape[1])
            if rows is not None and self._numbers is not None:
                rows = rows.part(self._numbers)
            elif padded.uneven:
                for point in requested.points:
                    padding.blank(states[point.name], point, padded, start)
        if self._whole or self._start >= padded.ids.shape[1]:
            self._bar.close()
        points = tuple(requested.points)
        return HiddenStates(states, mask, start, resolved, points, padded, rows)
