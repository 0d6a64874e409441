"""Documents of a run recomputed block by block: each in one piece, unpadded and without the shard's batches or chunks.

The oracle of resident runs, plain transformers with all of the model, is what such a run has no room for.
"""

import logging

import numpy as np
import torch

from theloom import host, model_record
from theloom.dataset import Activations
from theloom.hooks import HookPoint
from theloom.layerwise import LayerwiseRunner
from theloom.memory import Workload, in_words
from theloom.model_record import ModelRecord
from theloom.residual_store import ResidualStore
from theloom.schema import Config
from theloom.verify import Recomputed, compare

log = logging.getLogger(__name__)


def recompute(
    config: Config, recorded: ModelRecord, acts: Activations, points: list[HookPoint], windows: list[int]
) -> tuple[list[Recomputed], float]:
    """Windows of the whole dataset against one sweep of their own, and the error that the precision explains."""
    lengths = np.diff(acts.window_offset)
    with model_record.open_again(config, recorded) as found:
        pass_of, row = found.pass_of(points), found.residual_row
        fixed = found.sizes(points).on_device + sum(int(lengths[w]) for w in windows) * row
        kept = []
        for window in windows:
            tokens = int(lengths[window])
            needed = fixed + pass_of(Workload(1, tokens, tokens))[0].total
            if needed > host.memory().free and found.loaded.device.type == "cpu":
                name = acts.documents[int(acts.window_document[window])]
                sizes = in_words(needed), in_words(host.memory().free)
                log.warning("%s (%d tokens) takes %s in one piece, %s are free: not recomputed", name, tokens, *sizes)
            else:
                kept.append(window)
        rows = [slice(int(acts.window_offset[w]), int(acts.window_offset[w + 1])) for w in kept]
        batches = [torch.from_numpy(acts.input_ids.numpy(r).astype("<i8"))[None] for r in rows]
        by_name = {p.name: p for p in points}
        errors: dict[tuple[int, str], tuple[float, float]] = {}

        def sink(number: int, name: str, start: int, values: torch.Tensor, first: int) -> None:
            errors[number, name] = compare(acts, by_name[name], rows[number], values[0])

        longest = max((b.shape[1] for b in batches), default=1)
        runner = LayerwiseRunner(found.shell, found.source, points, longest, recorded.precision)
        if batches:
            with ResidualStore(runner.residuals(batches, ""), None) as store:
                runner.sweep(batches, store, sink)
        results = [
            Recomputed(w, [errors[n, p.name][0] for p in points], [errors[n, p.name][1] for p in points])
            for n, w in enumerate(kept)
        ]
        return results, found.loaded.tolerance
