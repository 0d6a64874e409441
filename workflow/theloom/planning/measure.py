"""What the largest forward pass of a plan really takes, beside what was predicted, by category."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from theloom.config.schema import ModelConfig
from theloom.devices import host
from theloom.devices.peak_memory import PeakMemory
from theloom.hooks.points import HookPoint
from theloom.memory import trace
from theloom.memory.estimators import Traced
from theloom.memory.sizes import PeakBytes, Workload
from theloom.model import quantization
from theloom.model.files import hf_config
from theloom.model.loading import LoadedModel, _is_own_code, _model_class
from theloom.model.weight_format import WeightFormat
from theloom.planning.plan import Correction, Plan

if TYPE_CHECKING:
    pass


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One forward pass: bytes predicted and found, and by how much the device's memory in use grew.

    `growth` is what CUDA's allocator counted, or, on the CPU, what the process had grown by since
    before its model was loaded, without the weights. There it has three parts: the tensors
    (`found`), pages of files that the pass read first (`files`: code), and what malloc keeps of
    blocks that were freed, with what loading and libraries take for themselves (`heap`; negative
    where the tensors went into memory that the process had left from before).
    """

    workload: Workload
    predicted: PeakBytes
    found: PeakBytes
    growth: int
    files: int
    weights: int

    @property
    def heap(self) -> int:
        return self.growth - self.found.total - self.files

    @property
    def correction(self) -> Correction:
        """What the next plan is to estimate with."""
        return Correction(
            self.found.total / self.predicted.total, max(0, self.growth - self.found.total)
        )


def largest_pass(
    traced: Traced, kind: WeightFormat, plan: Plan, points: Sequence[HookPoint], device: str
) -> tuple[Workload, PeakBytes]:
    """The one of a plan's passes that is predicted to take the most."""
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
    """Run the largest pass of a plan on random tokens, once for the growth of memory and once
    storage by storage.

    `loading`: the memory that loading the model took.
    """
    workload, predicted = largest_pass(traced, kind, plan, points, loaded.device.type)
    vocabulary = loaded.architecture.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (workload.windows, workload.tokens), generator=generator).to(
        loaded.device
    )
    with PeakMemory(loaded.device) as growing:
        _run(loaded, ids, workload, points, kind)
    found = _run(loaded, ids, workload, points, kind)
    weights = quantization.resident_bytes(loaded.architecture.model)
    growth = growing.growth
    if loaded.device.type == "cpu":  # as the job will, whose heap has what loading left in it
        growth += growing.before - loading.before - weights
    return Measured(workload, predicted, found, growth, growing.files, weights)


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


def before_counting(config: ModelConfig) -> None:
    """What a process does before its growth is counted, so that it is the same in `load_model` and
    in a job.

    Imports the code that a model of this config takes, and what tells which of its modules are
    needed; gives back the heap's free memory (of a checkpoint that was converted here, say).
    """
    from theloom.memory import trace  # noqa: F401

    model_config = hf_config(config)
    if not _is_own_code(model_config):
        _model_class(model_config)
    host.release_free_heap()
