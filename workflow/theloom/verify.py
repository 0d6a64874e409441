"""Check a finished run: documents recomputed with plain transformers, every window's hash, what is not finite.

The oracle is the unmodified model's own `output_hidden_states=True` in one unchunked, unpadded forward pass. Its last
entry is after the final norm, so the last block's output is read by a plain forward hook in that same pass (`states`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from theloom import dataset, fidelity, gpu, integrity, layout, memory, model_record, provenance, rounding
from theloom.dataset import Activations
from theloom.errors import VerificationError
from theloom.estimator import Traced
from theloom.fidelity import Fidelity
from theloom.forward import no_cache
from theloom.hooks import RESIDUALS, HookPoint, residuals
from theloom.integrity import check_hashes
from theloom.memory import Kind, Workload, in_words
from theloom.model import LoadedModel
from theloom.precision import TOLERANCE
from theloom.schema import Config
from theloom.source import ModelFiles
from theloom.states import own_residuals
from theloom.taps import Taps

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recomputed:
    """One window against the oracle: for each hook point its largest error and its largest absolute value."""

    window: int
    error: list[float]
    largest: list[float]


@dataclass(frozen=True)
class Recomputation:
    """All recomputed windows, the hook points of their errors, the largest error allowed, and the model they are of.

    `rounding`: by hook point whose error is larger than that, how far the model itself is from FP32, both as a share of
    the largest value.
    """

    points: list[HookPoint]
    results: list[Recomputed]
    tolerance: float
    files: ModelFiles | None  # where a quantised run can be compared to FP32
    rounding: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> np.ndarray:
        """By hook point the largest error, as a share of the largest value."""
        errors, largest = (np.array([getattr(r, name) for r in self.results]) for name in ("error", "largest"))
        return (errors / np.maximum(largest, 1e-30)).max(axis=0)

    @property
    def doubtful(self) -> dict[int, list[HookPoint]]:
        """By window the hook points whose error is more than the tolerance."""
        found = {
            r.window: [
                point
                for point, error, largest in zip(self.points, r.error, r.largest, strict=True)
                if not error <= self.tolerance * largest
            ]
            for r in self.results
        }
        return {window: points for window, points in found.items() if points}

    @property
    def allowed(self) -> np.ndarray:
        """By hook point the largest error allowed: two passes that are each as far from FP32 as the model itself."""
        return np.array([max(self.tolerance, 2 * self.rounding.get(p.name, 0.0)) for p in self.points])


def verify(config: Config, activations: Path, model_path: Path, output: Path) -> None:
    """The verify stage: write `verification.h5`. Raises VerificationError where anything is wrong."""
    acts = dataset.open(activations)
    damaged = integrity.damaged_parts(acts)
    wrong, not_finite = check_hashes(acts)
    found = recompute(config, acts, model_path)
    _write(acts, found, wrong, not_finite, output)
    if found.files is not None and config.verify.compare_to_fp32:
        compared = _compare_to_fp32(config, found.files, acts, [r.window for r in found.results])
        if compared is not None:
            with h5py.File(output, "a") as file:
                fidelity.write(compared, file)
    report_damage(acts, damaged, wrong)
    report_recomputed(acts, found)


def _compare_to_fp32(config: Config, files: ModelFiles, acts: Activations, windows: list[int]) -> Fidelity | None:
    if "layerwise" in acts.attributes.get("execution", ""):
        from theloom import layerwise_verify

        return layerwise_verify.compare_to_fp32(config, files, acts, windows)
    return fidelity.compare(config, files, acts, windows, oracle)


def recompute(config: Config, acts: Activations, model_path: Path) -> "Recomputation":
    """`config.verify.documents` documents of a run through the plain model, against the rows that are stored."""
    recorded = model_record.read(model_path)
    if recorded.fingerprint != acts.attributes["model_fingerprint"]:
        raise VerificationError(f"{model_path} is not of the model that {acts.path} is from; give the run's own folder")
    points = [p for p in recorded.catalogue.points if p.name in acts]
    windows = choose_windows(acts, config.verify.documents, config.memory.streaming_chunk_size, config.verify.seed)
    if recorded.layerwise:
        from theloom import layerwise_verify

        return layerwise_verify.recompute(config, recorded, acts, points, windows)
    loaded = model_record.load_again(config, recorded)
    results, quantised = _recompute_all(config, loaded, acts, points, windows), loaded.quantization is not None
    # the coarser of the forward pass' precision and the stored one decides what rounding explains
    files, tolerance = loaded.files, config.verify.tolerance or max(loaded.tolerance, TOLERANCE[acts.precision])
    found = Recomputation(points, results, tolerance, files if quantised else None)
    doubtful = found.doubtful
    if not doubtful or config.verify.tolerance or quantised or loaded.precision.resolved == "fp32":
        return found
    if sum(rounding.waiting(acts, w, p) for w, of_window in doubtful.items() for p in of_window) > rounding.MOST_BYTES:
        rounding.say_too_much()
        return found
    own = rounding.own(loaded, acts, doubtful, _plain)
    del loaded
    return replace(found, rounding=rounding.measure(config, files, acts, doubtful, own, _plain))


def _recompute_all(
    config: Config, loaded: LoadedModel, acts: Activations, points: list[HookPoint], windows: list[int]
) -> list[Recomputed]:
    """Every window that fits against the oracle."""
    traced = Traced(loaded.architecture.model.config, loaded.attention, config.model.trust_remote_code)
    kind = memory.kind_of(config, loaded.precision.resolved, loaded.quantization)
    results = []
    for window in windows:
        if _fits(acts, loaded, points, traced, kind, window) and (found := _recompute(acts, loaded, points, window)):
            results.append(found)
    return results


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
    try:
        expected = _plain(loaded, fidelity.window_ids(acts, window).to(loaded.device), points)
    except torch.OutOfMemoryError:
        name = acts.documents[int(acts.window_document[window])]
        log.warning("%s (%d tokens) does not fit the device in one piece: not recomputed", name, end - begin)
        return None
    error, largest = [], []
    for point in points:
        value = expected[point.name][0]
        found = compare(acts, point, rows, value.transpose(0, 1) if point.over_keys else value)
        error.append(found[0])
        largest.append(found[1])
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
    return own_residuals(loaded.architecture, input_ids=ids, **no_cache(loaded.architecture.model))


def _plain(loaded: LoadedModel, ids: "torch.Tensor", points: Sequence[HookPoint]) -> "dict[str, torch.Tensor]":
    """Every residual of ids (1, position), and what else is asked for, without this library's ways to save memory."""
    return oracle(loaded, ids) | _in_one_piece(loaded, ids, points)


