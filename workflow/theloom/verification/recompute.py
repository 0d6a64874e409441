"""Recompute documents of a run with the plain model, and compare them to the stored rows.

The reference is the unmodified model's own `output_hidden_states=True` in one unchunked, unpadded
forward pass. Its last entry is after the final norm, so a plain forward hook reads the last
block's output in that same pass (`model.reference`).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from theloom.config.schema import Config, ModelConfig
from theloom.dataset.activations import Activations
from theloom.devices import accelerator, gpu
from theloom.engine import model_record
from theloom.engine.model_record import ModelRecord
from theloom.errors import VerificationError
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.hooks.taps import Taps
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model import weight_format
from theloom.model.files import ModelFiles
from theloom.model.forward import no_cache
from theloom.model.loading import LoadedModel
from theloom.model.reference import reference_residuals
from theloom.model.weight_format import WeightFormat
from theloom.terminal import format_bytes
from theloom.verification import fp32
from theloom.verification.choice import choose_windows, whole_documents
from theloom.verification.comparison import Comparison, Recomputation
from theloom.verification.fp32 import Fidelity

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


def recompute(
    config: Config,
    acts: Activations,
    model_path: Path,
    pinned: bool = True,
    windows: list[int] | None = None,
) -> Recomputation:
    """Recompute documents of a run with the plain model and compare them to the stored rows.

    Args:
        config: its `verify` section gives the number of documents, the tolerance and the seed.
        acts: the run's activations.
        model_path: path of the run's `model.h5`.
        pinned: take the model's commit from there, not the config's revision.
        windows: numbers of the windows to recompute, of whole documents where rows are pooled;
            None: those that the config chooses.

    Returns:
        The errors by window and hook point.

    Raises:
        VerificationError: `model.h5` belongs to another model.
    """
    recorded = model_record.read(model_path)
    if not pinned:
        recorded = replace(recorded, revision=config.model.revision)
    if recorded.fingerprint != acts.attributes["model_fingerprint"]:
        raise VerificationError(
            f"{model_path} is not of the model of {acts.path}; give the run's own folder"
        )
    points = points_of(recorded, acts)
    windows = chosen(config, acts, recorded) if windows is None else windows
    if recorded.layerwise:
        from theloom.verification import layerwise

        return layerwise.recompute(config, recorded, acts, points, windows)
    loaded = model_record.load_again(config, recorded)
    comparison, files = Comparison(config, acts, loaded, points), loaded.files
    _compare_all(config, loaded, acts, points, windows, comparison)
    del loaded
    if suspect := comparison.suspect():
        requested = list({p.name: p for of_window in suspect.values() for p in of_window}.values())
        exact = fp32.exact_model(
            config, files, acts, list(suspect), requested, precision=comparison.finer
        )
        if exact is not None:
            with comparison.computed_finer():
                for window, of_window in suspect.items():
                    for point, values in _plain(
                        config.model, exact, acts, of_window, window
                    ).items():
                        comparison.compare_to_exact(window, point, values)
    return comparison.result()


def points_of(recorded: ModelRecord, acts: Activations) -> list[HookPoint]:
    """The hook points of a run, as its model's record describes them.

    Args:
        recorded: what `model.h5` holds.
        acts: the run's activations.

    Returns:
        In the order of the model.
    """
    return [p for p in recorded.catalog.points if p.name in acts]


def chosen(config: Config, acts: Activations, recorded: ModelRecord) -> list[int]:
    """The windows that a run's verification recomputes, as `choose_windows` has them.

    Args:
        config: the run's config.
        acts: the run's activations.
        recorded: what `model.h5` holds.

    Returns:
        Numbers of windows.
    """
    documents, seed = config.verify.documents, config.verify.seed
    return choose_windows(acts, documents, seed, recorded.notable_lengths)


def _compare_all(
    config: Config,
    loaded: LoadedModel,
    acts: Activations,
    points: list[HookPoint],
    windows: list[int],
    comparison: Comparison,
) -> None:
    """Compare every window that fits the device."""
    traced = Traced(
        loaded.architecture.model.config, loaded.attention, config.model.trust_remote_code
    )
    kind = weight_format.weight_format_of(config, loaded.precision.resolved, loaded.quantization)
    most = max((fp32.window_tokens(acts, window) for window in windows), default=0)
    for window in windows:
        if not _fits(acts, loaded, points, traced, kind, window, most):
            continue
        try:
            expected = _plain(config.model, loaded, acts, points, window)
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
            name = acts.document_id_of(acts.document_of_window(window))
            message = "%s (%d tokens) does not fit the device in one pass: not recomputed"
            log.warning(message, name, fp32.window_tokens(acts, window))
            continue
        for point, values in expected.items():
            comparison.add(window, point, values)


def _fits(
    acts: Activations,
    loaded: LoadedModel,
    points: list[HookPoint],
    traced: Traced,
    kind: WeightFormat,
    window: int,
    most: int,
) -> bool:
    """Whether a window fits the device in one pass with every residual held; a warning if not.

    One of `most` tokens takes no less: where it fits, its trace is enough for all windows.
    """
    tokens = fp32.window_tokens(acts, window)
    architecture = loaded.architecture
    captured = {
        p.name: p
        for p in (
            *architecture.stream,
            *points,
        )
    }
    free = gpu.device_memory(loaded.device).free
    for of in (most, tokens):
        needed = traced.forward(
            kind, Workload(1, of, of), list(captured.values()), True, loaded.device.type
        ).total
        if needed <= free:
            return True
    log.warning(
        "%s (%d tokens) needs %s in one pass, %s free: not recomputed",
        acts.document_id_of(acts.document_of_window(window)),
        tokens,
        format_bytes(needed),
        format_bytes(free),
    )
    return False


def _plain(
    config: ModelConfig,
    loaded: LoadedModel,
    acts: Activations,
    points: Sequence[HookPoint],
    window: int,
) -> "dict[HookPoint, torch.Tensor]":
    """Values of a window, (position, …), from one plain pass without chunks or padding."""
    inputs = fp32.window_inputs(config, acts, window, loaded.device)
    values = _tapped(loaded, inputs, points) | oracle(loaded, inputs)
    return {
        p: values[p.name][0].transpose(0, 1) if p.over_keys else values[p.name][0] for p in points
    }


def oracle(loaded: LoadedModel, inputs: "dict[str, torch.Tensor]") -> dict[str, "torch.Tensor"]:
    """Compute every residual in one plain forward pass.

    Args:
        loaded: the model.
        inputs: `input_ids`, (1, position), and what else the model is given.

    Returns:
        Residuals by name of the hook point, (1, position, hidden size).
    """
    return reference_residuals(loaded.architecture, **inputs, **no_cache(loaded.architecture.model))


def _tapped(
    loaded: LoadedModel, inputs: "dict[str, torch.Tensor]", points: Sequence[HookPoint]
) -> "dict[str, torch.Tensor]":
    """Hook points outside `output_hidden_states`: the library's taps in one plain pass."""
    import torch

    others = [p for p in points if p.value not in RESIDUALS]
    values: dict[str, torch.Tensor] = {}
    of_document = {p.name for p in others if p.of_document}

    def keep(name: str, value: "torch.Tensor") -> None:
        if name in of_document:  # at every position the same
            values[name] = value[:, -1:].clone().expand(value.shape)
        else:
            values[name] = value.clone()

    if others:
        taps = Taps(loaded.architecture, others, keep)
        with torch.inference_mode(), taps:
            taps.run(**inputs, **no_cache(loaded.architecture.model))
    return values


def compare_to_fp32(
    config: Config, acts: Activations, recomputed: Recomputation
) -> Fidelity | None:
    """Compare the recomputed windows of a quantised run to the model in FP32.

    Args:
        config: the run's config.
        acts: the run's activations.
        recomputed: what `recompute` returned.

    Returns:
        The similarities; None where the run is not quantised or does not request them, or if there
        is nothing to compare or no room, with the reason logged.
    """
    files: ModelFiles | None = recomputed.files
    if files is None or not config.verify.compare_to_fp32 or not recomputed.results:
        return None
    windows = [r.window for r in recomputed.results]
    windows = whole_documents(acts, windows) if acts.pooled else windows
    if "layerwise" in acts.attributes.get("execution", ""):
        from theloom.verification import layerwise

        return layerwise.compare_to_fp32(config, files, acts, windows)
    return fp32.compare(config, files, acts, windows, oracle)
