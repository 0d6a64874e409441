"""Compare a run to its model in FP32: load that model if it fits, measure cosine similarity."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py

from theloom import terminal
from theloom.config.schema import Config, ModelConfig
from theloom.corpus.media.inputs import inputs_of
from theloom.corpus.targets.sources import Sources, lengths_of
from theloom.dataset.activations import Activations
from theloom.devices import gpu
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model import loading
from theloom.model.files import ModelFiles, config_in
from theloom.model.loading import LoadedModel
from theloom.model.weight_format import WeightFormat
from theloom.store import file_format
from theloom.verification.stored import StoredRows

if TYPE_CHECKING:
    import numpy as np
    import torch


log = logging.getLogger(__name__)

# A model and its inputs, ids (1, position) among them, to every residual, (1, position, hidden
# size), by hook point.
Oracle = Callable[[LoadedModel, "dict[str, torch.Tensor]"], "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class Fidelity:
    """Cosine similarity of stored rows to those of the FP32 model.

    Args:
        hooks: names of the hook points.
        windows: numbers of the windows.
        cosine: mean over a window's rows, [window][hook point].
        min_cosine: minimum over a window's rows, [window][hook point].
    """

    hooks: list[str]
    windows: list[int]
    cosine: list[list[float]]
    min_cosine: list[list[float]]


def compare(
    config: Config, files: ModelFiles, acts: Activations, windows: Sequence[int], oracle: Oracle
) -> Fidelity | None:
    """Load the model in FP32 and compare the residuals of some windows.

    FP32 takes four bytes per parameter, so release the quantized model before the call.

    Args:
        config: the run's config.
        files: the model's files.
        acts: the run's activations.
        windows: numbers of the windows to compare.
        oracle: computes the residuals.

    Returns:
        The similarities; None if there is nothing to compare or no room, with the reason logged.
    """
    # from the files: the config of a model quantized at load time names that quantization
    traced = Traced(
        config_in(files, config.model.trust_remote_code), None, config.model.trust_remote_code
    )
    points = [p for p in traced.catalog().points if p.value in RESIDUALS and p.name in acts.hooks]
    if not points or not windows or traced.own is not None:
        log.info(
            "not compared to FP32: %s",
            "the checkpoint itself is quantized" if traced.own else "no residuals",
        )
        return None
    exact = exact_model(config, files, acts, windows, points, traced)
    if exact is None:
        return None
    return _cosines(exact, acts, points, windows, oracle, config.model)


def exact_model(
    config: Config,
    files: ModelFiles,
    acts: Activations,
    windows: Sequence[int],
    points: Sequence[HookPoint],
    traced: Traced | None = None,
    precision: str = "fp32",
) -> LoadedModel | None:
    """Load the model in FP32 or FP64.

    Args:
        config: the run's config.
        files: the model's files.
        acts: the run's activations.
        windows: windows that will be computed; the longest determines the memory needed.
        points: hook points that will be captured.
        traced: an estimator of the FP32 model, if there is one already.
        precision: fp32 or fp64.

    Returns:
        The model; None, with a warning, if it does not fit with the longest of the windows.
    """
    trust = config.model.trust_remote_code
    traced = traced or Traced(config_in(files, trust), None, trust)
    device = gpu.choose_device(config.extraction.device)
    longest = max(window_tokens(acts, w) for w in windows)
    fp32 = WeightFormat("fp32")
    captured = {
        p.name: p
        for p in [*traced.catalog().points, *points]
        if p.value in RESIDUALS or p in points
    }
    running = traced.forward(
        fp32, Workload(1, longest, longest), list(captured.values()), held=True, device=device.type
    ).total
    needed = (traced.weights(fp32) + running) * (2 if precision == "fp64" else 1)
    free = gpu.device_memory(device).free
    if needed > free:
        sizes = terminal.format_bytes(needed), terminal.format_bytes(free)
        log.warning("not compared to %s: needs %s, %s free", precision.upper(), *sizes)
        return None
    return loading.load_model(config, files, exact=precision)


def window_ids(acts: Activations, window: int) -> "torch.Tensor":
    """Token ids of a window.

    Args:
        acts: the run's activations.
        window: number of the window.

    Returns:
        (1, position) of int64 on the CPU; of codes (1, position, codebook).
    """
    import torch

    tokens = slice(*(int(t) for t in acts.window_tokens[window : window + 2]))
    return torch.from_numpy(acts.token_ids.numpy(tokens).astype("<i8"))[None]


def window_inputs(
    config: ModelConfig, acts: Activations, window: int, device: "torch.device"
) -> "dict[str, torch.Tensor]":
    """What the model is given for a window.

    Args:
        config: the `model` settings.
        acts: the run's activations.
        window: number of the window.
        device: of the model.

    Returns:
        `input_ids` of `window_ids`; of a decoder also those of its source; of a tower also
        what its processor makes of the document.

    Raises:
        CorpusError: the file of an image or a clip is no longer what it was.
    """
    columns, documents = acts.columns, acts.window_document
    settings = json.loads(acts.attributes["config"])

    def ids_of(number: int) -> "np.ndarray":
        return window_ids(acts, number).numpy()[0]

    given = acts.attributes.get("processor_hash")
    found = inputs_of(columns, documents, ids_of, config, settings["tokens"], given)
    sources = (found or Sources(columns, documents)).of([window])
    inputs = {"input_ids": window_ids(acts, window), **sources}
    return {name: value.to(device) for name, value in inputs.items()}


def window_tokens(acts: Activations, window: int) -> int:
    """Tokens by which the memory of a window's pass is predicted.

    Args:
        acts: the run's activations.
        window: number of the window.

    Returns:
        Those of the window, or of a decoder's source where it is longer.
    """
    own = int(acts.window_tokens[window + 1] - acts.window_tokens[window])
    sources = lengths_of(acts.columns, acts.window_document)
    return own if sources is None else max(own, int(sources[window]))


def _cosines(
    exact: LoadedModel,
    acts: Activations,
    points: Sequence[HookPoint],
    windows: Sequence[int],
    oracle: Oracle,
    config: ModelConfig,
) -> Fidelity:
    """Mean and minimum over the rows of each window, per hook point."""
    import torch

    truth = StoredRows(acts)
    pairs: dict[int, list[tuple[float, float]]] = {}
    for window in windows:
        values = oracle(exact, window_inputs(config, acts, window, exact.device))
        for point in points:
            if (unit := truth.of(window, point, values[point.name][0])) is None:
                continue
            last, rows, expected = unit
            stored = acts[point.name][rows].float()
            cosines = torch.cosine_similarity(stored, expected.float().cpu(), dim=-1)
            finite = cosines[cosines.isfinite()] if cosines.isfinite().any() else cosines
            pairs.setdefault(last, []).append((float(finite.mean()), float(finite.min())))
    mean, minimum = ([[pair[n] for pair in of] for of in pairs.values()] for n in (0, 1))
    return Fidelity([p.name for p in points], list(pairs), mean, minimum)


def write(fidelity: Fidelity, file: h5py.File) -> None:
    """Write `fp32/` of an open verification.h5 and log one line per hook point.

    Args:
        fidelity: the similarities, by window and hook point.
        file: the open file.
    """
    file["fp32/hooks"] = file_format.fixed_strings(fidelity.hooks)
    file["fp32/window"] = fidelity.windows
    file["fp32/cosine"] = fidelity.cosine
    file["fp32/min_cosine"] = fidelity.min_cosine
    for number, name in enumerate(fidelity.hooks):
        mean = sum(window[number] for window in fidelity.cosine) / len(fidelity.cosine)
        minimum = min(window[number] for window in fidelity.min_cosine)
        log.info("%s: cosine similarity to FP32: mean %.4f, minimum %.4f", name, mean, minimum)
