"""Extract hidden states of a `transformers` model from Python, without files.

The functions take a model as it is (a causal LM, a base model or an encoder) and leave it unchanged:
no hook stays on it, and its weights, attention implementation, training mode and checkpointing flags
are restored, also after an error and between the chunks of a stream.

Common arguments:

- `tokens`: token ids [batch, position] or [position], lists of them, or a tokenizer's output.
- `attention_mask`: [batch, position], 0 where a column is padding, on the left or the right of a
  row; a tokenizer's output has its own. Rows of padding are zeros in the result (attention scores
  -inf). Special tokens are not padding unless the mask marks them.
- `hooks`: names of hook points, or globs; `blocks.-1.` is the last block, and an empty list selects
  every hook point of the model. Default: the residual after every block.
- `layers`: short for the `hook_resid_post` of these blocks; negative numbers count from the end.
- `rows`: the rows to return: an expression as `rows.keep` takes it, of `all`, `first`, `last`,
  `last(n)` and `[a:b]` with `&`, `|`, `~` and brackets; `special` where `tokens` is a tokenizer's
  output with `special_tokens_mask`, and `assistant` where it has `assistant_masks`. Or a mapping,
  `{"keep": "~[:1]", "pool": "mean"}`, whose `pool` (`mean`, `max`, `sum`, `first`, `last`) makes the
  kept tokens of each row of `tokens` one row, in FP32. Tensors are then [row, …], and
  `HiddenStates.rows` tells which token each row is of. No more than these rows is copied.
- `progress`: show tqdm's bar.

The forward pass ends after the deepest requested hook point.

Examples:
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=32)
    >>> model = LlamaModel(LlamaConfig(num_attention_heads=2, **sizes))
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> states = extract_hidden_states(model, tokens, layers=[-1])
    >>> states["blocks.1.hook_resid_post"].shape
    torch.Size([1, 4, 16])
    >>> chunks = extract_streaming(model, tokens, chunk_size=2, layers=[-1])
    >>> whole = collect_streaming_results(chunks)
    >>> pooled = extract_hidden_states(model, tokens, rows={"keep": "~[:1]", "pool": "mean"})
    >>> pooled["blocks.1.hook_resid_post"].shape, pooled.rows.batch.tolist()
    (torch.Size([1, 16]), [0])
    >>> torch.allclose(whole["blocks.1.hook_resid_post"], states["blocks.1.hook_resid_post"], atol=1e-5)
    True
"""  # noqa: E501

import gc
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from theloom.devices import accelerator
from theloom.errors import InputError, ModelError
from theloom.extraction import padding, request
from theloom.extraction.kept import Kept
from theloom.extraction.padding import Tokens
from theloom.extraction.request import Request, ask
from theloom.extraction.result import HiddenStates, Rows
from theloom.hooks.blocks import Architecture
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.precision import TOLERANCE, Resolved, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def extract_hidden_states(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    rows: str | Mapping[str, str] | None = None,
    progress: bool = False,
) -> HiddenStates:
    """Extract hidden states in one forward pass, in eval mode and without gradients.

    Args:
        model: A causal LM, base model or encoder of `transformers`.
        tokens: Token ids [batch, position] or [position], or a tokenizer's output.
        hooks: Hook points, by name or glob; default: the residual after every block.
        layers: Blocks whose `hook_resid_post` is requested.
        attention_mask: [batch, position], 0 where a column is padding.
        rows: Which tokens' rows are returned, as `rows.keep` takes them ("last & ~special",
            "[1:-1]"), or {"keep": …, "pool": …}; None: all, in the columns of the tokens.
        progress: Show a bar of the progress (tqdm's, in a notebook the notebook's).

    Returns:
        The hidden states; the tensors are copies, which autograd takes as inputs.

    Raises:
        InputError: The tokens or the mask cannot be a batch, or `rows` keeps none of them.
        ConfigError: `rows` is an expression that does not parse.
        HookError: The model lacks a requested hook point.
        ModelError: The model cannot be run on these tokens.
    """
    requested = ask(model, tokens, hooks, layers, attention_mask, rows)
    return _in_one_pass(requested, None, progress)


