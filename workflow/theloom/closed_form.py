"""Memory of Llama-like models in closed form: the same numbers as the trace, at once, without torch.

Symbols as in the field: h width of the residual stream, I of the MLP, H query and K key heads of size d, L blocks run,
b windows, c tokens of a step, T tokens of the KV cache at the last step, e bytes of an element. The formulas list what
is alive at the moments that can be the peak: the end of the gated MLP, the attention over a KV cache, and the rotation of
queries and keys.
"""

from collections.abc import Collection
from dataclasses import dataclass

from theloom.architecture import Numbers
from theloom.precision import BYTES

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
NF4_BLOCK = 64  # weights that share one 4-byte scale


@dataclass(frozen=True)
class Parts:
    """Bytes of one forward pass at its peak, weights apart."""

    kv_cache: int
    captured: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.kv_cache + self.captured + self.temporaries


def covers(size: Numbers) -> bool:
    """Whether the formulas hold: a Llama-like model, whose attention sees all of its context."""
    return size.model_type in LLAMA_LIKE


@dataclass(frozen=True)
class Parameters:
    """Elements of a model: linear layers of all blocks, everything else in the base model, and the LM head."""

    linear: int
    output_rows: int  # rows of all linear layers together
    largest_linear: int
    other: int
    lm_head: int

    @property
    def base(self) -> int:
        return self.linear + self.other


def parameters(size: Numbers, tied: bool) -> Parameters:
    """Counts of a Llama-like model."""
    h, q, kv = size.hidden_size, size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    block = h * (2 * q + 2 * kv) + 3 * h * size.intermediate_size
    norms = {"qwen3": 2 * h + 2 * size.head_dim, "olmo2": 2 * h + q + kv}.get(size.model_type, 2 * h)
    biases = q + 2 * kv if size.model_type == "qwen2" else 0
    embedding = size.vocab_size * h
    return Parameters(
        linear=size.num_blocks * block,
        output_rows=size.num_blocks * (q + 2 * kv + 2 * h + 2 * size.intermediate_size),
        largest_linear=max(h * size.intermediate_size, h * q),
        other=embedding + size.num_blocks * (norms + biases) + h,
        lm_head=0 if tied else embedding,
    )


def weights(size: Numbers, precision: str, quantization: str | None = None) -> int:
    """Bytes of the base model, without LM head, with its two rotary tables in FP32."""
    counts, e = parameters(size, tied=True), BYTES[precision]
    linear = {
        None: counts.linear * e,
        "int8": counts.linear + 4 * counts.output_rows,
        "int4": counts.linear // 2 + 4 * (counts.linear // NF4_BLOCK),
    }[quantization]
    return linear + counts.other * e + 2 * 4 * (size.head_dim // 2)


def forward(
    size: Numbers,
    precision: str,
    windows: int,
    tokens: int,
    chunk_size: int,
    blocks: int,
    held: Collection[int] = (),
    quantization: str | None = None,
) -> Parts:
    """The peak of one forward pass over the first `blocks` blocks, with fused attention.

    `held` are residuals that are kept until the end: 0 is the token embedding, k the output of block k − 1.
    """
    e, h, d = BYTES[precision], size.hidden_size, size.head_dim
    q, kv = size.num_heads * d, size.num_kv_heads * d
    step = min(tokens, chunk_size)
    n = windows * step
    whole = tokens - tokens % step  # the last step of full length is the peak
    before = sum(whole if residual < blocks else whole - step for residual in held)
    captured = before * windows * h * e
    # the embedding, the input of the last block, its middle, and what its second norm makes of that
    streams = len({0, blocks - 1} - set(held)) + (1 if size.model_type == "olmo2" else 2)
    rotary = 4 if size.model_type == "olmo2" else e  # OLMo 2 rotates in FP32
    positions = 8 * step + 2 * step * d * rotary
    mlp = streams * n * h * e + _mlp(n, size, precision, quantization)
    rotated = (streams - 1) * n * h * e + n * ((q + 2 * kv) * e + (q + 3 * kv) * rotary)
    if tokens <= chunk_size:
        return Parts(0, captured, positions + max(rotated, mlp))
    keys_and_values = 2 * blocks * windows * kv * e * whole
    mask = step * whole
    repeated = 2 * windows * whole * q * e if kv < q else 0
    attention = (streams - 1) * n * h * e + 2 * n * q * e + 4 * windows * size.num_heads * step
    attention += repeated + windows * mask * e
    rotated -= 2 * n * kv * e  # not in the cache yet
    return Parts(keys_and_values, captured, positions + mask + max(rotated, attention, mlp))


def _mlp(n: int, size: Numbers, precision: str, quantization: str | None) -> int:
    """Bytes that the gated MLP adds for n tokens: three results of its width, or what a quantised product takes."""
    e, h, i = BYTES[precision], size.hidden_size, size.intermediate_size
    three = 3 * n * i * e
    if quantization == "int4":  # the second projection: its weight made whole again, beside two results
        return max(three, 2 * n * i * e + h * i * e)
    if quantization == "int8":  # likewise: rows in FP16 and int8 with scales, int32 and FP16 products, and one result
        half = 0 if precision == "fp16" else 2 * n * h
        return max(three, n * i * e + half + n * h + 4 * n + 6 * n * i)
    return three
