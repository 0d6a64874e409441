"""What of a model a run needs: neither blocks behind the deepest hook point nor what comes after
them.

Blocks are known by their number. What else is not needed is seen on fake tensors: a module that the
whole forward pass calls, and that the pass up to the deepest hook point does not; or a whole model
within the model (a vision tower) that is not called at all.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from theloom.hooks.blocks import Architecture
from theloom.hooks.failures import MODEL_ERRORS
from theloom.hooks.layouts.ends import parts_of
from theloom.hooks.layouts.trial import BlockNotLoadedError
from theloom.hooks.points import LAST_STATE, HookPoint, deepest_block
from theloom.hooks.sites import Site
from theloom.hooks.taps import Taps
from theloom.rows.modality import CHAT, modality_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotLoaded(nn.Module):
    """Stands where a block or another module is not loaded."""

    not_loaded = True

    def __init__(self) -> None:
        super().__init__()
        self.instead: Callable[[torch.Tensor], Any] | None = (
            None  # what to give for its input, in `passed_over`
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: it has no weights. EncoderDecoderModel hands this on to its halves."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """End the forward pass, or within `passed_over` return the input.

        Args:
            *args: as of the module that is not loaded.
            **kwargs: as of the module that is not loaded.

        Returns:
            What `instead` makes of the input.

        Raises:
            BlockNotLoadedError: nothing stands in its place.
        """
        if self.instead is None:
            raise BlockNotLoadedError
        return self.instead(Site.input(args, kwargs))


@contextmanager
def passed_over(architecture: Architecture) -> Iterator[None]:
    """Let forward passes go on to their end: what is not loaded gives its input, a block in the
    form that blocks have.

    So a model says what its loaded blocks did; what it says of the others is of no use.

    Args:
        architecture: of a model, whose first blocks are loaded.
    """
    forms: dict[int, Any] = {}
    missing = [m for m in architecture.model.modules() if isinstance(m, NotLoaded)]
    turn = {m: n for block in architecture.blocks for n, m in enumerate(parts_of(block))}

    def formed(number: int) -> Callable[[torch.Tensor], Any]:
        def as_loaded(value: torch.Tensor) -> Any:
            form = forms[number]
            if not isinstance(form, tuple):
                return value
            values = (value, *form[1:])
            return form._make(values) if hasattr(form, "_make") else values

        return as_loaded

    for module in missing:
        module.instead = formed(turn[module]) if module in turn else _itself
    handles = [
        part.register_forward_hook(
            lambda module, args, output, number=number: forms.update({number: output})
        )
        for number, part in enumerate(parts_of(architecture.loaded[-1]))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in missing:
            module.instead = None


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous()  # as most modules give it: views follow in GLM-V's vision part


def unneeded(described: Architecture, points: Sequence[HookPoint]) -> list[str]:
    """Find the modules that reading hook points does not need.

    Runs the model twice on three tokens: call it under the fake mode of a fake model.

    Args:
        described: the architecture of a model.
        points: the hook points to read.

    Returns:
        Names of the modules, none of them within another.
    """
    from transformers import PreTrainedModel

    if described.stages is not None:  # small models, whose own hidden states are wanted whole
        return []
    model, deepest = described.model, deepest_block(points)
    blocks = {m for block in described.blocks for m in block.modules()}
    around = {a for name, m in model.named_modules() if m in blocks for a in _ancestors(name)} | {
        ""
    }
    everywhere = _called(described, None)
    sees = modality_of(model.config) == CHAT  # images, which three tokens are not
    # what the model's own last hidden state is, is seen where its forward pass goes to the end
    whole = any(p.value == LAST_STATE for p in points)
    before = everywhere if whole else _called(described, points)
    end = max(deepest, 0) + 1
    needed = {m for block in described.blocks[:end] for m in parts_of(block)}
    behind = {m for block in described.blocks[end:] for m in parts_of(block)}
    dropped = {n for n, m in model.named_modules() if m in behind and m not in needed}
    for name, module in model.named_modules():
        if name in around or module in blocks or module in before:
            continue
        apart = (
            not sees
            and isinstance(module, PreTrainedModel)
            and not everywhere.intersection(module.modules())
        )
        if apart or (module in everywhere and not before.intersection(module.modules())):
            dropped.add(name)
    outermost = sorted(n for n in dropped if not dropped.intersection(_ancestors(n)))
    return [n for n in outermost if not (_is_read(model, n) and _stops_without(described, n))]


def _is_read(model: "PreTrainedModel", name: str) -> bool:
    """Whether code around a module reads something of it, as `self.norm.weight`, by its text."""
    parent, _, leaf = name.rpartition(".")
    read = re.compile(rf"\bself\.{re.escape(leaf)}\.\w")
    for of_class in type(model.get_submodule(parent)).__mro__:
        try:
            found = of_class.__module__.startswith("transformers.models.") and bool(
                read.search(inspect.getsource(of_class))
            )
        except (OSError, TypeError):  # a class made here, of one that has a source
            continue
        if found:
            return True
    return False


def _stops_without(described: Architecture, name: str) -> bool:
    """Whether a pass over three tokens fails if a module is not there."""
    parent, _, leaf = name.rpartition(".")
    around = described.model.get_submodule(parent)
    module = getattr(around, leaf)
    setattr(around, leaf, NotLoaded())
    try:
        with passed_over(described):
            _called(described, None)
    except (*MODEL_ERRORS, BlockNotLoadedError):
        return True
    finally:
        setattr(around, leaf, module)
    return False


def leave_out(model: "PreTrainedModel", names: Collection[str]) -> None:
    """Put NotLoaded where modules of these names are.

    Args:
        model: which is changed.
        names: of modules, none of them within another.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, NotLoaded())
    model.all_tied_weights_keys = {
        tied: source
        for tied, source in model.all_tied_weights_keys.items()
        if not set(_ancestors(tied)).intersection(names)
    }


def storages(model: nn.Module, left_out: Collection[str] = ()) -> list[int]:
    """List the storages of a model's parameters and buffers, tied ones once.

    Args:
        model: real or fake.
        left_out: names of modules whose tensors do not count.

    Returns:
        Bytes of each storage.
    """
    found = {
        t.untyped_storage()._cdata: t
        for name, t in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        if not any(ancestor in left_out for ancestor in _ancestors(name))
    }
    return [t.untyped_storage().nbytes() for t in found.values()]


def _ancestors(name: str) -> list[str]:
    """Of `a.b.c`: `a` and `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _called(described: Architecture, points: Sequence[HookPoint] | None) -> set[nn.Module]:
    """The modules that a forward pass over three tokens calls: the whole pass, or up to the deepest
    hook point.
    """
    called: set[nn.Module] = set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(module)

    handles = [m.register_forward_pre_hook(note) for m in described.model.modules()]
    ids = torch.arange(3)[None] * 0  # with values where these are known
    try:
        with torch.inference_mode():
            if points is None:
                described.model(input_ids=ids, use_cache=False)
            else:
                with Taps(described, points, lambda name, value: None) as taps:
                    called.clear()  # placing taps may run the model
                    taps.run(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called