def _in_one_piece(loaded: LoadedModel, ids: "torch.Tensor", points: Sequence[HookPoint]) -> "dict[str, torch.Tensor]":
    """What is not in `output_hidden_states`: the same taps in one pass without padding, chunks or files."""
    import torch

    others = [p for p in points if p.value not in RESIDUALS]
    found: dict[str, torch.Tensor] = {}
    if others:
        taps = Taps(loaded.architecture, others, lambda name, value: found.__setitem__(name, value.clone()))
        with torch.inference_mode(), taps:
            taps.run(input_ids=ids, **no_cache(loaded.architecture.model))
    return found


def _write(acts: Activations, found: Recomputation, wrong: list[int], not_finite: np.ndarray, output: Path) -> None:
    with h5py.File(output, "w") as file:
        layout.set_attributes(
            file,
            provenance.attributes(
                "verification",
                run_identity=acts.attributes["run_identity"],
                tolerance=found.tolerance,
                windows_hashed=len(acts.window_document),
                windows_wrong=wrong,
                rows=len(acts),
            ),
        )
        file["hooks"] = layout.fixed_strings([p.name for p in found.points])
        file["not_finite"] = not_finite
        windows = [r.window for r in found.results]
        file["recomputed/window"] = windows
        file["recomputed/document"] = layout.fixed_strings(
            [acts.documents[int(acts.window_document[w])] for w in windows]
        )
        file["recomputed/tokens"] = [int(np.diff(acts.window_offset)[w]) for w in windows]
        file["recomputed/error"] = [r.error for r in found.results]
        file["recomputed/largest"] = [r.largest for r in found.results]
        file["recomputed/allowed"] = found.allowed


def report_damage(acts: Activations, damaged: list[str], wrong: list[int]) -> None:
    """Raises VerificationError where a file is not as it was written."""
    if wrong:
        name = acts.documents[int(acts.window_document[wrong[0]])]
        damaged = [f"rows of {len(wrong)} windows are not those that were written (first: {name})", *damaged]
    if damaged:
        raise VerificationError(
            f"{acts.path}: {'; '.join(damaged)}; the disk or a program has changed them; run again with --forcerun "
            "extract_shard"
        )


def report_recomputed(acts: Activations, found: Recomputation) -> None:
    """Say what recomputing has shown. Raises VerificationError where rows are not those of the model."""
    if not found.results:
        raise VerificationError("no document could be recomputed in one piece; lower corpus.context_length")
    worst, allowed = found.worst, found.allowed
    for point, share in zip(found.points, worst, strict=True):
        log.info(
            "%s: largest error %.2g of the largest value, over %d documents", point.name, share, len(found.results)
        )
        if (own := found.rounding.get(point.name)) is not None:
            words = "%s: more than %.2g; the model itself is %.2g from its values in FP32: so ill-conditioned are they"
            log.warning(words, point.name, found.tolerance, own)
    if not (worst <= allowed).all():
        number = int((worst / allowed).argmax())
        raise VerificationError(
            f"{acts.path}: {found.points[number].name} differs from the model by {worst[number]:.3g} of its largest "
            f"value, more than {allowed[number]:.3g} (verify.tolerance); do not use these rows, and report the model"
        )
