"""A tower is tried on two inputs of its own before rows are taken from it, and a vision-language
model on a conversation of the run.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

from theloom.errors import HookError, ModelError
from theloom.hooks.blocks import Architecture
from theloom.hooks.failures import MODEL_ERRORS, why
from theloom.hooks.layouts.trial import cannot_run
from theloom.hooks.taps import Taps
from theloom.model.checks import SelfCheck, largest_error
from theloom.model.forward import no_cache, start_afresh
from theloom.model.reference import reference_residuals
from theloom.model.towers.trial_inputs import trial_inputs
from theloom.rows.tower_inputs import is_packed, samples_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ROWS = 3  # fewer than any input has: the model's own size is taken
_REASON = "an image or a clip goes in one pass"


def tower_check(architecture: Architecture, tolerance: float) -> SelfCheck:
    """Show that taps read a tower's own hidden states, and that two inputs in one batch leave each
    other's rows alone.

    Args:
        architecture: Of a loaded tower.
        tolerance: The error, as a share of the largest value, that rounding explains.

    Returns:
        What was found, with errors as shares of the largest value.

    Raises:
        ModelError: Rows would not be what the model computes; with the reason.
    """
    import torch

    model, limit = architecture.model, 10 * tolerance
    name, main = type(model).__name__, model.main_input_name
    inputs = trial_inputs(model, 2, _ROWS)
    inputs[main].chunk(2)[1].copy_(inputs[main].chunk(2)[1].flip(-1).mul(0.5))
    each = [{name: value.chunk(2)[n] for name, value in inputs.items()} for n in (0, 1)]
    try:
        alone = [_residuals(architecture, one) for one in each]
        states = reference_residuals(architecture, **each[0])
        both = _residuals(architecture, inputs | {"input_ids": torch.zeros(2, 1).long()})
    except MODEL_ERRORS as error:
        raise ModelError(f"{cannot_run(model)}: {why(error)}") from None
    except HookError as error:
        raise ModelError(f"{name}: {error}") from None
    states_error = largest_error({n: states[n] for n in alone[0]}, alone[0])
    if not states_error <= limit:
        raise ModelError(
            f"{name}: the residual stream that is read differs from its own output_hidden_states "
            f"(by {states_error:.2g} of the largest value): its blocks are not one stream"
            if architecture.stages is None
            else f"{name}: the outputs of its stages differ from its own output_hidden_states (by "
            f"{states_error:.2g} of the largest value), so none is read"
        )
    together = max(_apart(alone[n], both, n) for n in (0, 1))
    packed = is_packed(samples_of(model.config))  # an image may have another grid than the next
    if not together <= limit:
        log.warning(
            "%s: what runs beside a document changes its rows, by %.2g of the largest value: every "
            "document goes by itself",
            name,
            together,
        )
    return SelfCheck(
        states_error,
        together,
        math.inf,
        causal=True,  # no padding, and so no mask of it
        streams=False,
        not_streamed=_REASON,
        alone=packed or not together <= limit,
    )


def images_check(
    architecture: Architecture, ids: "torch.Tensor", inputs: dict[str, Any], tolerance: float
) -> float:
    """Show that taps read a model's own hidden states of a conversation with images: a model may
    add something of the images between its blocks.

    Args:
        architecture: Of a loaded vision-language model.
        ids: Token ids of a document, (1, positions).
        inputs: What the model reads of it beside them.
        tolerance: The error, as a share of the largest value, that rounding explains.

    Returns:
        The error found, as a share of the largest value.

    Raises:
        ModelError: Rows would not be what the model computes; with the reason.
    """
    model, name = architecture.model, type(architecture.model).__name__
    given = {"input_ids": ids, **inputs}
    given = {n: v.to(model.device) for n, v in given.items()} | no_cache(model)
    try:
        found = _residuals(architecture, given)
        states = reference_residuals(architecture, **given)
    except MODEL_ERRORS as error:
        raise ModelError(f"{name} cannot be run on images in a text: {why(error)}") from None
    except HookError as error:
        raise ModelError(f"{name}: {error}") from None
    apart = largest_error({n: states[n] for n in found}, found)
    if not apart <= 10 * tolerance:
        raise ModelError(
            f"{name}: with images the residual stream that is read differs from its own "
            f"output_hidden_states (by {apart:.2g} of the largest value): it adds to the stream "
            "between its blocks; take the images out of the conversations"
        )
    return apart


def _apart(alone: dict[str, "torch.Tensor"], both: dict[str, "torch.Tensor"], row: int) -> float:
    return largest_error(alone, {n: v[row : row + 1] for n, v in both.items()})


def _residuals(architecture: Architecture, inputs: dict[str, Any]) -> dict[str, "torch.Tensor"]:
    """Every residual of the loaded blocks, or the output of every stage, FP32 on the CPU."""
    import torch

    points, count = architecture.stream, len(architecture.loaded)
    if architecture.stages is None:
        points = [p for p in points if p.block < count]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        seen[name] = value.float().cpu().clone()

    start_afresh(architecture)
    with torch.inference_mode(), Taps(architecture, points, keep) as taps:
        taps.run(**inputs)
    return seen
