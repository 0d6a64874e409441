"""What a GPU's allocator is predicted to hold for a run, by its rules replayed over the run's own
batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from theloom.corpus.batching import Lengths, plan_batches
from theloom.devices import accelerator, gpu_lease
from theloom.devices.workspace import cublas_workspace
from theloom.hooks.points import HookPoint
from theloom.memory import replayed
from theloom.memory.caching_allocator import Usage
from theloom.memory.estimators import Traced
from theloom.memory.sizes import FRAGMENTATION, BlockSizes, Workload
from theloom.model.length_switches import LengthSwitch
from theloom.model.weight_format import WeightFormat
from theloom.planning.estimates.estimate_file import Estimate
from theloom.planning.layerwise_plan import LayerwisePlan
from theloom.planning.plan import Plan, forward, longest_pass

if TYPE_CHECKING:
    import torch

    from theloom.model.fake import FakeModel

MOST_SHAPES = 4  # of batches, longest first: each is traced


@dataclass(frozen=True)
class Replayed:
    """Bytes at the peak: `allocated` given out, `reserved` held. `fragmentation`: the difference as
    a share of the plan's largest pass, which plans count; at most `FRAGMENTATION`, since a GPU that
    is full gets the rest back.
    """

    allocated: int
    reserved: int
    fragmentation: float
    expandable_segments: bool


def passes_of(
    plan: Plan, lengths: Sequence[int], switches: Sequence[LengthSwitch] = (), alone: int = 0
) -> list[Workload]:
    """The shapes of a shard's first batches, in the order in which they run.

    Args:
        plan: the plan.
        lengths: tokens of the shard's windows.
        switches: of the model.
        alone: tokens of the longest document that is recomputed by itself in one pass.

    Returns:
        Each shape once.

    Examples:
        >>> [(p.windows, p.tokens) for p in passes_of(Plan(64, 32, 48), [48, 20, 20, 3], alone=20)]
        [(1, 48), (3, 20), (1, 20)]
    """
    import numpy as np

    batches = plan_batches(
        np.array(lengths), plan.batch_tokens, plan.chunk_size, plan.streamed_windows, switches
    )
    shapes = dict.fromkeys(Workload(len(b.windows), b.width, plan.chunk_size) for b in batches)
    return [*list(shapes)[:MOST_SHAPES], *([Workload(1, alone, alone)] if alone else [])]


def replay_of_run(
    traced: Traced,
    kind: WeightFormat,
    estimate: Estimate,
    plan: Plan,
    points: Sequence[HookPoint],
    windows: Lengths,
    switches: Sequence[LengthSwitch],
    device: "torch.device",
) -> Replayed | None:
    """Replay the allocator over a run with the model as a whole on one GPU.

    Args:
        traced: estimator of the model.
        kind: format of the weights.
        estimate: of the run.
        plan: the plan.
        points: hook points that are captured.
        windows: lengths of the corpus' windows, of which the shard with most tokens is taken.
        switches: of the model.
        device: the job's device.

    Returns:
        The peaks; None where no such allocator runs, or the model is on several GPUs or its KV
        cache on the host.
    """
    if not accelerator.has_streams(device) or len(gpu_lease.held()) > 1 or plan.offloaded:
        return None
    largest = windows.of_largest_shard.tolist()
    alone = longest_pass(estimate, kind.name, plan, largest)
    expandable = accelerator.expandable_segments(device)
    usage = replayed.resident(
        traced.fake(kind),
        passes_of(plan, largest, switches, alone),
        points,
        kind.precision,
        traced.unneeded(points),
        fixed=[cublas_workspace(accelerator.capability(device))],
        expandable=expandable,
        of_window=estimate.kept_of_window,
    )
    return _as_share(usage, forward(estimate, kind.name, plan).total, expandable)


def replay_of_sweep(
    fake: "FakeModel",
    sizes: BlockSizes,
    estimate: Estimate,
    planned: LayerwisePlan,
    points: Sequence[HookPoint],
    windows: Lengths,
    residual_row: int,
    kind: WeightFormat,
    device: "torch.device",
) -> Replayed | None:
    """Replay the allocator over a run layer by layer, as `replay_of_run`.

    Args:
        fake: the model without bytes.
        sizes: bytes of its blocks.
        estimate: of the run.
        planned: batches and chunks.
        points: the hook points that are read.
        windows: lengths of all windows.
        residual_row: bytes of a token's residual.
        kind: of the weights.
        device: that the job runs on.

    Returns:
        What fragmentation takes; None on a device without such an allocator.
    """
    if not accelerator.has_streams(device):
        return None
    expandable = accelerator.expandable_segments(device)
    usage = replayed.layerwise(
        fake,
        sizes,
        passes_of(planned.plan, windows.of_largest_shard.tolist()),
        points,
        planned.plan.copied_rows(estimate.kept_of_window) * estimate.largest_capture[kind.name],
        residual_row,
        fixed=[cublas_workspace(accelerator.capability(device))],
        expandable=expandable,
    )
    return _as_share(usage, planned.need.working_set, expandable)


def _as_share(usage: Usage, of: int, expandable: bool) -> Replayed:
    share = min((usage.reserved - usage.allocated) / max(1, of), FRAGMENTATION)
    return Replayed(usage.allocated, usage.reserved, share, expandable)
