"""Which module makes which entry of an image model's own hidden states.

It is seen in a pass of one image, best on tensors without bytes: the outermost module whose output,
or input, is that tensor, or of which it is a copy in another order of axes. A second image of twice
the size tells channels from positions.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from theloom.errors import ModelError
from theloom.hooks.failures import MODEL_ERRORS, why
from theloom.hooks.points import stage_point
from theloom.hooks.sites import Site
from theloom.hooks.stages.stage import Stage, Stages, as_rows, own_states
from theloom.rows.modality import image_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COPIES = (  # those made of others too: under inference mode they arrive as one
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten._unsafe_view.default,
)


def find_stages(model: "PreTrainedModel") -> Stages:
    """Find the stages of a model of images.

    Args:
        model: of transformers, whose config is marked as that of a tower; it runs twice.

    Returns:
        Its stages.

    Raises:
        ModelError: it does not run on an image, or gives no hidden states.
    """
    name, shape = type(model).__name__, image_shape(model.config)
    try:
        own = _Pass(model, shape)
    except MODEL_ERRORS as error:
        raise ModelError(f"{name} cannot be run on an image alone: {why(error)}") from None
    if not own.states:
        raise ModelError(
            f"{name} gives no hidden_states, by which its stages are told; give its backbone alone"
        )
    try:
        twice = _Pass(model, (shape[0], 2 * shape[1], 2 * shape[2]))
    except MODEL_ERRORS:  # a model of one size alone
        twice = None
    found, unsupported = [], {}
    for number in range(len(own.states)):
        stage = _stage(number, own, twice)
        if isinstance(stage, str):
            unsupported[stage_point(number, 0, 0).name] = stage
        else:
            found.append(stage)
    if not found:
        raise ModelError(f"{name}: of its hidden_states, {next(iter(unsupported.values()))}")
    return Stages(tuple(found), unsupported)


class _Pass:
    """One pass of a model over an image: its own hidden states, and what its modules gave."""

    def __init__(self, model: "PreTrainedModel", shape: tuple[int, ...]) -> None:
        self._inside = {m: set(m.modules()) for m in model.modules() if m is not model}
        self._calls: Counter[nn.Module] = Counter()
        # in the order in which they were there
        self._met: list[tuple[Site, torch.Tensor]] = []
        image = torch.zeros(1, *shape, dtype=model.dtype, device=model.device)
        self._copies = _Copies()
        self._makers: dict[int, list[int]] = {}
        with ExitStack() as opened:
            for module in self._inside:
                opened.callback(
                    module.register_forward_pre_hook(self._before, with_kwargs=True).remove
                )
                opened.callback(module.register_forward_hook(self._after).remove)
            opened.enter_context(torch.inference_mode())
            opened.enter_context(self._copies)
            given: dict[str, Any] = {str(model.main_input_name): image}
            output = model(**given, output_hidden_states=True)
        self.states = own_states(output)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module] += 1
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if first is not None:
            self._met.append((Site(module, "input"), first))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        several = isinstance(output, tuple | list)
        for index, value in enumerate(output if several else [output]):
            if isinstance(value, torch.Tensor):
                site = Site(module, "output", index=index if several else None)
                self._met.append((site, value))

    def makers(self, number: int) -> list[int]:
        """Where an entry of the hidden states was met, the best place first."""
        if number not in self._makers:
            self._makers[number] = self._looked_for(number)
        return self._makers[number]

    def _looked_for(self, number: int) -> list[int]:
        entry = self.states[number]
        origin = self._copies.origin(entry)
        outputs: list[int] = []
        inputs: list[int] = []
        copies: list[int] = []
        for place, (site, value) in enumerate(self._met):
            if self._calls[site.module] > 1:
                continue
            if _same(value, entry):
                (inputs if site.place == "input" else outputs).append(place)
            elif site.place == "output" and self._copies.origin(value) == origin:
                copies.append(place)
        return [*outputs[::-1], *inputs, *copies[::-1]]  # the outermost first

    def met(self, place: int) -> tuple[Site, torch.Tensor]:
        """The site of a place, and the tensor that was there."""
        return self._met[place]

    def around(self, module: nn.Module, others: set[nn.Module]) -> bool:
        """Whether one of other modules is within a module."""
        return bool((self._inside[module] - {module}) & others)

    def again(self, site: Site) -> torch.Tensor | None:
        """What this pass met where another met something."""
        where = (site.module, site.place, site.index)
        return next((v for s, v in self._met if (s.module, s.place, s.index) == where), None)


class _Copies(TorchDispatchMode):
    """Which tensors are copies of others, in whatever order of axes."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage gets the place of another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self._alive += [args[0], result]
            if (copy := _storage(result)) != (source := _storage(args[0])):
                self._sources[copy] = source
        return result

    def origin(self, value: torch.Tensor) -> int:
        """The storage of what a tensor is a copy of; its own where it is none."""
        found = _storage(value)
        while found in self._sources:
            found = self._sources[found]
        return found


def _stage(number: int, own: _Pass, twice: _Pass | None) -> Stage | str:
    """The stage of an entry, or why there is none."""
    entry = own.states[number]
    others = {
        own.met(place)[0].module
        for n, state in enumerate(own.states)
        if not _same(state, entry)
        for place in own.makers(n)[:1]
    }
    places = [p for p in own.makers(number) if not own.around(own.met(p)[0].module, others)]
    if not places:
        return f"entry {number} of the model's hidden_states is no module's output"
    site, value = own.met(places[0])
    wider = None if twice is None else twice.again(site)
    of_entry = twice.states[number] if twice and len(twice.states) > number else None
    axis, axis_of_entry = _channels(value, wider), _channels(entry, of_entry)
    if axis is None or axis_of_entry is None or value.shape[axis] != entry.shape[axis_of_entry]:
        return f"the channels of a value of shape {tuple(entry.shape)} cannot be told"
    width = int(value.shape[axis])
    rows = value.numel() // width
    return Stage(number, replace(site, read=as_rows(axis)), places[0], axis_of_entry, rows, width)


def _channels(value: torch.Tensor, wider: torch.Tensor | None) -> int | None:
    """The axis of channels: the one that an image of another size leaves alone; where there is no
    such image, or it leaves more, the last of three, or the one that is unlike two equal ones.
    """
    shape = tuple(value.shape)
    if len(shape) not in (3, 4) or shape[0] != 1:
        return None
    if wider is not None and wider.ndim == value.ndim:
        same = [a for a in range(1, len(shape)) if wider.shape[a] == shape[a]]
        if len(same) == 1:
            return same[0]
    if len(shape) == 3:
        return 2
    alike = [axis for axis, rest in ((1, shape[2:]), (3, shape[1:3])) if rest[0] == rest[1]]
    return alike[0] if len(alike) == 1 else None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (_storage(one) == _storage(other) and one.numel() == other.numel())


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)
