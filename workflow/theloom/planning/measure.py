"""Measure the largest forward pass of a plan, by category, against the prediction."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from theloom.config.model_dims import numbers
from theloom.config.schema import ModelConfig
from theloom.devices import host
from theloom.devices.peak_memory import PeakMemory
from theloom.hooks.points import HookPoint
from theloom.memory import trace
from theloom.memory.estimators import Traced
from theloom.memory.sizes import PeakBytes, Workload
from theloom.model import quantization
from theloom.model.checkpoint.classes import has_own_code, model_class
from theloom.model.files import hf_config
from theloom.model.loading import LoadedModel
from theloom.model.weight_format import WeightFormat
from theloom.planning.plan import Correction, Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One forward pass: bytes predicted and measured, and growth of the device's memory in use.

    On the CPU, growth has three parts: tensors (`found`), pages of files (`files`), and the rest
    (`heap`).

    Args:
        workload: shape of the pass.
        predicted: bytes by category.
        found: bytes by category, measured storage by storage.
        growth: counted by CUDA's allocator; on the CPU growth of the process since before the
            model was loaded, without the weights.
        files: pages of files (code) that the pass read first.
        weights: resident bytes of the model.
    """

    workload: Workload
    predicted: PeakBytes
    found: PeakBytes
    growth: int
    files: int
    weights: int

    @property
    def heap(self) -> int:
        """Freed blocks that malloc retains, and what loading and libraries take.

        It is negative if tensors reused memory that the process had left from before.
        """
        return self.growth - self.found.total - self.files

    @property
    def correction(self) -> Correction:
        """The correction for the next plan."""
        return Correction(
            self.found.total / self.predicted.total, max(0, self.growth - self.found.total)
        )


def largest_pass(
    traced: Traced, kind: WeightFormat, plan: Plan, points: Sequence[HookPoint], device: str
) -> tuple[Workload, PeakBytes]:
    """Find the pass of a plan that is predicted to take the most memory.

    Args:
        traced: estimator of the model.
        kind: format of the weights.
        plan: the plan.
        points: hook points that are captured.
        device: `cpu` or `cuda`.

    Returns:
        Its shape and its bytes.
    """
    predicted = [
        (workload, traced.forward(kind, workload, points, device=device))
        for workload in plan.passes
    ]
    return max(predicted, key=lambda pair: pair[1].total)


def measure(
    loaded: LoadedModel,
    kind: WeightFormat,
    traced: Traced,
    plan: Plan,
    points: Sequence[HookPoint],
    loading: PeakMemory,
) -> Measured:
    """Run the largest pass of a plan on random tokens, and measure its growth and its storages.

    Args:
        loaded: the model.
        kind: format of its weights.
        traced: its estimator.
        plan: the plan.
        points: hook points that are captured.
        loading: memory that loading the model took.

    Returns:
        The measurement.
    """
    workload, predicted = largest_pass(traced, kind, plan, points, loaded.device.type)
    vocabulary = numbers(loaded.architecture.model.config).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (workload.windows, workload.tokens), generator=generator).to(
        loaded.device
    )
    with PeakMemory(loaded.device) as growing:
        measured = _run(loaded, ids, workload, points, kind)
    weights = quantization.resident_bytes(loaded.architecture.model)
    growth = growing.growth
    if loaded.device.type == "cpu":  # a job's heap also holds what loading left
        growth += growing.before - loading.before - weights
    return Measured(workload, predicted, measured, growth, growing.files, weights)


def _run(
    loaded: LoadedModel,
    ids: torch.Tensor,
    workload: Workload,
    points: Sequence[HookPoint],
    kind: WeightFormat,
) -> PeakBytes:
    peak, _ = trace.run(
        loaded.architecture,
        ids,
        workload,
        points,
        store=kind.precision,
        device=loaded.device.type,
        shorten=True,
    )
    return trace.parts(peak)


def prepare_measurement(config: ModelConfig) -> None:
    """Prepare a process for counting growth, so that `load_model` and jobs count the same.

    Imports the code of the model and of the trace, and returns free heap memory (for example that
    of a checkpoint converted in this process) to the system.

    Args:
        config: the model's config.
    """
    from theloom.memory import trace  # noqa: F401

    model_config = hf_config(config)
    if not has_own_code(model_config, config.trust_remote_code):
        model_class(model_config)
    host.release_free_heap()
