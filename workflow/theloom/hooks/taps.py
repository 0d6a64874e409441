"""Taps: values of a model's forward pass, read where they arise, in the unmodified model."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import torch

from theloom.errors import HookError
from theloom.hooks.attention import Inside
from theloom.hooks.blocks import Architecture
from theloom.hooks.failures import of_points
from theloom.hooks.layouts.chunked import check_seed, hashing
from theloom.hooks.locate import Anatomy
from theloom.hooks.points import PATTERN, RESIDUALS, SCORES, HookPoint, deepest_block
from theloom.hooks.recurrent import cache_name, fresh_cache, state_of
from theloom.hooks.sites import Site, stream_of, whole
from theloom.rows.modality import senses

Sink = Callable[[str, torch.Tensor], None]
T = TypeVar("T")


class _DeepestReached(Exception):  # noqa: N818
    """Ends a forward pass once the deepest requested hook point has been read."""


class Taps:
    """Reads hook points during forward passes: `sink(name, tensor)` is called as soon as a value
    exists.

    The tensor is the model's own: copy what is kept, since later operations may write to it and a
    view keeps the whole alive. `run` calls the model and ends its forward after the deepest block
    requested. `states` are the names of those that a document has one of. The model is left as it
    was.
    """

    def __init__(self, architecture: Architecture, points: Sequence[HookPoint], sink: Sink) -> None:
        self.architecture = architecture
        self._points, self._sink = points, sink
        self._open = ExitStack()
        self._batch, self._seen = (0, 0), 0
        self._read: set[str] = set()
        self._calls: Counter[str] = Counter()  # in this pass, of the module of a hook point
        self._over_keys = any(p.over_keys for p in points)
        self.states = [p.name for p in points if p.of_document]
        self._cache: Any = None
        of_tower = senses(architecture.model.config)
        self._stream = whole if of_tower else stream_of(architecture.model)

    def __enter__(self) -> "Taps":
        sites = [
            (point, self._site(point)) for point in self._points
        ]  # before any hook: it may run the model
        inside: dict[torch.nn.Module, dict[str, str]] = {}
        with ExitStack() as opened:  # closed again if a tap cannot be placed
            if senses(self.architecture.model.config) and self.architecture.stages is None:
                opened.callback(self._count_rows().remove)
            for module in hashing(self.architecture.model):
                opened.callback(module.register_forward_hook(check_seed).remove)
            for point, site in sites:
                if site.place == "inside":
                    inside.setdefault(site.module, {})[point.value] = point.name
                elif site.place == "state":
                    opened.callback(self._hook_state(point, site).remove)
                else:
                    opened.callback(self._hook(point, site).remove)
            for module, names in inside.items():
                opened.enter_context(Inside(module, names, self._inside(names)))
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def run(self, **inputs: Any) -> None:
        """Run one forward pass of the model, up to the deepest block requested.

        Args:
            **inputs: of the model's forward, such as `input_ids`.

        Raises:
            HookError: a hook point was not read.
        """
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        cache = inputs.get("past_key_values")
        if self.states:
            model = self.architecture.model
            if inputs.get(cache_name(model)) is None:
                inputs |= fresh_cache(model)
            self._cache = inputs.get(cache_name(model))
        self._batch = (tokens.shape[0], tokens.shape[1]) if tokens is not None else (0, 0)
        self._seen = int(cache.get_seq_length()) if cache is not None and self._over_keys else 0
        self._start()
        stop = self._stop_after(deepest_block(self._points))
        try:
            self.architecture.model(**inputs)
        except _DeepestReached:
            self._check_all_read()
            return
        finally:
            stop.remove()
            self._cache = None
        raise HookError(
            f"the forward pass of {type(self.architecture.model).__name__} did not reach its own "
            "blocks"
        )

    def through(self, part: Callable[[], T], batch: tuple[int, int], seen: int = 0) -> T:
        """Run a part of the model that has all of these hook points, to its end.

        Args:
            part: runs it.
            batch: windows and positions of this step.
            seen: the positions that came before.

        Returns:
            What `part` returned.

        Raises:
            HookError: a hook point was not read.
        """
        if self.states:
            raise HookError(
                f"{self.states[0]}: a state is not read layer by layer; let the model fit the "
                "device as a whole, or take the state out of memory.activation_cache_filter"
            )
        self._batch, self._seen = batch, seen
        self._start()
        result = part()
        self._check_all_read()
        return result

    def _start(self) -> None:
        self._read.clear()
        self._calls.clear()

    def _is_call(self, name: str, number: int) -> bool:
        """Whether this is the call of its module that a block is: one may be several blocks."""
        if not self.architecture.repeats or not 0 <= number < len(self.architecture.blocks):
            return True
        self._calls[name] += 1
        return self._calls[name] == self.architecture.calls[number] + 1

    def _check_all_read(self) -> None:
        missing = [p.name for p in self._points if p.name not in self._read]
        if missing:
            name = type(self.architecture.model).__name__
            raise HookError(
                f"{missing[0]}: was not reached in the forward pass of {name}"
            ) from None

    def _count_rows(self) -> Any:
        """Windows and rows of a step as the first block sees them, where they are no tokens: all
        rows may be one list.
        """

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            *shape, _ = Site.input(args, kwargs).shape
            windows = max(1, self._batch[0])
            if len(shape) == 1 or shape[0] == 1:
                self._batch = (windows, shape[-1] // windows)
            else:
                self._batch = (shape[0], shape[1])

        return self.architecture.blocks[0].register_forward_pre_hook(before, with_kwargs=True)

    def _hook(self, point: HookPoint, site: Site) -> Any:
        name, block = point.name, point.block
        if site.place == "input":

            def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not self._is_call(name, block):
                    return
                with of_points([name]):
                    value = site.read(site.given(args, kwargs), self._batch)
                self._hand_over(name, value)

            return site.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if not self._is_call(name, block):
                return
            with of_points([name]):
                value = site.read(site.chosen(output), self._batch)
            self._hand_over(name, value)

        return site.module.register_forward_hook(after)

    def _hook_state(self, point: HookPoint, site: Site) -> Any:
        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            state = state_of(self._cache, module, output, point.value, self._batch)
            self._hand_over(point.name, state)

        return site.module.register_forward_hook(after)

    def _inside(self, names: dict[str, str]) -> Callable[[str, torch.Tensor], None]:
        def read(value: str, tensor: torch.Tensor) -> None:
            if value in (SCORES, PATTERN):
                missing = (
                    self._seen + self._batch[1] - tensor.shape[3]
                )  # keys that a sliding window has dropped
                if missing > 0:
                    fill = -torch.inf if value == SCORES else 0.0
                    tensor = torch.nn.functional.pad(tensor, (missing, 0), value=fill)
            self._hand_over(names[value], tensor)

        return read

    def _hand_over(self, name: str, value: torch.Tensor) -> None:
        self._read.add(name)
        self._sink(name, value)

    def _site(self, point: HookPoint) -> Site:
        if self.architecture.stages is not None:
            return self.architecture.stages.of(point).site
        if point.value in RESIDUALS:  # known without a look at the block's inside
            return replace(self.architecture.residual(point), read=self._stream)
        return Anatomy.of(self.architecture).site(point)

    def _stop_after(self, deepest: int) -> Any:
        if self.architecture.stages is not None:
            site = self.architecture.stages.last(self._points).site
        elif deepest < 0:
            site, _ = self.architecture.ends_of(0)
        elif deepest < len(self.architecture.blocks):
            _, site = self.architecture.ends_of(deepest)
        else:
            last = Anatomy.of(self.architecture).end
            assert last is not None
            site = Site(last, "output")
        if site.place == "input":
            return site.module.register_forward_pre_hook(_stop)
        return site.module.register_forward_hook(
            lambda *_: _stop() if self._is_call("the deepest", deepest) else None
        )


def _stop(*_: Any) -> None:
    raise _DeepestReached
