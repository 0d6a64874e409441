"""The residual stream as the model itself tells it: `output_hidden_states`, by the names of hook
points.

Most models give the input of every block and then what the final norm makes of the last output;
some (Mamba, RWKV) give the output of every block. Which it is, is seen: by the inputs of the first
two blocks and the last one's output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from theloom.errors import ModelError
from theloom.hooks.blocks import Architecture
from theloom.hooks.layouts.chunked import sees_whole_pass
from theloom.hooks.points import LAST_STATE, RESIDUALS, point
from theloom.hooks.sites import Site, stream_of
from theloom.hooks.stages.stage import as_rows, own_states
from theloom.model.forward import start_afresh
from theloom.rows.modality import senses

if TYPE_CHECKING:
    import torch


def reference_residuals(architecture: Architecture, **inputs: Any) -> dict[str, "torch.Tensor"]:
    """Compute every residual of the loaded blocks in one plain forward pass, without taps.

    Args:
        architecture: of the model.
        **inputs: of the model's forward, such as `input_ids`.

    Returns:
        (batch, position, hidden size) by hook point.

    Raises:
        ModelError: the model does not give its hidden states, or not one for every block.
    """
    import torch

    from theloom.model.pruning import passed_over

    start_afresh(architecture)
    if architecture.stages is not None:
        return _of_stages(architecture, inputs)
    model, blocks, loaded = architecture.model, architecture.blocks, architecture.loaded
    seen: dict[str, torch.Tensor] = {}
    joints = _Joints(architecture) if architecture.repeats else None
    firsts = range(min(2, len(blocks)) if joints is None else 1)
    sites = {str(i): architecture.ends_of(i)[0] for i in firsts}
    sites["last"] = architecture.ends_of(len(loaded) - 1)[1]
    handles = [_keep(seen, name, site) for name, site in sites.items()]
    handles += [] if joints is None else joints.handles
    try:
        with torch.inference_mode(), passed_over(architecture), _no_hooks_left(model):
            output = model(**inputs, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    given = getattr(output, "hidden_states", None)
    states = list(
        given if given is not None else getattr(output, "decoder_hidden_states", None) or ()
    )
    given_ids = inputs.get("input_ids")
    if given_ids is not None and not senses(model.config):
        # a block may have positions before windows, or all tokens in a row
        read, batch = stream_of(model), (given_ids.shape[0], given_ids.shape[1])
        seen = {name: read(value, batch) for name, value in seen.items()}
        if sees_whole_pass(model):  # its own hidden states have padding of its own
            states = [read(state, batch) for state in states]
        states = [read(state, batch) if state.ndim > 3 else state for state in states]
    if seen["0"].ndim == 2:  # the rows of a tower may be one list, without windows
        states = [state[None] for state in states]
        seen = {name: value[None] for name, value in seen.items()}
    name, count = type(model).__name__, len(loaded)
    if len(states) < count:
        raise ModelError(
            f"{name} gives {len(states)} hidden states for its {count} blocks: its rows "
            "cannot be checked"
        )
    first = seen["0"]
    second = seen.get("1", states[1] if joints is not None else seen["last"])
    if _same(states[0], second) and not _same(states[0], first):
        inputs_, outputs = [first, *states[: count - 1]], [*states[: count - 1], seen["last"]]
    else:
        inputs_, outputs = states[:count], [*states[1:count], seen["last"]]
    if joints is not None:
        inputs_ = [joints.found.get(number, state) for number, state in enumerate(inputs_)]
    side, found = architecture.side, dict[str, torch.Tensor]()
    for value, of_blocks in zip(RESIDUALS, (inputs_, outputs), strict=True):
        for block, state in enumerate(of_blocks):
            found[point(value, block, count, (), side).name] = state.detach()
    last = getattr(output, "last_hidden_state", None)
    if last is not None and last.ndim == 2:
        last = last[None]
    if last is not None:
        found[point(LAST_STATE, count, count, (), side).name] = last.detach()
    return found


def _keep(seen: "dict[str, torch.Tensor]", name: str, site: Site) -> Any:
    """Keep a copy of what a site has in a pass: of an input the first, of an output the last."""

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if name == "last" or name not in seen:
            seen[name] = site.given(args, kwargs).clone()

    def after(module: Any, args: Any, output: Any) -> None:
        seen[name] = site.chosen(output).clone()

    if site.place == "input":
        return site.module.register_forward_pre_hook(before, with_kwargs=True)
    return site.module.register_forward_hook(after)


def _of_stages(architecture: Architecture, inputs: dict[str, Any]) -> dict[str, "torch.Tensor"]:
    """What the model's own hidden states say of its stages, by rows."""
    import torch

    assert architecture.stages is not None
    with torch.inference_mode(), _no_hooks_left(architecture.model):
        states = own_states(architecture.model(**inputs, output_hidden_states=True))
    return {
        stage.point.name: as_rows(stage.axis)(states[stage.number], None).detach()
        for stage in architecture.stages.found
    }


class _Joints:
    """The inputs of blocks that are not the output of the block before, in a model whose modules
    are several blocks each: its own hidden states are outputs, and do not tell them.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.found: dict[int, torch.Tensor] = {}
        self._number = 0
        self._last: torch.Tensor | None = None
        modules = dict.fromkeys(architecture.blocks)
        self.handles = [
            m.register_forward_pre_hook(self._before, with_kwargs=True) for m in modules
        ]
        self.handles += [m.register_forward_hook(self._after) for m in modules]

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        given = Site.input(args, kwargs)
        if self._last is not None and not _same(given, self._last):
            self.found[self._number] = given.clone()

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self._last, self._number = Site.output(output), self._number + 1


@contextmanager
def _no_hooks_left(model: "torch.nn.Module") -> Iterator[None]:
    """Take off what transformers leaves on a model that is requested its hidden states: hooks, and
    a mark of them.
    """
    before = [(m, set(m._forward_hooks), vars(m).get(_MARK)) for m in model.modules()]
    try:
        yield
    finally:
        for module, hooks, mark in before:
            for key in set(module._forward_hooks) - hooks:
                for kept in (module._forward_hooks, module._forward_hooks_with_kwargs):
                    kept.pop(key, None)
            if mark is None:
                vars(module).pop(_MARK, None)


_MARK = "_output_capturing_hooks_installed"


def _same(a: "torch.Tensor", b: "torch.Tensor") -> bool:
    return a.shape == b.shape and bool((a == b).all())
