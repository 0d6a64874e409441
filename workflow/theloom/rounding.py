"""How far a model's own 16-bit forward pass is from one in FP32: what rounding explains, hook point by hook point.

Where a block takes back a large value that an earlier one has added, as models do with massive activations, what is
left has the rounding errors of what has gone: two orders of summing differ by more of it than anywhere else.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from theloom import fidelity, memory
from theloom.dataset import Activations
from theloom.hooks import HookPoint
from theloom.model import LoadedModel
from theloom.schema import Config
from theloom.source import ModelFiles

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# the values of hook points, by name, in one plain pass over ids (1, position)
Values = Callable[[LoadedModel, "torch.Tensor", Sequence[HookPoint]], "dict[str, torch.Tensor]"]
Doubtful = Mapping[int, Sequence[HookPoint]]  # by window
MOST_BYTES = 1 << 30  # of doubtful values that wait for FP32; where there are more, rounding is not what is wrong


def waiting(acts: Activations, window: int, point: HookPoint) -> int:
    """Bytes of a window's values as float32."""
    tokens = int(acts.window_offset[window + 1] - acts.window_offset[window])
    return 4 * tokens * math.prod(acts[point.name].shape[1:])


def say_too_much() -> None:
    """Why nothing is compared to FP32."""
    log.warning("more than %s of values differ: not compared to FP32", memory.in_words(MOST_BYTES))


def own(loaded: LoadedModel, acts: Activations, doubtful: Doubtful, values: Values) -> "dict[int, list[torch.Tensor]]":
    """The values of a model in its precision, by window, as float32 on the host."""
    found = {}
    for window, points in doubtful.items():
        by_name = values(loaded, fidelity.window_ids(acts, window).to(loaded.device), points)
        found[window] = [by_name[p.name].float().cpu() for p in points]
    return found


def measure(
    config: Config,
    files: ModelFiles,
    acts: Activations,
    doubtful: Doubtful,
    found: "Mapping[int, Sequence[torch.Tensor]]",
    values: Values,
) -> dict[str, float]:
    """By hook point the largest distance of `own`'s values from FP32, as a share of the largest value.

    Loads the model in FP32: the other one should be gone by then. Empty, and why in the log, where it does not fit.
    """
    points = list({p.name: p for of_window in doubtful.values() for p in of_window}.values())
    exact = fidelity.exact_model(config, files, acts, list(doubtful), points)
    if exact is None:
        return {}
    shares: dict[str, float] = {}
    for window, of_window in doubtful.items():
        truths = values(exact, fidelity.window_ids(acts, window).to(exact.device), of_window)
        for point, rounded in zip(of_window, found[window], strict=True):
            shares[point.name] = max(shares.get(point.name, 0.0), share(rounded, truths[point.name]))
    return shares


def share(rounded: "torch.Tensor", truth: "torch.Tensor") -> float:
    """The largest distance of a model's values from those in FP32, as a share of the largest of these."""
    truth = truth.float().cpu()
    apart = float((rounded - truth).masked_fill(rounded == truth, 0.0).abs().max())  # both may be -inf
    return apart / max(float(truth.masked_fill(truth.isneginf(), 0.0).abs().max()), 1e-30)
