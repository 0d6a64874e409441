"""Memory of Llama-like models in closed form: the same numbers as the trace, at once, without
torch.

Symbols as in the field: h width of the residual stream, I of the MLP, H query and K key heads of
size d, L blocks run, b windows, c tokens of a step, T tokens of the KV cache at the last step, e
bytes of an element. The formulas list what is alive at the moments that can be the peak: the end of
the gated MLP, the rotation of queries and keys, the growth of the KV cache, and the attention over
it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate

from theloom.config.model_dims import ModelDims
from theloom.memory.sizes import PeakBytes, Workload
from theloom.model.weight_format import WeightFormat, quantized_bytes
from theloom.precision import BYTES

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "olmo2")


def covers(size: ModelDims) -> bool:
    """Tell whether the formulas hold: a Llama-like model, whose attention sees all of its context.

    Args:
        size: dimensions of the model.

    Returns:
        Whether they do.
    """
    return size.model_type in LLAMA_LIKE and not size.sliding_window


@dataclass(frozen=True)
class Parameters:
    """Elements of a model: linear layers of all blocks, everything else in the base model, and the
    LM head.
    """

    linear: int
    output_rows: int  # rows of all linear layers together
    largest_linear: int
    other: int
    lm_head: int

    @property
    def base(self) -> int:
        """Elements of the base model, without the LM head."""
        return self.linear + self.other


def parameters(size: ModelDims, tied: bool) -> Parameters:
    """Count the weights of a Llama-like model.

    Args:
        size: dimensions of the model.
        tied: the LM head is the token embedding.

    Returns:
        The counts by part.
    """
    h, q, kv = size.hidden_size, size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    block = h * (2 * q + 2 * kv) + 3 * h * size.intermediate_size
    norms = {"qwen3": 2 * h + 2 * size.head_dim, "olmo2": 2 * h + q + kv}.get(
        size.model_type, 2 * h
    )
    biases = q + 2 * kv if size.model_type == "qwen2" else 0
    embedding = size.vocab_size * h
    return Parameters(
        linear=size.num_blocks * block,
        output_rows=size.num_blocks * (q + 2 * kv + 2 * h + 2 * size.intermediate_size),
        largest_linear=max(h * size.intermediate_size, h * q),
        other=embedding + size.num_blocks * (norms + biases) + h,
        lm_head=0 if tied else embedding,
    )


def weights(
    size: ModelDims, kind: WeightFormat, blocks: int | None = None, final_norm: bool = True
) -> int:
    """Compute the size of the base model, without LM head, with its two rotary tables in FP32.

    Args:
        size: dimensions of the model.
        kind: format of the weights.
        blocks: how many of the first are loaded; None: all.
        final_norm: the norm behind the last block is loaded.

    Returns:
        Bytes.
    """
    if blocks is not None:
        size = replace(size, num_blocks=blocks)
    counts, e = parameters(size, tied=True), BYTES[kind.precision]
    linear = (
        counts.linear * e
        if kind.quantization is None
        else quantized_bytes(kind.quantization, counts.linear, counts.output_rows)
    )
    other = counts.other - (0 if final_norm else size.hidden_size)
    return linear + other * e + 2 * 4 * (size.head_dim // 2)


def forward(
    size: ModelDims, kind: WeightFormat, workload: Workload, blocks: int, held: Collection[int] = ()
) -> PeakBytes:
    """Compute the peak of one forward pass with fused attention.

    Args:
        size: dimensions of the model.
        kind: format of the weights.
        workload: windows, tokens of each, and tokens of a step.
        blocks: how many of the first run.
        held: residuals that are kept until the end: 0 is the token embedding, k the output of block
            k − 1.

    Returns:
        Bytes by category, without the weights.
    """
    steps = list(zip(accumulate(workload.steps), workload.steps, strict=True))
    cached = len(steps) > 1
    last_two = steps[-2:]  # the last may be a short one
    peaks = [
        _step(size, kind, workload.windows, tokens, end, cached, blocks, held)
        for end, tokens in last_two
    ]
    return max(peaks, key=lambda parts: parts.total)


def _step(
    size: ModelDims,
    kind: WeightFormat,
    windows: int,
    tokens: int,
    end: int,
    cached: bool,
    blocks: int,
    held: Collection[int],
) -> PeakBytes:
    """One step over `tokens` positions of each window, the last of `end`; `cached`: through a KV
    cache.
    """
    e, h, i, d = BYTES[kind.precision], size.hidden_size, size.intermediate_size, size.head_dim
    q, kv, n, olmo2 = (
        size.num_heads * d,
        size.num_kv_heads * d,
        windows * tokens,
        size.model_type == "olmo2",
    )
    before = sum(end if residual < blocks else end - tokens for residual in held)

    def product(inputs: int, outputs: int) -> int:
        """What a linear layer takes, its result included."""
        if kind.quantization == "int4":  # the weight made whole again
            return inputs * outputs * e + n * outputs * e
        if (
            kind.quantization == "int8"
        ):  # rows in FP16, unless they are, and int8 with scales; products in int32 and FP16
            return (
                (0 if kind.precision == "fp16" else 2 * n * inputs)
                + n * inputs
                + 4 * n
                + 6 * n * outputs
            )
        return n * outputs * e

    # the embedding, the input of the last block, and what its first norm makes of that
    streams = (len({0, blocks - 1} - set(held)) + (not olmo2)) * n * h * e
    rotary = 4 if olmo2 else e  # OLMo 2 rotates in FP32
    moments = [
        streams + product(h, q),
        streams + n * (q + kv) * e + product(h, kv),
        streams
        + n * ((q + 2 * kv) * e + max(3 * q, q + 3 * kv) * rotary)
        - (2 * n * kv * e if cached else 0),
        streams + n * (2 * q + (0 if cached else 2 * kv)) * e + product(q, h),
        streams + n * h * e + n * i * e + product(h, i),
        streams + n * h * e + 3 * n * i * e,
        streams + n * h * e + n * i * e + product(i, h),
    ]
    if kind.precision == "fp32" and kv < q and end == tokens:  # `model.attention_kernels`
        sums = 4 * windows * size.num_heads * tokens if tokens > 1 else 0  # of the softmax
        moments.append(streams + n * (4 * q + (0 if cached else 2 * kv)) * e + sums)
    common = 8 * tokens + 2 * tokens * d * rotary
    if not cached:
        return PeakBytes(0, before * windows * h * e, common + max(moments))
    # the last block's new values beside the old ones, which are cached, as its keys and all of the
    # others' are
    moments.append(streams + n * (q + 2 * kv) * e + windows * kv * e * (end - tokens))
    mask = 0
    if end > tokens:
        # a mask, once as booleans and once as numbers in the attention, for which keys and values
        # are repeated
        mask = tokens * end
        repeated = 2 * windows * end * q * e if kv < q else 0
        attention = 2 * n * q * e + 4 * windows * size.num_heads * tokens
        moments.append(streams + attention + repeated + windows * mask * e)
    cache = 2 * blocks * windows * kv * e * end
    return PeakBytes(cache, before * windows * h * e, common + mask + max(moments))
