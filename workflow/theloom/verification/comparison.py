"""Compare stored rows to recomputed ones, per hook point, and suspect values to a finer format.

Models with massive activations add a large value in one block and subtract it in a later one. The
difference keeps the rounding errors of the large value, so two orders of summation disagree there
by more than the tolerance. The model's own distance from a finer format (FP32 for 16 bits, FP64 for
FP32) bounds what rounding explains, on this device and with these weights.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from theloom.config.schema import Config
from theloom.dataset.activations import Activations
from theloom.hooks.points import HookPoint
from theloom.model.files import ModelFiles
from theloom.model.loading import LoadedModel
from theloom.precision import FINER, TOLERANCE
from theloom.terminal import format_bytes
from theloom.verification.choice import whole_documents
from theloom.verification.encoding import Cost, cost, rounding
from theloom.verification.stored import StoredRows

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

# Limit of suspect values that are retained for a finer format: beyond it, rounding is not the
# cause.
MAX_SUSPECT_BYTES = 1 << 30


@dataclass(frozen=True)
class Recomputed:
    """Errors of one window against the reference.

    Args:
        window: number of the window in the dataset.
        max_abs_error: largest absolute difference, per hook point; where rows have a scale, beyond
            what their encoding explains.
        max_abs: largest absolute value of the reference, per hook point.
        costs: what the encoding of rows with a scale costs, per hook point; empty for other rows.
    """

    window: int
    max_abs_error: list[float]
    max_abs: list[float]
    costs: Sequence[Cost] = ()


@dataclass(frozen=True)
class Recomputation:
    """All recomputed windows of a run. Errors are shares of the largest absolute value.

    Args:
        points: hook points, in the order of the errors.
        results: one entry per recomputed window.
        tolerance: largest error allowed before rounding is taken into account.
        files: the model's files where a quantized run can be compared to FP32, else None.
        rounding: the model's own distance from the finer format, by name of suspect hook point.
        finer: that format, fp32 or fp64.
        suspect_bytes: size of the values above the tolerance: of more than `MAX_SUSPECT_BYTES`
            none is compared to `finer`.
    """

    points: list[HookPoint]
    results: list[Recomputed]
    tolerance: float
    files: ModelFiles | None
    rounding: dict[str, float]
    finer: str
    suspect_bytes: int = 0

    @property
    def worst(self) -> np.ndarray:
        """Largest error per hook point, as a share of the largest absolute value."""
        errors = np.array([r.max_abs_error for r in self.results])
        magnitudes = np.array([r.max_abs for r in self.results])
        return (errors / np.maximum(magnitudes, 1e-30)).max(axis=0)

    @property
    def tolerances(self) -> np.ndarray:
        """Largest error allowed per hook point, as a share of the largest absolute value.

        Two correct passes can each be as far from exact values as the model itself: twice its
        rounding.
        """
        return np.array(
            [max(self.tolerance, 2 * self.rounding.get(p.name, 0.0)) for p in self.points]
        )

    @property
    def costs(self) -> np.ndarray:
        """What the encoding of rows costs, (windows, hook points, 4) in the order of
        `encoding.Cost`; (windows, 0, 4) where rows have no scale.
        """
        costs = [np.asarray(r.costs, "<f8").reshape(-1, 4) for r in self.results]
        return np.stack(costs) if costs else np.empty((0, 0, 4))


class Comparison:
    """Compares a model's values to the stored rows, then the suspect ones to a finer format.

    Call `add` with values in the run's precision, `suspect` for what exceeds the tolerance,
    `compare_to_exact` with exact values of that, and `result` at the end. Values belong to one
    window and hook point, shape (position, …), on any device.
    """

    def __init__(
        self, config: Config, acts: Activations, loaded: LoadedModel, points: list[HookPoint]
    ) -> None:
        quantized = loaded.quantization is not None
        self._acts, self._points, self._files = acts, points, loaded.files if quantized else None
        # the coarser of compute and storage precision bounds the rounding error
        self._tolerance = config.verify.tolerance or max(
            loaded.tolerance, TOLERANCE[acts.precision]
        )
        self._may_suspect = not (config.verify.tolerance or quantized)
        self.finer = FINER[loaded.precision.resolved]
        self._stored, self._exact = StoredRows(acts), StoredRows(acts)
        self._errors: dict[int, dict[str, tuple[float, float]]] = defaultdict(dict)
        self._costs: dict[int, dict[str, Cost]] = defaultdict(dict)
        self._suspect: dict[int, dict[HookPoint, torch.Tensor]] = defaultdict(dict)
        self._suspect_bytes = 0
        self._rounding: dict[str, float] = {}

    def add(self, window: int, point: HookPoint, values: "torch.Tensor") -> None:
        """Compare a window's values at one hook point to the stored rows.

        Args:
            window: number of the window.
            point: the hook point.
            values: (position, …), in the run's precision.
        """
        unit = self._stored.of(window, point, values)
        if unit is None:
            return
        window, rows, values = unit
        stored, truth = _both(self._acts, rows, point, values)
        explained = rounding(self._acts, point.name, rows)
        error, max_abs = _max_abs_error(stored, truth, explained)
        self._errors[window][point.name] = error, max_abs
        if explained is not None:
            self._costs[window][point.name] = cost(stored, truth)
        if self._may_suspect and not error <= self._tolerance * max_abs:
            self._suspect_bytes += 4 * values.numel()
            if self._suspect_bytes <= MAX_SUSPECT_BYTES:
                self._suspect[window][point] = values.float().cpu()
            else:
                self._suspect.clear()

    def suspect(self) -> dict[int, list[HookPoint]]:
        """The hook points above the tolerance: those to compare to `finer`.

        Returns:
            Hook points by window; of all windows of a document where rows are pooled. None of them,
            after a warning, where too many bytes of values differ.
        """
        if self._suspect_bytes > MAX_SUSPECT_BYTES:
            log.warning(
                "more than %s of values differ: not compared to %s",
                format_bytes(MAX_SUSPECT_BYTES),
                self.finer.upper(),
            )
        return {
            w: list(points)
            for window, points in self._suspect.items()
            for w in (whole_documents(self._acts, [window]) if self._acts.pooled else [window])
        }

    @contextmanager
    def computed_finer(self) -> Iterator[None]:
        """Around passes of the model in `finer`, and what they give to `compare_to_exact`; a model
        that cannot run so is a warning.
        """
        try:
            yield
        except RuntimeError as error:  # such as code that works in FP32 whatever its weights are
            log.warning("not compared to %s: %s", self.finer.upper(), str(error).splitlines()[0])

    def compare_to_exact(self, window: int, point: HookPoint, exact: "torch.Tensor") -> None:
        """Record how far the model's own values are from those of the finer format.

        Args:
            window: number of the window.
            point: hook point; ignored unless it is suspect in this window.
            exact: values of the model in `finer`, (position, …).
        """
        unit = self._exact.of(window, point, exact)
        if unit is None:
            return
        window, _, exact = unit
        if (values := self._suspect[window].pop(point, None)) is not None:
            error, max_abs = _max_abs_error(values, exact.float().cpu())
            share = error / max(max_abs, 1e-30)
            self._rounding[point.name] = max(self._rounding.get(point.name, 0.0), share)

    def result(self) -> Recomputation:
        """The errors of all windows added so far.

        Returns:
            Errors by window and hook point, and the tolerance.
        """
        pairs = {w: [by_name[p.name] for p in self._points] for w, by_name in self._errors.items()}
        costs = {w: [by_name[p.name] for p in self._points] for w, by_name in self._costs.items()}
        results = [
            Recomputed(w, [e for e, _ in pair], [m for _, m in pair], costs.get(w, ()))
            for w, pair in pairs.items()
        ]
        return Recomputation(
            self._points,
            results,
            self._tolerance,
            self._files,
            self._rounding,
            self.finer,
            self._suspect_bytes,
        )


def _both(
    acts: Activations, rows: slice, point: HookPoint, values: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Stored rows and recomputed ones, in FP32, in one shape."""
    import torch

    truth = values.float()
    stored = acts[point.name][rows].to(truth.device).float()
    if point.over_keys:  # (position, head, key); stored rows are padded to the longest window
        keys = torch.arange(truth.shape[2], device=truth.device)
        truth = torch.full_like(stored, point.fill).index_copy_(2, keys, truth)
    if acts.precision == "fp16":  # what is beyond its range is infinite in both
        beyond = truth.half().isinf()
        truth = torch.where(beyond, truth.half().float(), truth)
    return stored, truth


def _max_abs_error(
    values: "torch.Tensor", truth: "torch.Tensor", explained: "torch.Tensor | None" = None
) -> tuple[float, float]:
    """Largest absolute difference, beyond what is explained of each, and largest finite value of
    `truth`.

    Values that are the same and not finite are equal; one that is finite in one of both alone is an
    infinite error.
    """
    same = (values == truth) | (values.isnan() & truth.isnan())
    error = (values - truth).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf, math.inf)
    if explained is not None:
        error = (error - explained.to(error.device)).clamp_min(0.0)
    return float(error.max()), float(truth.nan_to_num(0.0, 0.0, 0.0).abs().max())
