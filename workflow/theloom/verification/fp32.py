"""A run beside the same model in FP32: that model, where it fits; how near a quantised run's
residuals are to its.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py

from theloom import terminal
from theloom.config.schema import Config
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

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

Oracle = Callable[
    [LoadedModel, "torch.Tensor"], "dict[str, torch.Tensor]"
]  # every residual of ids (1, position)


@dataclass(frozen=True)
class Fidelity:
    """Cosine similarity of stored rows to the FP32 model's, over the rows of a window:
    [window][hook point].
    """

    hooks: list[str]
    windows: list[int]
    mean: list[list[float]]
    least: list[list[float]]


def compare(
    config: Config, files: ModelFiles, acts: Activations, windows: Sequence[int], oracle: Oracle
) -> Fidelity | None:
    """Load the model in FP32 and compare the residuals of some windows; None, and why in the log,
    where that cannot be.

    It takes four bytes a parameter: the quantised model should be gone by then.
    """
    # the files' config: that of a model which was quantised on loading says so
    traced = Traced(
        config_in(files, config.model.trust_remote_code), None, config.model.trust_remote_code
    )
    points = [p for p in traced.catalog().points if p.value in RESIDUALS and p.name in acts.hooks]
    if not points or not windows or traced.own is not None:
        log.info(
            "not compared to FP32: %s",
            "the checkpoint is quantised itself" if traced.own else "no residuals",
        )
        return None
    exact = exact_model(config, files, acts, windows, points, traced)
    if exact is None:
        return None
    pairs = [_cosines(exact, acts, [p.name for p in points], window, oracle) for window in windows]
    return Fidelity([p.name for p in points], list(windows), *map(list, zip(*pairs, strict=True)))


def exact_model(
    config: Config,
    files: ModelFiles,
    acts: Activations,
    windows: Sequence[int],
    points: Sequence[HookPoint],
    traced: Traced | None = None,
) -> LoadedModel | None:
    """The model in FP32; None, with a warning, where there is no room for it and the longest of
    some windows.
    """
    trust = config.model.trust_remote_code
    traced = traced or Traced(config_in(files, trust), None, trust)
    device, _ = loading.resolve_precision(config)
    longest = max(int(acts.window_offset[w + 1] - acts.window_offset[w]) for w in windows)
    kind = WeightFormat("fp32")
    held = {
        p.name: p
        for p in [*traced.catalog().points, *points]
        if p.value in RESIDUALS or p in points
    }
    running = traced.forward(
        kind, Workload(1, longest, longest), list(held.values()), held=True, device=device.type
    ).total
    needed, free = traced.weights(kind) + running, gpu.device_memory(device).free
    if needed > free:
        sizes = terminal.format_bytes(needed), terminal.format_bytes(free)
        log.warning("not compared to FP32: that takes %s, %s are free", *sizes)
        return None
    return loading.load_model(config, files, exact=True)


def window_rows(acts: Activations, window: int) -> slice:
    """The rows of a window."""
    return slice(*(int(r) for r in acts.window_offset[window : window + 2]))


def window_ids(acts: Activations, window: int) -> "torch.Tensor":
    """The token ids of a window, (1, position)."""
    import torch

    return torch.from_numpy(acts.input_ids.numpy(window_rows(acts, window)).astype("<i8"))[None]


def _cosines(
    exact: LoadedModel, acts: Activations, hooks: Sequence[str], window: int, oracle: Oracle
) -> tuple[list[float], list[float]]:
    """The mean and the least over a window's rows, by hook point."""
    import torch

    rows = window_rows(acts, window)
    truth = oracle(exact, window_ids(acts, window).to(exact.device))
    found = [
        torch.cosine_similarity(acts[h][rows].float(), truth[h][0].float().cpu(), dim=-1)
        for h in hooks
    ]
    return [float(c.mean()) for c in found], [float(c.min()) for c in found]


def write(found: Fidelity, file: h5py.File) -> None:
    """Into `fp32/` of verification.h5, and a line for each hook point into the log."""
    file["fp32/hooks"] = file_format.fixed_strings(found.hooks)
    file["fp32/window"] = found.windows
    file["fp32/cosine"] = found.mean
    file["fp32/min_cosine"] = found.least
    for number, name in enumerate(found.hooks):
        mean = sum(window[number] for window in found.mean) / len(found.mean)
        least = min(window[number] for window in found.least)
        log.info(
            "%s: cosine similarity to FP32 %.4f, of the least similar row %.4f", name, mean, least
        )
