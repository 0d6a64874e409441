"""Recompute documents of a run layer by layer: each in one pass, without padding or chunks.

A layerwise run has no room for the whole model, so the reference of resident runs (plain
transformers) is not available. Comparisons to a finer format take a second sweep, of blocks in it.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from theloom.config.schema import Config
from theloom.dataset.activations import Activations
from theloom.devices import host
from theloom.engine import model_record
from theloom.engine.layerwise.model import LayerwiseModel, opened
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.engine.model_record import ModelRecord
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.memory.sizes import Workload
from theloom.model import weight_format
from theloom.model.files import ModelFiles, hf_config
from theloom.terminal import format_bytes
from theloom.verification import fp32
from theloom.verification.comparison import Comparison, Recomputation
from theloom.verification.fp32 import Fidelity
from theloom.verification.stored import StoredRows

log = logging.getLogger(__name__)

# Receives a window, a hook point and its values, (position, …).
Sink = Callable[[int, HookPoint, torch.Tensor], None]


def recompute(
    config: Config,
    recorded: ModelRecord,
    acts: Activations,
    points: list[HookPoint],
    windows: list[int],
) -> Recomputation:
    """Compare stored rows to those of one sweep over the windows.

    Args:
        config: the run's config.
        recorded: what `model.h5` holds.
        acts: the run's activations.
        points: hook points to compare.
        windows: numbers of the windows.

    Returns:
        The errors, and the model's distance from a finer format for suspect hook points.
    """
    with model_record.open_again(config, recorded) as model:
        comparison, files = Comparison(config, acts, model.loaded, points), model.loaded.files
        _sweep(model, acts, points, windows, comparison.add)
    if suspect := comparison.suspect():
        names = {p.name for of_window in suspect.values() for p in of_window}
        with comparison.computed_finer(), opened(config, files, exact=comparison.finer) as exact:
            _sweep(
                exact,
                acts,
                [p for p in points if p.name in names],
                list(suspect),
                comparison.compare_to_exact,
            )
    return comparison.result()


def compare_to_fp32(
    config: Config, files: ModelFiles, acts: Activations, windows: Sequence[int]
) -> Fidelity | None:
    """As `fp32.compare`, layer by layer.

    Args:
        config: the run's config.
        files: the model's files.
        acts: the run's activations.
        windows: numbers of the windows to compare.

    Returns:
        The similarities; None if there is nothing to compare, with the reason logged.
    """
    if weight_format.quantization_of(config, hf_config(config.model)) is not None:
        log.info("not compared to FP32: the checkpoint itself is quantized")
        return None
    cosines: dict[tuple[int, str], torch.Tensor] = {}

    truth = StoredRows(acts)

    def receive(window: int, point: HookPoint, values: torch.Tensor) -> None:
        if (unit := truth.of(window, point, values)) is not None:
            window, rows, values = unit
            stored, exact = acts[point.name][rows].float(), values.float().cpu()
            cosines[window, point.name] = torch.cosine_similarity(stored, exact, dim=-1)

    with opened(config, files, exact="fp32") as exact:
        catalog = exact.loaded.catalog.points
        points = [p for p in catalog if p.value in RESIDUALS and p.name in acts.hooks]
        if points:
            _sweep(exact, acts, points, windows, receive)
    kept = list(dict.fromkeys(window for window, _ in cosines))
    if not kept:
        log.info("not compared to FP32: %s", "no room for a document" if points else "no residuals")
        return None
    by_window = [[cosines[w, p.name] for p in points] for w in kept]
    mean, minimum = (
        [[float(of(c)) for c in row] for row in by_window] for of in (torch.mean, torch.min)
    )
    return Fidelity([p.name for p in points], list(kept), mean, minimum)


def _sweep(
    model: LayerwiseModel,
    acts: Activations,
    points: list[HookPoint],
    windows: Sequence[int],
    receive: Sink,
) -> list[int]:
    """Sweep over the windows that fit, one batch each; log and skip the others."""
    lengths = np.diff(acts.window_tokens)
    pass_of, row = model.pass_of(points), model.residual_row
    fixed = model.sizes(points).on_device + sum(int(lengths[w]) for w in windows) * row
    kept = []
    for window in windows:
        tokens = int(lengths[window])
        needed = fixed + pass_of(Workload(1, tokens, tokens))[0].total
        if needed > host.memory().free and model.loaded.device.type == "cpu":
            name = acts.document_id_of(acts.document_of_window(window))
            sizes = format_bytes(needed), format_bytes(host.memory().free)
            log.warning(
                "%s (%d tokens) needs %s in one pass, %s free: not recomputed",
                name,
                tokens,
                *sizes,
            )
        else:
            kept.append(window)
    if not kept:
        return []
    batches = [fp32.window_ids(acts, w) for w in kept]
    by_name = {p.name: p for p in points}

    def sink(number: int, name: str, start: int, values: torch.Tensor, first: int) -> None:
        receive(kept[number], by_name[name], values[0].cpu())

    longest = max(b.shape[1] for b in batches)
    runner = LayerwiseRunner(
        model.shell, model.source, points, longest, model.loaded.precision.resolved
    )
    with ResidualStore(runner.residuals(batches, ""), None, device=model.loaded.device) as store:
        runner.sweep(batches, store, sink)
    return kept
