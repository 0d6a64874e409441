"""Memory and time of sampling answers, and how many fit a device side by side."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import h5py

from theloom.config.schema import Config
from theloom.devices.host import DeviceMemory
from theloom.devices.workspace import Capability
from theloom.errors import MemoryPlanError, ModelError
from theloom.hooks.points import HookPoint
from theloom.memory import sizes
from theloom.memory.sizes import Components, PeakBytes, Workload
from theloom.model.weight_format import WeightFormat
from theloom.precision import BYTES
from theloom.terminal import format_bytes

if TYPE_CHECKING:
    from theloom.memory.estimators import Estimator

MOST = 64  # answers side by side, where the config does not say
_STEP = 64  # tokens of a step by which the KV cache is told
_SCORES = 16  # bytes of a row's scores, by token of the vocabulary
_CHOICE = 64  # bytes of what a choice of one row takes, by token of the vocabulary
_MASK = 5  # bytes of an attention mask, by pair of tokens

# Bytes per second at which a step reads the weights: half of an H100's; two channels of DDR5
READING = {"cpu": 2e10, "cuda": 1.6e12}
# Seconds that a choice takes, by token of the vocabulary: 2.5 ms were seen of 49,152 tokens, on one
# core of a Xeon with top_p
CHOOSING = 5e-8

INSTEAD = (
    "set memory.quantization or a smaller answers.max_new_tokens, or sample with another engine "
    "and set answers.source=column"
)


@dataclass(frozen=True)
class AnswersSize:
    """Bytes of sampling, for one weight format.

    Attributes:
        weights: Of the whole model, LM head included.
        cache_token: Of the KV cache, for a token.
        prefill_token: Of a pass over a prompt, for a token of it.
        vocabulary: Tokens that scores are of.
        blocks: Of the model.
    """

    weights: int
    cache_token: int
    prefill_token: int
    vocabulary: int
    blocks: int

    def of(self, rows: int, prompt: int, new: int) -> PeakBytes:
        """The peak of answers side by side.

        Args:
            rows: How many.
            prompt: Tokens of the longest prompt.
            new: Tokens of the longest answer.

        Returns:
            Bytes beside the weights.

        Examples:
            >>> size = AnswersSize(0, cache_token=8, prefill_token=4, vocabulary=10, blocks=2)
            >>> size.of(rows=2, prompt=3, new=1).kv_cache
            96
        """
        cache = self.cache_token * (prompt + new)
        return PeakBytes(
            kv_cache=rows * (cache + cache // self.blocks),  # a block's grows by a copy
            captured=0,
            temporaries=rows * (self.prefill_token * prompt + _MASK * prompt**2),
            logits=self.vocabulary * (rows * _SCORES + _CHOICE),
        )

    def components(
        self, rows: int, prompt: int, new: int, device: str, capability: Capability = (8, 0)
    ) -> Components:
        """All that sampling takes on a device.

        Args:
            rows: Answers side by side.
            prompt: Tokens of the longest prompt.
            new: Tokens of the longest answer.
            device: `cpu`, or the type of a GPU.
            capability: Compute capability of the device.

        Returns:
            Bytes, the weights and the device's own overhead among them.
        """
        return sizes.with_device_overhead(
            self.weights, self.of(rows, prompt, new), device, capability
        )

    def seconds(self, tokens: float, rows: int, device: str) -> float:
        """The least time that sampled tokens take: each step reads the weights, and chooses row by
        row; the products of the passes come on top.

        Args:
            tokens: How many.
            rows: Answers side by side.
            device: `cpu`, or the type of a GPU.

        Returns:
            Seconds.
        """
        reading = self.weights / rows / READING.get(device, READING["cuda"])
        return tokens * (reading + CHOOSING * self.vocabulary)


def size_of(
    estimator: "Estimator", kind: WeightFormat, tied: bool, longest: int, device: str
) -> AnswersSize:
    """Bytes of sampling with a model.

    Args:
        estimator: Of the model without its LM head.
        kind: The weight format.
        tied: Whether the LM head is the token embedding.
        longest: Tokens of the longest prompt.
        device: `cpu` or `cuda`.

    Returns:
        The bytes by what they are of.

    Raises:
        ModelError: The model's memory cannot be predicted.
    """
    size = estimator.size
    last = f"blocks.{size.num_blocks - 1}.hook_resid_post"
    points: list[HookPoint] = estimator.catalog().select([last])
    twin = WeightFormat("bf16", kind.quantization) if kind.precision == "fp16" else kind
    prefill = estimator.forward(twin, Workload(1, longest, longest), points, device=device)
    try:
        stepped = estimator.forward(twin, Workload(1, 2 * _STEP, _STEP), points, device=device)
        cache = stepped.kv_cache // (2 * _STEP)
    except ModelError:  # its code takes no cache: each step is a pass
        cache = 0
    head = 0 if tied else size.vocab_size * size.hidden_size * BYTES[kind.precision]
    return AnswersSize(
        weights=estimator.weights(kind) + head,
        cache_token=cache,
        prefill_token=-(-(prefill.temporaries + prefill.captured) // longest),
        vocabulary=size.vocab_size,
        blocks=size.num_blocks,
    )


def choose_rows(
    size: AnswersSize,
    requested: int | None,
    prompt: int,
    new: int,
    device: str,
    memory: DeviceMemory,
    threshold: float,
    capability: Capability = (8, 0),
) -> int:
    """How many answers are sampled side by side.

    Args:
        size: Bytes of sampling.
        requested: `answers.batch`.
        prompt: Tokens of the longest prompt.
        new: Tokens of the longest answer.
        device: `cpu`, or the type of a GPU.
        memory: Of the device, now.
        threshold: Share of it that may be in use.
        capability: Compute capability of the device.

    Returns:
        As many as requested, or as the stage takes at most, halved until they fit.

    Raises:
        MemoryPlanError: Not even one fits.
    """
    rows = requested or MOST
    free = memory.free - int((1 - threshold) * memory.total)
    while rows > 1 and size.components(rows, prompt, new, device, capability).total > free:
        rows //= 2
    needed = size.components(rows, prompt, new, device, capability)
    if needed.total > memory.free:
        raise MemoryPlanError(
            f"answers.source=model: one answer to a prompt of {prompt} tokens takes "
            f"{format_bytes(needed.total)} ({sizes.by_category(needed)}), and {device} has "
            f"{format_bytes(memory.free)} free; {INSTEAD}"
        )
    return rows


def longest_prompt(config: Config, context: int) -> int:
    """Tokens of the longest prompt to which there is room for an answer.

    Args:
        config: The run's config.
        context: Tokens of the longest window.

    Returns:
        Tokens, 1 or more.
    """
    return max(1, context - config.answers.max_new_tokens)


def write(file: h5py.File, found: dict[str, AnswersSize]) -> None:
    """Write sizes into an open `estimate.h5`.

    Args:
        file: The open file.
        found: Sizes by weight format.
    """
    for kind, size in found.items():
        file.create_group(f"answers/{kind}").attrs.update(asdict(size))


def read(file: h5py.File) -> dict[str, AnswersSize]:
    """Read what `write` wrote.

    Args:
        file: The open `estimate.h5`.

    Returns:
        Sizes by weight format; nothing where a run samples no answers.
    """
    names = [f.name for f in fields(AnswersSize)]
    groups = file["answers"].items() if "answers" in file else ()
    return {k: AnswersSize(**{n: int(group.attrs[n]) for n in names}) for k, group in groups}
