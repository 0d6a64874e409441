"""Predicts the memory of a forward pass: the real classes run, with the real taps, on fake tensors.

Fake tensors have shapes and no bytes, so neither weights nor a GPU are needed, and a model of 70
billion parameters is traced in a second or a few. The fake device is the CPU: fake CUDA tensors
would take attention's unfused path.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from theloom.hooks.blocks import Architecture
from theloom.hooks.module_names import looks_causal
from theloom.hooks.points import HookPoint
from theloom.hooks.recurrent import cache_name
from theloom.hooks.taps import Taps
from theloom.memory.convolutions import convolution_buffers
from theloom.memory.sizes import PeakBytes, Workload
from theloom.memory.storages import TEMPORARIES, LiveStorages, Peak
from theloom.model.attention_kernels import traced_as_cuda
from theloom.model.checkpoint.halves import SOURCE_IDS, SOURCE_MASK
from theloom.model.fake import FakeModel
from theloom.model.forward import PrefillCache
from theloom.model.towers.chat import images_placed
from theloom.model.towers.decoder import longest_target
from theloom.model.without_bytes.shapes_only import shapes_only, with_values_if_needed
from theloom.precision import torch_dtype
from theloom.rows.modality import SOURCE_ROWS, source_of
from theloom.rows.tower_inputs import has_values

KV_CACHE, CAPTURED, LOGITS = "kv_cache", "captured", "logits"


class MarkedCache(PrefillCache):
    """A KV cache that says which storages are its own."""

    live: LiveStorages

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As of `DynamicCache`; what a layer then holds is marked.

        Args:
            key_states: (batch, heads, position, head size).
            value_states: (batch, heads, position, head size).
            layer_idx: the number of the layer.
            *args: of transformers.
            **kwargs: of transformers.

        Returns:
            Keys and values of all tokens that the layer sees.
        """
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        for tensor in (*updated, getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                self.live.mark(tensor, KV_CACHE)
        return updated


def trace(
    fake: FakeModel,
    workload: Workload,
    points: Sequence[HookPoint],
    held: bool = False,
    store: str | None = None,
    device: str = "cpu",
    on_their_way: int = 0,
    of_window: int | None = None,
    shorten: bool = True,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Peak, LiveStorages]:
    """Trace the memory of one workload; weights and inputs are not counted.

    Args:
        fake: the model.
        workload: windows, tokens and chunks of the pass.
        points: the hook points to read; the forward ends after the deepest, with none it runs
            through.
        held: their values are held until the forward ends; else they are converted and released, as
            when they are written to a file.
        store: the precision that they are converted to; None: none.
        device: `cpu` or `cuda`, whose kernels allocate.
        on_their_way: values are copied as a GPU does, with so many copies on their way to the host;
            0: none.
        of_window: rows of a window that are copied at most; None: all.
        shorten: long windows are not traced chunk by chunk: the KV cache is filled, then the last
            two steps run.
        inputs: what the model reads beside token ids, in one pass, such as the pixels of images;
            real tensors, of which floats keep their shapes alone, and others their values.

    Returns:
        The peak, and all births and ends of storages on the way.
    """
    known, described = inputs is not None, fake.architecture
    config = described.model.config

    def once() -> tuple[Peak, LiveStorages]:
        described.pass_state.restore()  # one of another length may have left something
        values = known or has_values(config)
        with fake.mode, shapes_only(values), images_placed(described.model, known):
            count = workload.windows * workload.tokens
            # with values where these are known
            ids = torch.arange(count).reshape(workload.windows, workload.tokens) * 0
            shapes = {
                name: torch.empty(value.shape, dtype=value.dtype)
                if value.is_floating_point()
                else value
                for name, value in (inputs or {}).items()
            }
            return run(
                described,
                ids,
                workload,
                points,
                held,
                store,
                device,
                shorten,
                on_their_way,
                of_window,
                shapes,
            )

    return with_values_if_needed(config, once)


def parts(peak: Peak) -> PeakBytes:
    """The bytes of a peak by category.

    Args:
        peak: of `trace`.

    Returns:
        Bytes; what has none of these categories is left out.
    """
    found = peak.by_category
    return PeakBytes(
        *(found.get(category, 0) for category in (KV_CACHE, CAPTURED, TEMPORARIES, LOGITS))
    )


def run(
    described: Architecture,
    ids: torch.Tensor,
    workload: Workload,
    points: Sequence[HookPoint],
    held: bool = False,
    store: str | None = None,
    device: str = "cpu",
    shorten: bool = False,
    on_their_way: int = 0,
    of_window: int | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Peak, LiveStorages]:
    """`trace` on a model as it is, real or fake: with real weights it measures what `trace`
    predicts.

    Args:
        described: the architecture of the model.
        ids: token ids, (windows, positions) int64.
        workload: as of `trace`; so are the others.
        points: the hook points to read.
        held: their values are held until the forward ends.
        store: the precision that they are converted to; None: none.
        device: `cpu` or `cuda`.
        shorten: fill the KV cache instead of running all chunks.
        on_their_way: copies on their way to the host.
        of_window: rows of a window that are copied at most; None: all.
        inputs: what the model reads beside token ids, in one pass.

    Returns:
        The peak, and all births and ends of storages on the way.
    """
    live = LiveStorages(inside=CPU_KERNELS) if device == "cpu" else LiveStorages(whole=CUDA_KERNELS)
    live.ignore([ids, *described.model.parameters(), *described.model.buffers()])
    kept: list[tuple[HookPoint, torch.Tensor]] = []
    by_name = {p.name: p for p in points}
    dtype = torch_dtype(store) if store else None
    leaving: deque[torch.Tensor] = deque()

    def sink(name: str, value: torch.Tensor) -> None:
        if by_name[name].of_document:
            value = value[:, -1:]
        if on_their_way and dtype is not None:
            rows = value.transpose(1, 2) if by_name[name].over_keys else value
            leaving.append(rows[:, :of_window].to(dtype, copy=True))
            live.mark(leaving[-1], CAPTURED)
            if len(leaving) > on_their_way:
                leaving.popleft()
        elif held:
            live.mark(value, CAPTURED)
            kept.append((by_name[name], value))
        elif dtype is not None:
            live.mark(value.to(dtype), CAPTURED)

    steps = workload.steps
    streamed = len(steps) > 1
    taps = Taps(described, list(points), sink) if points else nullcontext()
    kernels = nullcontext() if device == "cpu" else traced_as_cuda()
    with torch.inference_mode(), kernels, taps as opened, live:
        forward = opened.run if opened is not None else described.model
        if not streamed:
            return _one_pass(forward, ids, live, described, inputs or {}), live
        cache = MarkedCache(config=described.model.config)
        cache.live = live
        first = 0
        for number, size in enumerate(steps):
            # Only the last two steps can be the peak, since the cache grows with each and the last
            # step may be a short one. The first step fills the cache with layers to copy from.
            if shorten and 0 < number < len(steps) - 2:
                continue
            if shorten and number == len(steps) - 2 and number > 1:
                skipped = workload.chunk_size * (number - 1)
                grow_cache(cache, skipped, workload.chunk_size)
                distinct = {
                    value.untyped_storage()._cdata: (point, value)
                    for point, value in kept[: len(points)]
                }
                for point, value in distinct.values():
                    # a view keeps the whole of what it is a part of; keys: two chunks, then one
                    # more in each next step
                    keys = (
                        (3 * workload.chunk_size + skipped) / 2 / workload.chunk_size
                        if point.over_keys
                        else 1
                    )
                    whole = value.untyped_storage().nbytes() // value.element_size()
                    grown = value.new_empty(int(whole * keys) // workload.chunk_size * skipped)
                    kept.append((point, grown))
                    live.mark(grown, CAPTURED)
                first = len(live.events)
            start = workload.chunk_size * number
            output = forward(
                input_ids=ids[:, start : start + size],
                use_cache=True,
                **{cache_name(described.model): cache},
            )
            del output
        peak = live.peak(first)
        del cache
        return peak, live


def _one_pass(
    forward: Any,
    ids: torch.Tensor,
    live: LiveStorages,
    described: Architecture,
    given: Mapping[str, torch.Tensor],
) -> Peak:
    """One pass, with a source as long as the window where it is a decoder's; behind an encoder of
    audio the target is no longer than the decoder takes.
    """
    inputs = {} if looks_causal(described) or given else {"attention_mask": _padding_mask(ids)}
    inputs |= given
    more: dict[str, Any] = {}
    if source_of(described.model.config):
        limit = longest_target(described.model.config) or ids.shape[1]
        more, ids = {SOURCE_ROWS: ids.shape[1]}, ids[:, :limit]
    elif described.side == "decoder":
        inputs |= {SOURCE_IDS: ids, SOURCE_MASK: _padding_mask(ids)}
    live.ignore(list(inputs.values()))
    output = forward(input_ids=ids, use_cache=False, **inputs, **more)
    if getattr(output, "logits", None) is not None:
        live.mark(output.logits, LOGITS)
    return live.peak()


def _padding_mask(ids: torch.Tensor) -> torch.Tensor:
    """The mask of a batch whose last window has padding: a model may leave out one of ones."""
    mask = torch.ones_like(ids)
    mask[-1:, 1:][:, -1:] = 0
    return mask


def grow_cache(cache: PrefillCache, tokens: int, chunk_size: int) -> None:
    """Add tokens to a KV cache that holds one chunk, as so many steps would have done.

    Args:
        cache: which grows; its tensors stay without values.
        tokens: to add.
        chunk_size: of them, those of the last step.
    """
    for length in (tokens - chunk_size, chunk_size):
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if (
                length > 0
                and isinstance(keys, torch.Tensor)
                and isinstance(values, torch.Tensor)
                and keys.ndim == 4
            ):
                cache.update(longer_tensor(keys, length), longer_tensor(values, length), index)
                if (indexer := getattr(layer, "indexer_keys", None)) is not None:
                    new = indexer.new_empty(len(indexer), length, indexer.shape[2])
                    cache.update_indexer(new, index)


def longer_tensor(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Make keys or values of another length.

    Args:
        tensor: (batch, heads, position, head size).
        length: positions.

    Returns:
        (batch, heads, length, head size), without values.
    """
    return tensor.new_empty(*tensor.shape[:2], length, tensor.shape[3])


def _cpu_attention_buffers(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *_: Any,
) -> int:
    """Bytes that the fused CPU attention takes within itself, as ATen's FlashAttentionKernel.cpp:
    for each thread, and where the processor multiplies tiles of 16 bits (AMX), for a copy of keys
    and values in the order that it wants."""
    (windows, heads, tokens, width), size = query.shape, query.element_size()
    rows = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    kv_heads, keys = key.shape[1], key.shape[2]
    columns, float_bytes, threads = min(512, keys), 4, torch.get_num_threads()
    own = float_bytes * (rows * columns + 2 * rows + rows * width)
    if query.dtype == torch.float32:
        return own * threads
    fewest, least_gain = (64, 4) if query.dtype == torch.bfloat16 else (16, 1)
    packs = multiplies_tiles(query.dtype) and min(tokens, keys) >= fewest
    if packs:  # only where products outnumber the copies by so much
        slices = (windows * heads * -(-tokens // rows) + threads - 1) // threads
        seen = min(tokens, keys) if causal else keys
        packs = slices * rows * seen >= least_gain * windows * kv_heads * keys
    if not packs:
        return (own + size * rows * columns) * threads
    blocks, tail = divmod(keys - 1, columns)
    padded = blocks * _even(columns) + _even(tail + 1)
    copies = size * windows * kv_heads * (_even(width) * keys + padded * width)
    own += size * (
        rows * _even(columns) + columns * width + (rows * _even(width) if width % 2 else 0)
    )
    return own * threads + copies


def _even(count: int) -> int:
    """Where the kernel takes two at a time."""
    return count + count % 2


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies tiles of a 16-bit type, and PyTorch makes use of it.

    Args:
        dtype: bfloat16 or float16.

    Returns:
        True with Intel's AMX for that type, and oneDNN enabled.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return (
        torch.cpu._is_amx_tile_supported()
        if dtype == torch.bfloat16
        else torch.cpu._is_amx_fp16_supported()
    )


CUDA_KERNELS = (torch.ops.aten.softmax.int,)  # with a dtype: half in, float out, in one kernel

CPU_KERNELS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _cpu_attention_buffers,
    torch.ops.aten.convolution.default: convolution_buffers,
}
