"""Check a finished run: documents recomputed with plain transformers, every window's hash, what is not finite.

The oracle is the unmodified model's own `output_hidden_states=True` in one unchunked, unpadded forward pass. Its last
entry is after the final norm, so the last block's output is read by a plain forward hook in that same pass.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import xxhash

from theloom import dataset, gpu, layout, memory, model_record, provenance
from theloom.dataset import Activations
from theloom.errors import VerificationError
from theloom.estimator import Traced
from theloom.hooks import RESIDUALS, SCORES, HookPoint, residuals
from theloom.memory import Kind, Workload, in_words
from theloom.model import LoadedModel
from theloom.model_record import ModelRecord
from theloom.precision import TOLERANCE
from theloom.schema import Config
from theloom.taps import Taps

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Recomputed:
    """One window against the oracle: for each hook point its largest error and its largest absolute value."""

    window: int
    error: list[float]
    largest: list[float]


def verify(config: Config, activations: Path, model_path: Path, output: Path) -> None:
    """The verify stage: write `verification.h5`. Raises VerificationError where anything is wrong."""
    acts = dataset.open(activations)
    wrong, not_finite = check_hashes(acts)
    recorded = model_record.read(model_path)
    points = [p for p in recorded.catalogue.points if p.name in acts]
    windows = choose_windows(acts, config.verify.documents, config.memory.streaming_chunk_size, config.verify.seed)
    if recorded.layerwise:
        from theloom import layerwise_verify

        results, explained = layerwise_verify.recompute(config, recorded, acts, points, windows)
    else:
        results, explained = _recompute_all(config, recorded, acts, points, windows)
    # the coarser of the forward pass' precision and the stored one decides what rounding explains
    tolerance = config.verify.tolerance or max(explained, TOLERANCE[acts.precision])
    _write(acts, points, results, wrong, not_finite, tolerance, output)
    _report(acts, points, results, wrong, tolerance)


def _recompute_all(
    config: Config, recorded: ModelRecord, acts: Activations, points: list[HookPoint], windows: list[int]
) -> tuple[list[Recomputed], float]:
    """Every window that fits against the oracle, and the error that the forward pass' precision explains."""
    loaded = model_record.load_again(config, recorded)
    traced = Traced(loaded.architecture.model.config, loaded.attention, config.model.trust_remote_code)
    kind = memory.kind_of(config, loaded.precision.resolved)
    results = []
    for window in windows:
        if _fits(acts, loaded, points, traced, kind, window) and (found := _recompute(acts, loaded, points, window)):
            results.append(found)
    return results, loaded.tolerance


def check_hashes(acts: Activations) -> tuple[list[int], np.ndarray]:
    """Windows whose rows are not those that were written, and for each hook point how many values are not finite."""
    import torch

    wrong: list[int] = []
    not_finite = np.zeros(len(acts.hooks), "<i8")
    readers = [acts[h] for h in acts.hooks]
    masked = [h.endswith(SCORES) for h in acts.hooks]  # scores of masked keys are -inf
    for window in range(len(acts.window_document)):
        begin, end = (int(r) for r in acts.window_offset[window : window + 2])
        for number, reader in enumerate(readers):
            state = xxhash.xxh3_64()
            for start in range(begin, end, _ROWS_AT_ONCE):
                rows = reader[start : min(start + _ROWS_AT_ONCE, end)]
                state.update(layout.raw_bytes(rows))
                not_finite[number] += int((~torch.isfinite(rows) & ~(masked[number] & rows.isneginf())).sum())
            if state.intdigest() != acts.window_hash[window, number]:
                wrong.append(window)
                break
    return wrong, not_finite


def choose_windows(acts: Activations, documents: int, chunk_size: int, seed: int) -> list[int]:
    """One window each of `documents` documents: the longest, one that was streamed in chunks, and random ones."""
    lengths = np.diff(acts.window_offset)
    order = np.random.default_rng(seed).permutation(len(lengths))
    streamed = [w for w in order if lengths[w] > chunk_size]
    wanted = [int(lengths.argmax()), *streamed[:1], *order]
    chosen: dict[int, int] = {}
    for window in wanted:
        chosen.setdefault(int(acts.window_document[window]), int(window))
    return list(chosen.values())[:documents]


def _fits(
    acts: Activations, loaded: LoadedModel, points: list[HookPoint], traced: Traced, kind: Kind, window: int
) -> bool:
    """Whether the device has room for a window in one piece, every residual held; says so where it has not."""
    tokens = int(acts.window_offset[window + 1] - acts.window_offset[window])
    architecture = loaded.architecture
    held = {p.name: p for p in (*residuals(len(architecture.blocks), architecture.hidden_size), *points)}
    needed = traced.forward(kind, Workload(1, tokens, tokens), list(held.values()), True, loaded.device.type).total
    free = gpu.device_memory(loaded.device).free
    if needed > free:
        name, sizes = acts.documents[int(acts.window_document[window])], (in_words(needed), in_words(free))
        log.warning("%s (%d tokens) takes %s in one piece, %s are free: not recomputed", name, tokens, *sizes)
    return needed <= free


