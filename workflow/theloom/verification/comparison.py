"""Stored rows against recomputed ones, hook point by hook point; and where 16 bits differ by much,
against FP32.

Where a block takes back a large value that an earlier one has added, as models do with massive
activations, what is left has the rounding errors of what has gone: two orders of summing differ by
more of it than anywhere else. So the model's own distance from FP32 is what rounding explains
there.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from theloom.config.schema import Config
from theloom.dataset.activations import Activations
from theloom.hooks.points import HookPoint
from theloom.model.files import ModelFiles
from theloom.model.loading import LoadedModel
from theloom.precision import TOLERANCE
from theloom.terminal import format_bytes
from theloom.verification.fp32 import window_rows

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

MOST_BYTES = (
    1 << 30
)  # of doubtful values that wait for FP32; where there are more, rounding is not what is wrong


@dataclass(frozen=True)
class Recomputed:
    """One window against the oracle: for each hook point its largest error and its largest absolute
    value.
    """

    window: int
    error: list[float]
    largest: list[float]


@dataclass(frozen=True)
class Recomputation:
    """All recomputed windows, the hook points of their errors, the largest error allowed, and the
    model they are of.

    `rounding`: by hook point whose error is larger than that, how far the model itself is from
    FP32, both as a share of the largest value.
    """

    points: list[HookPoint]
    results: list[Recomputed]
    tolerance: float
    files: ModelFiles | None  # where a quantised run can be compared to FP32
    rounding: dict[str, float]

    @property
    def worst(self) -> np.ndarray:
        """By hook point the largest error, as a share of the largest value."""
        errors, largest = (
            np.array([getattr(r, name) for r in self.results]) for name in ("error", "largest")
        )
        return (errors / np.maximum(largest, 1e-30)).max(axis=0)

    @property
    def allowed(self) -> np.ndarray:
        """By hook point the largest error allowed: two passes that are each as far from FP32 as the
        model itself.
        """
        return np.array(
            [max(self.tolerance, 2 * self.rounding.get(p.name, 0.0)) for p in self.points]
        )


class Comparison:
    """What a model gives for windows of a run: in its precision (`see`), then in FP32 what is
    `doubtful` (`judge`).

    Values are of one window and hook point, (position, …), on any device.
    """

    def __init__(
        self, config: Config, acts: Activations, loaded: LoadedModel, points: list[HookPoint]
    ) -> None:
        quantised = loaded.quantization is not None
        self._acts, self._points, self._files = acts, points, loaded.files if quantised else None
        # the coarser of the forward pass' precision and the stored one decides what rounding
        # explains
        self._tolerance = config.verify.tolerance or max(
            loaded.tolerance, TOLERANCE[acts.precision]
        )
        self._may_doubt = not (
            config.verify.tolerance or quantised or loaded.precision.resolved == "fp32"
        )
        self._found: dict[int, dict[str, tuple[float, float]]] = defaultdict(dict)
        self._own: dict[int, dict[HookPoint, torch.Tensor]] = defaultdict(dict)
        self._waiting = 0
        self._rounding: dict[str, float] = {}

    def see(self, window: int, point: HookPoint, values: "torch.Tensor") -> None:
        """Compare values to the rows that are stored."""
        error, largest = self._found[window][point.name] = _compare(
            self._acts, window, point, values
        )
        if self._may_doubt and not error <= self._tolerance * largest:
            self._waiting += 4 * values.numel()
            if self._waiting <= MOST_BYTES:
                self._own[window][point] = values.float().cpu()
            else:
                self._own.clear()

    def doubtful(self) -> dict[int, list[HookPoint]]:
        """By window the hook points whose error is more than the tolerance, to be judged in FP32."""
        if self._waiting > MOST_BYTES:
            log.warning(
                "more than %s of values differ: not compared to FP32", format_bytes(MOST_BYTES)
            )
        return {window: list(points) for window, points in self._own.items()}

    def judge(self, window: int, point: HookPoint, exact: "torch.Tensor") -> None:
        """See how far the model's own values are from FP32; nothing for what is not doubtful."""
        if (own := self._own[window].pop(point, None)) is not None:
            apart, largest = _farthest(own, exact.float().cpu())
            self._rounding[point.name] = max(
                self._rounding.get(point.name, 0.0), apart / max(largest, 1e-30)
            )

    def result(self) -> Recomputation:
        """What has been seen, window by window."""
        pairs = {w: [found[p.name] for p in self._points] for w, found in self._found.items()}
        results = [
            Recomputed(w, [e for e, _ in pair], [m for _, m in pair]) for w, pair in pairs.items()
        ]
        return Recomputation(self._points, results, self._tolerance, self._files, self._rounding)


def _compare(
    acts: Activations, window: int, point: HookPoint, found: "torch.Tensor"
) -> tuple[float, float]:
    """Stored rows of a window against recomputed ones (position, …): the largest error, the largest
    absolute value.
    """
    import torch

    truth = found.float()
    stored = acts[point.name][window_rows(acts, window)].to(truth.device).float()
    if point.over_keys:  # (position, head, key), of this window's keys alone
        keys = torch.arange(truth.shape[2], device=truth.device)
        truth = torch.full_like(stored, point.fill).index_copy_(2, keys, truth)
    return _farthest(stored, truth)


def _farthest(values: "torch.Tensor", truth: "torch.Tensor") -> tuple[float, float]:
    """The largest distance, and the largest absolute value of the truth; -inf is left out of both."""
    same = values == truth  # also where both are -inf
    error = float((values - truth).masked_fill(same, 0.0).abs().max())
    return error, float(truth.masked_fill(truth.isneginf(), 0.0).abs().max())
