"""Check a finished run: documents recomputed with plain transformers, every window's hash, what is
not finite.

The oracle is the unmodified model's own `output_hidden_states=True` in one unchunked, unpadded
forward pass. Its last entry is after the final norm, so the last block's output is read by a plain
forward hook in that same pass (`states`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from theloom.config.schema import Config
from theloom.dataset import inspect
from theloom.dataset.activations import Activations, open_activations
from theloom.dataset.inspect import check_hashes
from theloom.devices import gpu
from theloom.engine import model_record
from theloom.errors import VerificationError
from theloom.hooks.points import RESIDUALS, HookPoint, residual_points
from theloom.hooks.taps import Taps
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model import weight_format
from theloom.model.files import ModelFiles
from theloom.model.forward import no_cache
from theloom.model.loading import LoadedModel
from theloom.model.reference import reference_residuals
from theloom.model.weight_format import WeightFormat
from theloom.store import file_format, provenance
from theloom.terminal import format_bytes
from theloom.verification import fp32
from theloom.verification.comparison import Comparison, Recomputation
from theloom.verification.fp32 import Fidelity

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


def verify_run(config: Config, activations: Path, model_path: Path, output: Path) -> None:
    """The verify stage: write `verification.h5`. Raises VerificationError where anything is wrong."""
    acts = open_activations(activations)
    damaged = inspect.damaged_parts(acts)
    wrong, nonfinite = check_hashes(acts)
    found = recompute(config, acts, model_path)
    _write(acts, found, wrong, nonfinite, output)
    if found.files is not None and config.verify.compare_to_fp32:
        compared = _compare_to_fp32(config, found.files, acts, [r.window for r in found.results])
        if compared is not None:
            with h5py.File(output, "a") as file:
                fp32.write(compared, file)
    report_damage(acts, damaged, wrong)
    report_recomputed(acts, found)


def _compare_to_fp32(
    config: Config, files: ModelFiles, acts: Activations, windows: list[int]
) -> Fidelity | None:
    if "layerwise" in acts.attributes.get("execution", ""):
        from theloom.verification import layerwise

        return layerwise.compare_to_fp32(config, files, acts, windows)
    return fp32.compare(config, files, acts, windows, oracle)


def recompute(config: Config, acts: Activations, model_path: Path) -> Recomputation:
    """`config.verify.documents` documents of a run through the plain model, against the rows that
    are stored.
    """
    recorded = model_record.read(model_path)
    if recorded.fingerprint != acts.attributes["model_fingerprint"]:
        raise VerificationError(
            f"{model_path} is not of the model that {acts.path} is from; give the run's own folder"
        )
    points = [p for p in recorded.catalog.points if p.name in acts]
    windows = choose_windows(
        acts, config.verify.documents, config.memory.streaming_chunk_size, config.verify.seed
    )
    if recorded.layerwise:
        from theloom.verification import layerwise

        return layerwise.recompute(config, recorded, acts, points, windows)
    loaded = model_record.load_again(config, recorded)
    comparison, files = Comparison(config, acts, loaded, points), loaded.files
    _see_all(config, loaded, acts, points, windows, comparison)
    del loaded
    if doubtful := comparison.doubtful():
        requested = list({p.name: p for of_window in doubtful.values() for p in of_window}.values())
        if (exact := fp32.exact_model(config, files, acts, list(doubtful), requested)) is not None:
            for window, of_window in doubtful.items():
                for point, values in _plain(exact, acts, of_window, window).items():
                    comparison.judge(window, point, values)
    return comparison.result()


def _see_all(
    config: Config,
    loaded: LoadedModel,
    acts: Activations,
    points: list[HookPoint],
    windows: list[int],
    comparison: Comparison,
) -> None:
    """Every window that fits."""
    import torch

    traced = Traced(
        loaded.architecture.model.config, loaded.attention, config.model.trust_remote_code
    )
    kind = weight_format.weight_format_of(config, loaded.precision.resolved, loaded.quantization)
    for window in windows:
        if not _fits(acts, loaded, points, traced, kind, window):
            continue
        try:
            expected = _plain(loaded, acts, points, window)
        except torch.OutOfMemoryError:
            name, rows = (
                acts.documents[int(acts.window_document[window])],
                fp32.window_rows(acts, window),
            )
            words = "%s (%d tokens) does not fit the device in one piece: not recomputed"
            log.warning(words, name, rows.stop - rows.start)
            continue
        for point, values in expected.items():
            comparison.see(window, point, values)


def choose_windows(acts: Activations, documents: int, chunk_size: int, seed: int) -> list[int]:
    """One window each of `documents` documents: the longest, one that was streamed in chunks, and
    random ones.
    """
    lengths = np.diff(acts.window_offset)
    order = np.random.default_rng(seed).permutation(len(lengths))
    streamed = [w for w in order if lengths[w] > chunk_size]
    wanted = [int(lengths.argmax()), *streamed[:1], *order]
    chosen: dict[int, int] = {}
    for window in wanted:
        chosen.setdefault(int(acts.window_document[window]), int(window))
    return list(chosen.values())[:documents]


def _fits(
    acts: Activations,
    loaded: LoadedModel,
    points: list[HookPoint],
    traced: Traced,
    kind: WeightFormat,
    window: int,
) -> bool:
    """Whether the device has room for a window in one piece, every residual held; says so where it
    has not.
    """
    tokens = int(acts.window_offset[window + 1] - acts.window_offset[window])
    architecture = loaded.architecture
    held = {
        p.name: p
        for p in (*residual_points(len(architecture.blocks), architecture.hidden_size), *points)
    }
    needed = traced.forward(
        kind, Workload(1, tokens, tokens), list(held.values()), True, loaded.device.type
    ).total
    free = gpu.device_memory(loaded.device).free
    if needed > free:
        name, sizes = (
            acts.documents[int(acts.window_document[window])],
            (format_bytes(needed), format_bytes(free)),
        )
        log.warning(
            "%s (%d tokens) takes %s in one piece, %s are free: not recomputed",
            name,
            tokens,
            *sizes,
        )
    return needed <= free


def _plain(
    loaded: LoadedModel, acts: Activations, points: Sequence[HookPoint], window: int
) -> "dict[HookPoint, torch.Tensor]":
    """The model's values of a window, (position, …), in one pass without this library's ways to
    save memory.
    """
    ids = fp32.window_ids(acts, window).to(loaded.device)
    found = oracle(loaded, ids) | _in_one_piece(loaded, ids, points)
    return {
        p: found[p.name][0].transpose(0, 1) if p.over_keys else found[p.name][0] for p in points
    }


def oracle(loaded: LoadedModel, ids: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """Every residual of one plain forward pass over ids (1, position), by hook point: (1, position,
    hidden size).
    """
    return reference_residuals(
        loaded.architecture, input_ids=ids, **no_cache(loaded.architecture.model)
    )


def _in_one_piece(
    loaded: LoadedModel, ids: "torch.Tensor", points: Sequence[HookPoint]
) -> "dict[str, torch.Tensor]":
    """What is not in `output_hidden_states`: the same taps in one pass without padding, chunks or
    files.
    """
    import torch

    others = [p for p in points if p.value not in RESIDUALS]
    found: dict[str, torch.Tensor] = {}
    if others:
        taps = Taps(
            loaded.architecture, others, lambda name, value: found.__setitem__(name, value.clone())
        )
        with torch.inference_mode(), taps:
            taps.run(input_ids=ids, **no_cache(loaded.architecture.model))
    return found


def _write(
    acts: Activations, found: Recomputation, wrong: list[int], nonfinite: np.ndarray, output: Path
) -> None:
    with h5py.File(output, "w") as file:
        file_format.set_attributes(
            file,
            provenance.attributes(
                "verification",
                run_fingerprint=acts.attributes["run_fingerprint"],
                tolerance=found.tolerance,
                windows_hashed=len(acts.window_document),
                windows_wrong=wrong,
                rows=len(acts),
            ),
        )
        file["hooks"] = file_format.fixed_strings([p.name for p in found.points])
        file["nonfinite"] = nonfinite
        windows = [r.window for r in found.results]
        file["recomputed/window"] = windows
        file["recomputed/document"] = file_format.fixed_strings(
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
        damaged = [
            f"rows of {len(wrong)} windows are not those that were written (first: {name})",
            *damaged,
        ]
    if damaged:
        raise VerificationError(
            f"{acts.path}: {'; '.join(damaged)}; the disk or a program has changed them; run again with --forcerun "
            "extract_shard"
        )


def report_recomputed(acts: Activations, found: Recomputation) -> None:
    """Say what recomputing has shown. Raises VerificationError where rows are not those of the
    model.
    """
    if not found.results:
        raise VerificationError(
            "no document could be recomputed in one piece; lower corpus.context_length"
        )
    worst, allowed = found.worst, found.allowed
    for point, share in zip(found.points, worst, strict=True):
        log.info(
            "%s: largest error %.2g of the largest value, over %d documents",
            point.name,
            share,
            len(found.results),
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