def extract_streaming(
    model: "PreTrainedModel",
    tokens: Tokens,
    chunk_size: int = 512,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    rows: str | Mapping[str, str] | None = None,
    progress: bool = False,
) -> Generator[HiddenStates, None, None]:
    """Extract hidden states chunk by chunk through the KV cache; equal to one pass.

    Between chunks only the KV cache is in memory: a chunk is freed once the caller drops it.
    Padding on the left is skipped: chunks count positions from the first token of each row. Between
    chunks the model can be used otherwise.

    Args:
        model: A causal LM, base model or encoder of `transformers`.
        tokens: Token ids [batch, position] or [position], or a tokenizer's output.
        chunk_size: Tokens of a chunk.
        hooks: Hook points, by name or glob; default: the residual after every block.
        layers: Blocks whose `hook_resid_post` is requested.
        attention_mask: [batch, position], 0 where a column is padding.
        rows: Which tokens' rows are returned, as `rows.keep` takes them ("last & ~special",
            "[1:-1]"), or {"keep": …, "pool": …}; None: all, in the columns of the tokens.
        progress: Show a bar of the progress (tqdm's, in a notebook the notebook's).

    Yields:
        Chunks of [batch, up to chunk_size, …]. Attention scores and patterns of a chunk are
        [batch, head, position, keys so far]. With `rows`, the rows of a chunk's own tokens; a
        pooled one comes with the last token that it is made of.

    Raises:
        InputError: The tokens or the mask cannot be a batch, or `rows` keeps none of them.
        ConfigError: `rows` is an expression that does not parse.
        HookError: The model lacks a requested hook point.
        ModelError: The chunks would differ from one pass. This is tried on the model itself, with
            a few tokens, before the first chunk.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, found {chunk_size}")
    requested = ask(model, tokens, hooks, layers, attention_mask, rows)
    requested.check_alike()
    if (longest := requested.rows.ids.shape[1]) > chunk_size:
        request.check_streams(requested.architecture, longest)
    return _chunks(requested, chunk_size, progress)


def collect_streaming_results(chunks: Iterable[HiddenStates]) -> HiddenStates:
    """Join the chunks of `extract_streaming`.

    Memory for all positions is allocated at the first chunk and chunks are freed one by one, so at
    most one chunk is in memory on top of the result.

    Args:
        chunks: The chunks, in order. If they end early, `attention_mask` marks the missing rows; of
            a call with `rows`, those that had come are there.

    Returns:
        What `extract_hidden_states` returns for the same tokens.

    Raises:
        InputError: There is no chunk.
    """
    whole: dict[str, torch.Tensor] = {}
    points: tuple[HookPoint, ...] = ()
    padded, end, there = None, 0, list[Rows]()
    for chunk in chunks:
        padded, points = chunk.padded, chunk.points
        for point in points:
            value = chunk.hidden_states[point.name]
            if chunk.rows is not None:
                if point.name not in whole:
                    whole[point.name] = value.new_empty((chunk.rows.total, *value.shape[1:]))
                whole[point.name][chunk.rows.number.to(value.device)] = value
            else:
                if point.name not in whole:
                    whole[point.name] = padding.empty(value, point, padded)
                padding.put_back(value, point, padded, chunk.start, whole[point.name])
            del value
        there += [] if chunk.rows is None else [chunk.rows]
        end = max(end, chunk.start + chunk.attention_mask.shape[1])
        del chunk  # before the next is made
    if padded is None:
        raise InputError(
            "there are no chunks to collect: the generator has been used, or was closed"
        )
    rows = Rows.joined(there) if there else None
    if rows is not None and len(rows) < rows.total:
        whole = {name: value[rows.number.to(value.device)] for name, value in whole.items()}
    return HiddenStates(whole, padded.mask_given(end), 0, None, points, padded, rows)


def extract_inference_optimized(
    model: "PreTrainedModel",
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    precision: str | None = None,
    clear_cache: bool = False,
    hooks: Sequence[str] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    rows: str | Mapping[str, str] | None = None,
    progress: bool = False,
) -> HiddenStates:
    """Extract hidden states at another precision, as if the model were loaded at it.

    The weights stay unchanged. Additional memory is a converted copy of what lies outside the
    blocks (token embedding and norms, not the LM head) and of one block at a time; the copy is made
    for each call, so load the model at that precision for many calls.

    Args:
        model: A causal LM, base model or encoder of `transformers`.
        tokens: Token ids [batch, position] or [position], or a tokenizer's output.
        layers: Blocks whose `hook_resid_post` is requested.
        precision: auto, fp32, fp16 or bf16; None: the model's own. Where the device lacks it, the
            fallback (BF16, FP16, FP32) is logged and recorded in the result.
        clear_cache: Return unused memory of CUDA's allocator to the driver afterwards.
        hooks: Hook points, by name or glob; default: the residual after every block.
        attention_mask: [batch, position], 0 where a column is padding.
        rows: Which tokens' rows are returned, as `rows.keep` takes them ("last & ~special",
            "[1:-1]"), or {"keep": …, "pool": …}; None: all, in the columns of the tokens.
        progress: Show a bar of the progress (tqdm's, in a notebook the notebook's).

    Returns:
        The hidden states, in the dtype of that precision.

    Raises:
        InputError: The tokens or the mask cannot be a batch, or `rows` keeps none of them.
        ConfigError: `rows` is an expression that does not parse.
        HookError: The model lacks a requested hook point.
        ModelError: The model cannot be run at that precision.
    """
    requested = ask(model, tokens, hooks, layers, attention_mask, rows)
    try:
        described = requested.architecture
        resolved = None if precision is None else _resolved(described, precision)
        return _in_one_pass(requested, resolved, progress)
    finally:
        if clear_cache:
            gc.collect()
            accelerator.empty_cache(requested.architecture.model.device)


def extract_with_checkpointing(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    use_reentrant: bool = False,
    rows: str | Mapping[str, str] | None = None,
    progress: bool = False,
) -> HiddenStates:
    """Extract hidden states with their graph, recomputing each block in the backward pass.

    Gradients equal those of the plain forward. Dropout is active if the model is in training mode;
    do not change its mode or weights before the backward pass. A block of which an inner hook point
    is requested keeps its activations.

    Args:
        model: A causal LM, base model or encoder of `transformers`.
        tokens: Token ids [batch, position] or [position], or a tokenizer's output.
        hooks: Hook points, by name or glob; default: the residual after every block.
        layers: Blocks whose `hook_resid_post` is requested.
        attention_mask: [batch, position], 0 where a column is padding.
        use_reentrant: As in `torch.utils.checkpoint`; the reentrant variant supports
            `backward()` but not `torch.autograd.grad`.
        rows: Which tokens' rows are returned, as `rows.keep` takes them ("last & ~special",
            "[1:-1]"), or {"keep": …, "pool": …}; None: all, in the columns of the tokens.
        progress: Show a bar of the progress (tqdm's, in a notebook the notebook's).

    Returns:
        The hidden states, with their graph.

    Raises:
        InputError: The tokens or the mask cannot be a batch, or `rows` keeps none of them.
        ConfigError: `rows` is an expression that does not parse.
        HookError: The model lacks a requested hook point.
        ModelError: No weight that the hidden states depend on requires a gradient, or the model's
            blocks cannot be run again.
    """
    from theloom.extraction.gradient_checkpointing import Checkpointed
    from theloom.hooks.taps import Taps
    from theloom.model.forward import start_afresh

    requested = ask(model, tokens, hooks, layers, attention_mask, rows)
    blocks = requested.architecture.blocks
    if requested.architecture.ends:
        raise ModelError(
            f"{type(model).__name__}: the residual stream is not what goes into and out of its "
            "blocks, which cannot be run again in the backward pass; use extract_hidden_states"
        )
    requested.check_alike()
    kept_whole = {p.block for p in requested.points if p.value not in RESIDUALS}
    again = [b for number, b in enumerate(blocks) if number not in kept_whole]
    again = list(dict.fromkeys(again))  # a module may be several blocks
    kept = Kept(requested, whole=True, graph=True, progress=progress)
    inputs = {name: value.to(model.device) for name, value in requested.inputs().items()}
    taps = Taps(requested.architecture, requested.points, kept.keep)
    start_afresh(requested.architecture)
    with torch.enable_grad(), Checkpointed(again, use_reentrant), taps:
        taps.run(input_ids=requested.rows.ids.to(model.device), use_cache=False, **inputs)
    if not any(value.requires_grad for value in kept.values.values()):
        raise ModelError(
            f"{type(model).__name__}: none of the hidden states depends on a weight that requires "
            "a gradient; use model.requires_grad_(), or extract_hidden_states where there is no "
            "backward pass"
        )
    return kept.result(0, None)


def _in_one_pass(requested: Request, resolved: Resolved | None, progress: bool) -> HiddenStates:
    from theloom.extraction.casting import InPrecision
    from theloom.hooks.layouts.trial import evaluating
    from theloom.hooks.taps import Taps
    from theloom.model.forward import steps

    described = requested.architecture
    kept, groups = Kept(requested, whole=True, progress=progress), requested.alike()
    kept.passes(len(groups))
    parts = [requested.only(group) for group in groups] if len(groups) > 1 else [requested]
    inputs = [part.inputs() for part in parts]  # before any tap: it may run the model
    cast = (
        nullcontext()
        if resolved is None
        else InPrecision(described, torch_dtype(resolved.resolved))
    )
    with evaluating(described.model), cast, Taps(described, requested.points, kept.keep) as taps:
        for group, part, more in zip(groups, parts, inputs, strict=True):
            kept.running = group if len(groups) > 1 else None
            for _ in steps(taps, part.rows.ids, part.rows.ids.shape[1], inputs=more):
                pass
    return kept.result(0, resolved)


def _chunks(
    requested: Request, chunk_size: int, progress: bool
) -> Generator[HiddenStates, None, None]:
    from theloom.hooks.layouts.trial import evaluating
    from theloom.hooks.taps import Taps
    from theloom.model.forward import steps

    kept = Kept(requested, whole=False, progress=progress)
    taps = Taps(requested.architecture, requested.points, kept.keep)
    passes = steps(taps, requested.rows.ids, chunk_size, inputs=requested.inputs())
    while True:
        with evaluating(requested.architecture.model), taps:
            start = next(passes, None)
        if start is None:
            return
        yield kept.result(start, None)


def _resolved(described: Architecture, requested: str) -> Resolved:
    from theloom.devices import gpu

    if requested not in ("auto", *TOLERANCE):
        raise InputError(f"precision: {requested!r} is not one of auto, {', '.join(TOLERANCE)}")
    return gpu.precision_on(described.model.device, requested)
