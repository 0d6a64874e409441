"""Documents of a run recomputed layer by layer: each in one piece, unpadded and without the shard's
batches or chunks.

The oracle of resident runs, plain transformers with all of the model, is what such a run has no
room for. What resident runs are compared to in FP32 is compared here too, in a sweep of FP32
blocks.
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

log = logging.getLogger(__name__)

See = Callable[
    [int, HookPoint, torch.Tensor], None
]  # a window, a hook point, its values (position, …)


def recompute(
    config: Config,
    recorded: ModelRecord,
    acts: Activations,
    points: list[HookPoint],
    windows: list[int],
) -> Recomputation:
    """Windows of the whole dataset against one sweep of their own."""
    with model_record.open_again(config, recorded) as found:
        comparison, files = Comparison(config, acts, found.loaded, points), found.loaded.files
        _sweep(found, acts, points, windows, comparison.see)
    if doubtful := comparison.doubtful():
        names = {p.name for of_window in doubtful.values() for p in of_window}
        with opened(config, files, exact=True) as exact:
            _sweep(
                exact,
                acts,
                [p for p in points if p.name in names],
                list(doubtful),
                comparison.judge,
            )
    return comparison.result()


def compare_to_fp32(
    config: Config, files: ModelFiles, acts: Activations, windows: Sequence[int]
) -> Fidelity | None:
    """`fidelity.compare`, layer by layer."""
    if weight_format.quantization_of(config, hf_config(config.model)) is not None:
        log.info("not compared to FP32: the checkpoint is quantised itself")
        return None
    cosines: dict[tuple[int, str], torch.Tensor] = {}

    def see(window: int, point: HookPoint, values: torch.Tensor) -> None:
        stored = acts[point.name][fp32.window_rows(acts, window)].float()
        cosines[window, point.name] = torch.cosine_similarity(stored, values.float().cpu(), dim=-1)

    with opened(config, files, exact=True) as exact:
        catalog = exact.loaded.catalog.points
        points = [p for p in catalog if p.value in RESIDUALS and p.name in acts.hooks]
        kept = _sweep(exact, acts, points, windows, see) if points else []
    if not kept:
        log.info("not compared to FP32: %s", "no room for a document" if points else "no residuals")
        return None
    by_window = [[cosines[w, p.name] for p in points] for w in kept]
    mean, least = (
        [[float(of(c)) for c in row] for row in by_window] for of in (torch.mean, torch.min)
    )
    return Fidelity([p.name for p in points], list(kept), mean, least)


def _sweep(
    found: LayerwiseModel,
    acts: Activations,
    points: list[HookPoint],
    windows: Sequence[int],
    see: See,
) -> list[int]:
    """Those of the windows that fit, one batch each, in one sweep; the others are said in the log."""
    lengths = np.diff(acts.window_offset)
    pass_of, row = found.pass_of(points), found.residual_row
    fixed = found.sizes(points).on_device + sum(int(lengths[w]) for w in windows) * row
    kept = []
    for window in windows:
        tokens = int(lengths[window])
        needed = fixed + pass_of(Workload(1, tokens, tokens))[0].total
        if needed > host.memory().free and found.loaded.device.type == "cpu":
            name = acts.documents[int(acts.window_document[window])]
            sizes = format_bytes(needed), format_bytes(host.memory().free)
            log.warning(
                "%s (%d tokens) takes %s in one piece, %s are free: not recomputed",
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
        see(kept[number], by_name[name], values[0])

    longest = max(b.shape[1] for b in batches)
    runner = LayerwiseRunner(
        found.shell, found.source, points, longest, found.loaded.precision.resolved
    )
    with ResidualStore(runner.residuals(batches, ""), None) as store:
        runner.sweep(batches, store, sink)
    return kept
