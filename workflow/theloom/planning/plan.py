"""Divide a run into forward passes that fit the free memory, or report what would make it fit.

A plan may reduce batches and chunks, on which rows depend only by rounding. It never changes
precision, quantization, context or hook points: the error lists the changes that would fit.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache as cache_of

from theloom import terminal
from theloom.corpus.batching import Lengths
from theloom.devices.host import DeviceMemory
from theloom.devices.workspace import Capability
from theloom.errors import MemoryPlanError
from theloom.memory import sizes
from theloom.memory.sizes import Components, PeakBytes, Workload
from theloom.planning.estimate import SMALLEST_CHUNK, chunk_sizes
from theloom.planning.estimates.estimate_file import Estimate
from theloom.store.ring_buffer import bytes_on_device

log = logging.getLogger(__name__)

# Tokens of a batch if the config does not set them: enough to keep the device busy. On CPUs,
# batches larger than the caches are no faster.
MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

Place = tuple[str, Capability]  # the type of a device, and its compute capability


def max_batch_tokens(device: str) -> int:
    """The size of a batch if the config does not set it.

    Args:
        device: the type of the device, such as `cpu`.

    Returns:
        Tokens at most; of an unknown GPU as of CUDA.

    Examples:
        >>> max_batch_tokens("cpu") == MAX_BATCH_TOKENS["cpu"]
        True
    """
    return MAX_BATCH_TOKENS.get(device, MAX_BATCH_TOKENS["cuda"])


@dataclass(frozen=True)
class Plan:
    """How a run is divided into forward passes. Sizes are tokens."""

    batch_tokens: int
    chunk_size: int
    longest: int  # longest window
    streamed_windows: int = 1  # most windows that stream in one batch
    offloaded: bool = False  # their KV cache is in host memory
    # windows and tokens of the largest batches that stream; empty: unknown
    long_batches: tuple[tuple[int, int], ...] = ()
    most_windows: int | None = None  # of a batch; None: unknown

    @property
    def streamed(self) -> bool:
        """Whether the longest window streams through the KV cache chunk by chunk."""
        return self.longest > self.chunk_size

    @property
    def width(self) -> int:
        """Tokens of the widest window that shares a batch."""
        return min(self.chunk_size, self.longest)

    @property
    def batch_windows(self) -> int:
        """Windows of that width that share a forward pass."""
        return max(1, self.batch_tokens // self.width)

    @property
    def passes(self) -> list[Workload]:
        """Candidates for the largest pass: a full batch of the widest windows, and streams."""
        streamed = (
            self.long_batches or ((self.streamed_windows, self.longest),) if self.streamed else ()
        )
        shapes = [(self.batch_windows, self.width), *streamed]
        return [Workload(windows, tokens, self.chunk_size) for windows, tokens in shapes]

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest forward step."""
        return max(p.windows * min(p.tokens, self.chunk_size) for p in self.passes)

    def copied_rows(self, of_window: int | None) -> int:
        """Compute the most rows that one forward step copies off the device.

        Args:
            of_window: the most rows that are kept of a window; None: all of them.

        Returns:
            Rows.

        Examples:
            >>> Plan(64, chunk_size=16, longest=16, most_windows=4).copied_rows(of_window=1)
            4
        """
        if of_window is None or self.most_windows is None:
            return self.step_tokens
        return min(self.step_tokens, of_window * max(self.most_windows, self.streamed_windows))

    def over(self, windows: Lengths | None) -> "Plan":
        """The plan with the batches of long windows that a corpus has, which may be fewer.

        Args:
            windows: lengths of the corpus' windows; None: unknown.

        Returns:
            The plan.
        """
        long_batches = (
            windows.streamed(self.chunk_size, self.streamed_windows)
            if windows and self.streamed
            else ()
        )
        most = max((count for count, _ in long_batches), default=self.streamed_windows)
        together = windows.most_together(self.batch_tokens) if windows else None
        return replace(
            self, long_batches=long_batches, streamed_windows=most, most_windows=together
        )

    def backed_off(self, level: int, streams: bool = True) -> "Plan":
        """The plan after running out of memory: batches, then chunks, are halved.

        Args:
            level: how many times to halve.
            streams: the model supports chunks; otherwise they stay as they are.

        Returns:
            The plan; unchanged where nothing can be halved any more.
        """
        plan = self
        for _ in range(level):
            if plan.streamed and plan.streamed_windows > 1:
                plan = replace(
                    plan,
                    streamed_windows=plan.streamed_windows // 2,
                    batch_tokens=plan.batch_tokens // 2,
                )
                fewer = dict.fromkeys(
                    (min(n, plan.streamed_windows), tokens) for n, tokens in plan.long_batches
                )
                plan = replace(plan, long_batches=tuple(fewer))
            elif plan.batch_windows > 1:
                plan = replace(plan, batch_tokens=plan.batch_tokens // 2)
            elif streams and plan.chunk_size // 2 >= SMALLEST_CHUNK:
                size = min(plan.chunk_size, plan.longest) // 2
                plan = replace(plan, chunk_size=size, batch_tokens=size, long_batches=())
        return plan


@dataclass(frozen=True)
class Correction:
    """Result of a measurement on the device.

    Args:
        ratio: measured bytes of a forward pass per predicted byte.
        overhead: bytes in addition to the pass.
        fragmentation: share of the pass that a GPU's allocator holds beyond what it gives out.
    """

    ratio: float = 1.0
    overhead: int = 0
    fragmentation: float = sizes.FRAGMENTATION


@dataclass(frozen=True)
class Planned:
    """A plan, its predicted bytes, and sentences on what was changed for it to fit."""

    plan: Plan
    components: Components
    changes: tuple[str, ...] = ()


def forward(estimate: Estimate, kind: str, plan: Plan) -> PeakBytes:
    """Estimate the largest pass of a plan.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        plan: the plan.

    Returns:
        Bytes at the peak, without the weights.
    """
    passes = [estimate.find(kind, p.tokens, plan.chunk_size).times(p.windows) for p in plan.passes]
    if plan.offloaded:  # the device holds the KV cache of the running block and the next one
        passes = [
            replace(p, kv_cache=min(p.kv_cache, 2 * p.kv_cache // estimate.blocks)) for p in passes
        ]
    return max(passes, key=lambda parts: parts.total)


def longest_pass(estimate: Estimate, kind: str, plan: Plan, lengths: Iterable[int]) -> int:
    """Tokens of the longest document whose single pass takes no more than the plan's passes.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        plan: the plan.
        lengths: tokens of the documents.

    Returns:
        Tokens; 0 where there is none.
    """
    budget = forward(estimate, kind, plan).total
    fitting = (n for n in set(lengths) if estimate.find(kind, n, n).total <= budget)
    return max(fitting, default=0)


def choose(
    estimate: Estimate,
    kind: str,
    device: str,
    memory: DeviceMemory,
    *,
    threshold: float = 1.0,
    windows: Lengths | None = None,
    correction: Correction = Correction(),
    others: str = "",
    streams: bool = True,
    capability: Capability = (8, 0),
) -> Planned:
    """Choose the largest batch and chunk with which a run fits a device.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        device: `cpu`, or the type of a GPU.
        memory: of the device, now.
        threshold: share of the total that may be in use. If no plan keeps to it, any that fits the
            free memory is taken, with a warning.
        windows: lengths of the corpus' windows; None: any number of the estimate's context length.
        correction: from a measurement on this device.
        others: who else uses the device, for the error.
        streams: long documents may go in chunks; otherwise each goes in one pass.
        capability: compute capability of the device, by which its libraries take memory.

    Returns:
        The plan, with the changes from what was requested.

    Raises:
        MemoryPlanError: no plan fits; the message lists changes that would.
    """
    longest = min(windows.longest if windows else estimate.context_length, estimate.context_length)
    requested = Plan(
        estimate.batch_tokens or max_batch_tokens(device),
        chunk_of(estimate.chunk_size, longest, streams),
        longest,
    )
    one_pass = one_pass_is_less(estimate, kind, requested)
    cache = "device" if device == "cpu" else estimate.cache
    place = (device, capability)
    weigh = cache_of(lambda plan: _weigh(estimate, kind, place, plan.over(windows), correction))
    plans = smaller_plans(requested, cache, one_pass, streams)
    if one_pass:
        log.info(
            "long documents go in one pass: in chunks of %d tokens they would take more memory",
            requested.chunk_size,
        )
    headroom = int((1 - threshold) * memory.total)
    for budget in (memory.free - headroom, memory.free):
        for planned in map(weigh, plans):
            if planned.components.total <= budget:
                chosen, may_offload = estimate.batch_tokens is None, estimate.cache == "auto"
                changes = _changes(requested, planned.plan, chosen, may_offload, one_pass)
                for change in changes:
                    log.warning("to fit %s free: %s", terminal.format_bytes(memory.free), change)
                if budget == memory.free and headroom:
                    _warn_headroom(planned.components, memory, threshold)
                return replace(planned, changes=changes)
    least = min(map(weigh, plans), key=_total)
    raise MemoryPlanError(_refusal(estimate, kind, place, memory, least, correction, others))


def plan_advice(
    estimate: Estimate,
    kind: str,
    device: str,
    memory: DeviceMemory,
    plan: Plan,
    correction: Correction,
    capability: Capability = (8, 0),
) -> str:
    """Advise what to change after running out of memory with the smallest plan.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        device: `cpu` or `cuda`.
        memory: of the device.
        plan: the smallest plan.
        correction: from a measurement on this device.
        capability: compute capability of the device.

    Returns:
        The end of an error message.
    """
    place = (device, capability)
    least = _weigh(estimate, kind, place, plan, correction)
    # a helpful change takes less than what did not fit
    full = replace(memory, free=least.components.total - 1)
    changes = _fitting_changes(estimate, kind, place, full, least, correction)
    return (
        "set " + ", or ".join(changes)
        if changes
        else "ask for fewer hook points, or take a larger device"
    )


def chunk_of(requested: int, longest: int, streams: bool) -> int:
    """The size of a chunk: as requested, or the longest document where a model cannot be streamed.

    Args:
        requested: tokens.
        longest: tokens of the longest document.
        streams: whether the model can be streamed.

    Returns:
        Tokens.

    Examples:
        >>> chunk_of(512, 3000, streams=True), chunk_of(512, 3000, streams=False)
        (512, 3000)
    """
    return requested if streams else max(requested, longest)


def smaller_plans(requested: Plan, cache: str, one_pass: bool, streams: bool = True) -> list[Plan]:
    """List plans in descending order: first fewer windows in a batch, then smaller chunks.

    Args:
        requested: the first plan.
        cache: place of the KV cache of long documents: `auto`, `device` or `offloaded`.
        one_pass: plans with long documents in one pass come first, else last.
        streams: chunks may be smaller than requested.

    Returns:
        The plans, in the order in which to try them.
    """
    whole = replace(requested, chunk_size=requested.longest, streamed_windows=1)
    plans = _fewer_windows(whole, requested.longest) if one_pass else []
    streamed: list[Plan] = []
    chunks = chunk_sizes(requested.chunk_size) if streams else [requested.chunk_size]
    for chunk_size in chunks:
        batch = streamed[-1].batch_tokens if streamed else requested.batch_tokens
        streamed += _fewer_windows(
            replace(requested, batch_tokens=batch, chunk_size=chunk_size), chunk_size
        )
    offloaded = (
        [replace(p, offloaded=True) for p in streamed]
        if requested.streamed and cache != "device"
        else []
    )
    plans += offloaded if cache == "offloaded" else streamed
    # the KV cache and its masks can take more than the whole document in one pass
    if requested.streamed and not one_pass:
        plans.append(replace(whole, batch_tokens=requested.longest))
    return plans + (offloaded if cache == "auto" else [])


def _fewer_windows(plan: Plan, step: int) -> list[Plan]:
    """A plan, then with fewer streamed windows, then smaller batches, down to `step` tokens."""
    windows = max(1, plan.batch_tokens // plan.chunk_size) if plan.streamed else 1
    plans = [replace(plan, streamed_windows=windows)]
    while plans[-1].streamed_windows > 1:
        plans.append(replace(plan, streamed_windows=plans[-1].streamed_windows // 2))
    while plans[-1].batch_tokens // 2 >= step:
        plans.append(replace(plans[-1], batch_tokens=plans[-1].batch_tokens // 2))
    return plans


def one_pass_is_less(estimate: Estimate, kind: str, requested: Plan) -> bool:
    """Whether one pass, which is faster, takes no more memory for the longest window.

    Args:
        estimate: of the run.
        kind: name of the weight format.
        requested: the plan with chunks.

    Returns:
        False where nothing is streamed, or the cache is offloaded.
    """
    if not requested.streamed or estimate.cache == "offloaded":
        return False
    at_once = estimate.find(kind, requested.longest, requested.longest).total
    return at_once <= estimate.find(kind, requested.longest, requested.chunk_size).total


def _weigh(
    estimate: Estimate, kind: str, place: Place, plan: Plan, correction: Correction
) -> Planned:
    parts = forward(estimate, kind, plan).times(correction.ratio)
    components = sizes.with_device_overhead(
        estimate.weights[kind], parts, *place, correction.fragmentation
    )
    waiting = bytes_on_device(
        place[0], plan.copied_rows(estimate.kept_of_window) * estimate.largest_capture[kind]
    )
    return Planned(plan, replace(components, on_their_way=waiting, overhead=correction.overhead))


def _changes(
    requested: Plan, plan: Plan, chosen: bool, may_offload: bool, one_pass: bool
) -> tuple[str, ...]:
    changes = []
    whole = requested.streamed and not plan.streamed
    if plan.chunk_size != requested.chunk_size and not (whole and one_pass):
        how = "in one pass" if whole else f"in chunks of {plan.chunk_size} tokens"
        changes.append(f"long documents go {how}, not in chunks of {requested.chunk_size}")
    if plan.batch_tokens != requested.batch_tokens and not chosen:
        changes.append(f"batches of {plan.batch_tokens} tokens, not {requested.batch_tokens}")
    if plan.offloaded and may_offload:
        changes.append("the KV cache of long documents lies in host memory (extraction.cache=auto)")
    return tuple(changes)


def _warn_headroom(needed: Components, memory: DeviceMemory, threshold: float) -> None:
    log.warning(
        "the run is planned to take %s, and %s of %s are free: "
        "more than memory_warning_threshold=%.2f will be in use",
        terminal.format_bytes(needed.total),
        terminal.format_bytes(memory.free),
        terminal.format_bytes(memory.total),
        threshold,
    )


def _total(planned: Planned) -> int:
    return planned.components.total


def _refusal(
    estimate: Estimate,
    kind: str,
    place: Place,
    memory: DeviceMemory,
    least: Planned,
    correction: Correction,
    others: str,
) -> str:
    """One line: the least that the run needs, what is free, and changes that would fit."""
    needed = least.components
    limit = f", limited by {memory.limited_by}" if memory.limited_by else ""
    limit += f"; others on it: {others}" if others else ""
    changes = _fitting_changes(estimate, kind, place, memory, least, correction)
    advice = (
        "; it would fit with " + ", or ".join(changes)
        if changes
        else "; no other precision would fit either"
    )
    text = terminal.format_bytes
    return (
        f"the run needs at least {text(needed.total)} ({sizes.by_category(needed)}) and {place[0]} "
        f"has {text(memory.free)} of {text(memory.total)} free{limit}{advice}"
    )


def _fitting_changes(
    estimate: Estimate,
    kind: str,
    place: Place,
    memory: DeviceMemory,
    least: Planned,
    correction: Correction,
) -> list[str]:
    """At most three changes with what they save; those that alter the rows least come first."""
    offers: list[tuple[str, Planned]] = []
    shorter = least.plan.longest
    while shorter > SMALLEST_CHUNK:
        shorter //= 2
        plan = replace(least.plan, longest=shorter, batch_tokens=SMALLEST_CHUNK)
        offer = _weigh(estimate, kind, place, plan, correction)
        if offer.components.total <= memory.free:
            offers.append((f"corpus.context_length={shorter}", offer))
            break
    texts = {
        "bf16": "memory.precision_mode=bf16",
        "int8": "memory.quantization=8bit",
        "int4": "memory.quantization=4bit",
    }
    for other, text in texts.items():
        if (
            other != kind
            and other in estimate.passes
            and estimate.weights[other] < estimate.weights[kind]
        ):
            offers.append((text, _weigh(estimate, other, place, least.plan, correction)))
    fitting = [(text, offer) for text, offer in offers if offer.components.total <= memory.free]
    return [
        f"{text} (saves {terminal.format_bytes(least.components.total - offer.components.total)})"
        for text, offer in fitting
    ][:3]
