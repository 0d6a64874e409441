"""Every hook point that a model has, with shapes: each is read once, in a forward pass of three
tokens.
"""

from collections.abc import Collection
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from theloom.errors import HookError
from theloom.hooks.blocks import Architecture
from theloom.hooks.failures import MODEL_ERRORS, UnreadableError, why
from theloom.hooks.layouts.trial import cannot_run, evaluating
from theloom.hooks.locate import Anatomy
from theloom.hooks.points import HookCatalog, HookPoint
from theloom.hooks.taps import Sink, Taps


def build_catalog(architecture: Architecture) -> HookCatalog:
    """List what can be read from a model.

    Args:
        architecture: the model with its blocks.

    Returns:
        Its hook points.

    Raises:
        ModelError: it does not run on token ids alone.
    """
    if architecture.stages is not None:
        return architecture.stages.catalog
    anatomy = Anatomy.of(architecture)
    found = _known.get(architecture.model)
    if found is None or found[0] is not anatomy:
        found = _known[architecture.model] = (anatomy, _read_all(architecture, anatomy))
    return found[1]


_known: WeakKeyDictionary[nn.Module, tuple[Anatomy, HookCatalog]] = WeakKeyDictionary()


def _read_all(architecture: Architecture, anatomy: Anatomy) -> HookCatalog:
    unsupported = dict(anatomy.unsupported)
    reasons: list[str] = []
    states = [p for p in anatomy.points if p.of_document]
    rowwise = [p for p in anatomy.points if not p.of_document]
    shapes = _shapes(architecture, rowwise, reasons)
    if shapes is None or len(shapes) < len(rowwise):
        # the inside of attention may have ended the forward: without it, and then layer by layer
        inside = [p for p in rowwise if p.over_keys]
        rest = _readable(architecture, [p for p in rowwise if not p.over_keys], unsupported)
        shapes = _shapes(architecture, rest, reasons) or {}
        for block in sorted({p.block for p in inside}):
            shapes |= _shapes(architecture, [p for p in inside if p.block == block], reasons) or {}
    for value in {p.value for p in states}:  # each by itself: a model may have one of them alone
        of_value = [p for p in states if p.value == value]
        shapes |= _shapes(architecture, of_value, reasons) or {}
    points = []
    for point in anatomy.points:
        if point.name in shapes:
            points.append(replace(point, shape=shapes[point.name]))
        elif point.name not in unsupported:
            unsupported[point.name] = (
                reasons[-1] if reasons else "it is not reached in a forward pass"
            )
    return HookCatalog(points, unsupported)


def _readable(
    architecture: Architecture, points: list[HookPoint], unsupported: dict[str, str]
) -> list[HookPoint]:
    """Leave out values that a pass does not have as hook points have them, such as those of several
    residual streams side by side: a value is left out of all blocks, with its reason.
    """
    remaining = points
    while remaining:
        try:
            _run_three(architecture, remaining, lambda name, value: None)
        except UnreadableError as error:
            gone = {p.value for p in remaining if p.name in error.names}
            unsupported |= {p.name: str(error) for p in remaining if p.value in gone}
            remaining = [p for p in remaining if p.value not in gone]
            if gone:
                continue
        except (HookError, *MODEL_ERRORS):
            pass
        return remaining
    return remaining


def _shapes(
    architecture: Architecture, points: Collection[HookPoint], reasons: list[str]
) -> dict[str, tuple[int, ...]] | None:
    """The shape of a token's row by hook point; None where a forward with these taps fails.

    Why it fails is added to `reasons`.
    """
    over_keys = {p.name for p in points if p.over_keys}
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: torch.Tensor) -> None:
        found[name] = (value.shape[1],) if name in over_keys else tuple(value.shape[2:])

    try:
        _run_three(architecture, points, see)
    except HookError as error:
        reasons.append(str(error))
        return found if len(found) < len(points) and not over_keys else None
    except MODEL_ERRORS as error:
        reasons.append(f"{cannot_run(architecture.model)}: {why(error)}")
        return None
    return found


def _run_three(architecture: Architecture, points: Collection[HookPoint], sink: Sink) -> None:
    """A pass of three tokens with taps at hook points."""
    model = architecture.model
    with torch.inference_mode(), evaluating(model), Taps(architecture, list(points), sink) as taps:
        taps.run(input_ids=torch.arange(3, device=model.device)[None], use_cache=False)
