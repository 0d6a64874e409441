"""How a run is cut into forward passes, so that it fits the memory that is free; or what would make it fit.

A plan may make batches and chunks smaller: rows do not depend on them but for rounding. It never changes precision,
quantisation, context or hook points: those are the user's, who is told which change would do.
"""

import logging
from dataclasses import dataclass, replace

from theloom import estimate as estimate_module
from theloom import memory
from theloom.errors import MemoryPlanError
from theloom.estimate import Estimate
from theloom.host import DeviceMemory
from theloom.memory import Components, Parts

log = logging.getLogger(__name__)

# Tokens of a batch where the config leaves it open: enough to keep the device busy, and no more. On CPUs batches larger
# than the caches are no faster.
MOST_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Plan:
    """How a run is cut into forward passes. Tokens."""

    batch_tokens: int
    chunk_size: int
    longest: int  # longest window

    @property
    def streamed(self) -> bool:
        """Whether the longest window goes through the KV cache chunk by chunk."""
        return self.longest > self.chunk_size

    @property
    def width(self) -> int:
        """Tokens of the widest window that shares a batch."""
        return min(self.chunk_size, self.longest)

    @property
    def batch_windows(self) -> int:
        """Windows of that width that share a forward pass."""
        return max(1, self.batch_tokens // self.width)


@dataclass(frozen=True)
class Correction:
    """What a measurement on the device taught: real bytes of a forward pass for one foretold, and bytes beside it."""

    ratio: float = 1.0
    beside: int = 0


@dataclass(frozen=True)
class Planned:
    """A plan, the bytes that it is foretold to take, and what was changed for it to fit, in words."""

    plan: Plan
    components: Components
    changes: tuple[str, ...] = ()


def forward(estimate: Estimate, kind: str, plan: Plan) -> Parts:
    """The bytes of the larger of a plan's two passes: a full batch of the widest windows, or the longest streamed."""
    batch = estimate.find(kind, plan.width, plan.chunk_size).times(plan.batch_windows)
    if not plan.streamed:
        return batch
    return max(batch, estimate.find(kind, plan.longest, plan.chunk_size), key=lambda parts: parts.total)


def choose(
    estimate: Estimate,
    kind: str,
    device: str,
    found: DeviceMemory,
    *,
    threshold: float = 1.0,
    longest: int | None = None,
    correction: Correction = Correction(),
    others: str = "",
) -> Planned:
    """The largest batch, and the largest chunk, with which a run fits a device (`cpu` or `cuda`).

    `found` is the device's memory now, of which `threshold` (a share of the whole) may be in use; where nothing keeps
    to it, what fits at all is taken, with a warning. `longest` is the longest window (default: the estimate's context).
    `others` names who else uses the device. Raises MemoryPlanError, with what would make it fit.
    """
    longest = min(longest or estimate.context_length, estimate.context_length)
    asked = Plan(estimate.batch_tokens or MOST_BATCH_TOKENS[device], estimate.chunk_size, longest)
    candidates = [_weigh(estimate, kind, device, plan, correction) for plan in _smaller(asked)]
    headroom = int((1 - threshold) * found.total)
    for budget in (found.free - headroom, found.free):
        for planned in candidates:
            if planned.components.total <= budget:
                changes = _changes(asked, planned.plan, chosen=estimate.batch_tokens is None)
                for change in changes:
                    log.warning("to fit %s free: %s", memory.in_words(found.free), change)
                if budget == found.free and headroom:
                    _warn_headroom(planned.components, found, threshold)
                return replace(planned, changes=changes)
    raise MemoryPlanError(_refusal(estimate, kind, device, found, min(candidates, key=_total), correction, others))


def check_begun(
    estimate: Estimate, kind: str, device: str, found: DeviceMemory, plan: Plan, correction: Correction, partial: str
) -> None:
    """An unfinished file that was begun with a plan can be gone on with in what is free. Raises MemoryPlanError."""
    needed = _weigh(estimate, kind, device, plan, correction).components.total
    if needed > found.free:
        raise MemoryPlanError(
            f"{partial} was begun with batches of {plan.batch_tokens} tokens, which take {memory.in_words(needed)}, "
            f"and {device} has {memory.in_words(found.free)} free; free some, or remove the file to begin anew"
        )


def _smaller(asked: Plan) -> list[Plan]:
    """The plan asked for, then ever smaller ones: fewer windows side by side, then smaller chunks."""
    plans, batch = [], asked.batch_tokens
    for chunk_size in estimate_module.chunk_sizes(asked.chunk_size):
        plans.append(replace(asked, batch_tokens=batch, chunk_size=chunk_size))
        while batch // 2 >= chunk_size:
            batch //= 2
            plans.append(replace(asked, batch_tokens=batch, chunk_size=chunk_size))
    if asked.streamed:  # the KV cache and its masks can take more than the whole document at once
        plans.append(replace(asked, batch_tokens=asked.longest, chunk_size=asked.longest))
    return plans


def _weigh(estimate: Estimate, kind: str, device: str, plan: Plan, correction: Correction) -> Planned:
    parts = forward(estimate, kind, plan).times(correction.ratio)
    components = memory.on_device(estimate.weights[kind], parts, device)
    return Planned(plan, replace(components, beside=correction.beside))


def _changes(asked: Plan, plan: Plan, chosen: bool) -> tuple[str, ...]:
    changes = []
    if plan.chunk_size != asked.chunk_size:
        whole = asked.streamed and not plan.streamed
        how = "in one pass" if whole else f"in chunks of {plan.chunk_size} tokens"
        changes.append(f"long documents go {how}, not in chunks of {asked.chunk_size}")
    if plan.batch_tokens != asked.batch_tokens and not chosen:
        changes.append(f"batches of {plan.batch_tokens} tokens, not {asked.batch_tokens}")
    return tuple(changes)


def _warn_headroom(needed: Components, found: DeviceMemory, threshold: float) -> None:
    log.warning(
        "the run is planned to take %s, and %s of %s are free: more than memory_warning_threshold=%.2f will be in use",
        memory.in_words(needed.total),
        memory.in_words(found.free),
        memory.in_words(found.total),
        threshold,
    )


def _total(planned: Planned) -> int:
    return planned.components.total


def _refusal(
    estimate: Estimate, kind: str, device: str, found: DeviceMemory, least: Planned, correction: Correction, others: str
) -> str:
    """One line: what the run needs at least, by category, what is free, and the cheapest changes that would do."""
    needed = least.components
    parts = ", ".join(
        f"{name.replace('_', ' ')} {memory.in_words(value)}" for name, value in vars(needed).items() if value
    )
    limit = f", limited by {found.limited_by}" if found.limited_by else ""
    limit += f"; others on it: {others}" if others else ""
    changes = _fitting_changes(estimate, kind, device, found, least, correction)
    advice = "; it would fit with " + ", or ".join(changes) if changes else "; no other precision would fit either"
    return (
        f"the run needs at least {memory.in_words(needed.total)} ({parts}) and {device} has "
        f"{memory.in_words(found.free)} of {memory.in_words(found.total)} free{limit}{advice}"
    )


def _fitting_changes(
    estimate: Estimate, kind: str, device: str, found: DeviceMemory, least: Planned, correction: Correction
) -> list[str]:
    """At most three changes, those that alter the rows least first, each with what it saves."""
    offers: list[tuple[str, Planned]] = []
    shorter = least.plan.longest
    while shorter > estimate_module.SMALLEST_CHUNK:
        shorter //= 2
        plan = replace(least.plan, longest=shorter, batch_tokens=estimate_module.SMALLEST_CHUNK)
        offer = _weigh(estimate, kind, device, plan, correction)
        if offer.components.total <= found.free:
            offers.append((f"corpus.context_length={shorter}", offer))
            break
    texts = {
        "bf16": "memory.precision_mode=bf16",
        "int8": "memory.quantization=8bit",
        "int4": "memory.quantization=4bit",
    }
    for other, text in texts.items():
        if other != kind and other in estimate.passes and estimate.weights[other] < estimate.weights[kind]:
            offers.append((text, _weigh(estimate, other, device, least.plan, correction)))
    fitting = [(text, offer) for text, offer in offers if offer.components.total <= found.free]
    return [
        f"{text} (saves {memory.in_words(least.components.total - offer.components.total)})" for text, offer in fitting
    ][:3]