def _recompute(acts: Activations, loaded: LoadedModel, points: list[HookPoint], window: int) -> Recomputed | None:
    """Compare one window with the oracle; None, with a warning, where the device has no room for it in one piece."""
    import torch

    begin, end = (int(r) for r in acts.window_offset[window : window + 2])
    rows = slice(begin, end)
    ids = torch.from_numpy(acts.input_ids.numpy(rows).astype("<i8"))[None].to(loaded.device)
    try:
        expected = oracle(loaded, ids) | _in_one_piece(loaded, ids, points)
    except torch.OutOfMemoryError:
        name = acts.documents[int(acts.window_document[window])]
        log.warning("%s (%d tokens) does not fit the device in one piece: not recomputed", name, end - begin)
        return None
    error, largest = [], []
    for point in points:
        truth = expected[point.name][0]
        one = compare(acts, point, rows, truth.transpose(0, 1) if point.over_keys else truth)
        error.append(one[0])
        largest.append(one[1])
    return Recomputed(window, error, largest)


def compare(acts: Activations, point: HookPoint, rows: slice, found: "torch.Tensor") -> tuple[float, float]:
    """Stored rows of a window against recomputed ones (position, …): the largest error, the largest absolute value."""
    import torch

    truth = found.float()
    stored = acts[point.name][rows].to(truth.device).float()
    if point.over_keys:  # (position, head, key), of this window's keys alone
        keys = torch.arange(truth.shape[2], device=truth.device)
        truth = torch.full_like(stored, point.fill).index_copy_(2, keys, truth)
    masked = stored == truth  # also where both are -inf
    error = float((stored - truth).masked_fill(masked, 0.0).abs().max())
    return error, float(truth.masked_fill(truth.isneginf(), 0.0).abs().max())


def oracle(loaded: LoadedModel, ids: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """Every residual of one plain forward pass over ids (1, position), by hook point: (1, position, hidden size)."""
    import torch

    model, last_output = loaded.architecture.model, []

    def keep(module: Any, args: Any, output: Any) -> None:
        last_output.append(output[0] if isinstance(output, tuple) else output)

    handle = loaded.architecture.blocks[-1].register_forward_hook(keep)
    try:
        with torch.inference_mode():
            states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    count = len(loaded.architecture.blocks)
    found = {f"blocks.{i}.hook_resid_pre": states[i] for i in range(count)}
    found |= {f"blocks.{i}.hook_resid_post": states[i + 1] for i in range(count - 1)}
    return found | {f"blocks.{count - 1}.hook_resid_post": last_output[0]}


def _in_one_piece(loaded: LoadedModel, ids: "torch.Tensor", points: list[HookPoint]) -> dict[str, "torch.Tensor"]:
    """What is not in `output_hidden_states`: the same taps in one pass without padding, chunks or files."""
    import torch

    others = [p for p in points if p.value not in RESIDUALS]
    found: dict[str, torch.Tensor] = {}
    if others:
        taps = Taps(loaded.architecture, others, lambda name, value: found.__setitem__(name, value.clone()))
        with torch.inference_mode(), taps:
            taps.run(input_ids=ids, use_cache=False)
    return found


def _write(
    acts: Activations,
    points: list[HookPoint],
    results: list[Recomputed],
    wrong: list[int],
    not_finite: np.ndarray,
    tolerance: float,
    output: Path,
) -> None:
    with h5py.File(output, "w") as file:
        layout.set_attributes(
            file,
            provenance.attributes(
                "verification",
                run_identity=acts.attributes["run_identity"],
                tolerance=tolerance,
                windows_hashed=len(acts.window_document),
                windows_wrong=wrong,
                rows=len(acts),
            ),
        )
        file["hooks"] = layout.fixed_strings([p.name for p in points])
        file["not_finite"] = not_finite
        file["recomputed/window"] = [r.window for r in results]
        file["recomputed/document"] = layout.fixed_strings(
            [acts.documents[int(acts.window_document[r.window])] for r in results]
        )
        file["recomputed/tokens"] = [int(np.diff(acts.window_offset)[r.window]) for r in results]
        file["recomputed/error"] = [r.error for r in results]
        file["recomputed/largest"] = [r.largest for r in results]


def _report(
    acts: Activations, points: list[HookPoint], results: list[Recomputed], wrong: list[int], tolerance: float
) -> None:
    """Say what was found; raise VerificationError where it is not what it should be."""
    if wrong:
        name = acts.documents[int(acts.window_document[wrong[0]])]
        raise VerificationError(
            f"{acts.path}: rows of {len(wrong)} windows are not those that were written (first: {name}); "
            "the disk or a program has changed them; run again with --forcerun extract_shard"
        )
    if not results:
        raise VerificationError("no document could be recomputed in one piece; lower corpus.context_length")
    shares = np.array([r.error for r in results]) / np.maximum(np.array([r.largest for r in results]), 1e-30)
    worst = shares.max(axis=0)
    for point, share in zip(points, worst, strict=True):
        log.info("%s: largest error %.2g of the largest value, over %d documents", point.name, share, len(results))
    if not (worst <= tolerance).all():
        hook = points[int(worst.argmax())].name
        raise VerificationError(
            f"{acts.path}: {hook} differs from the model by {worst.max():.3g} of its largest value, "
            f"more than {tolerance:.3g} (verify.tolerance); do not use these rows, and report the model"
        )
