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
    >>> torch.allclose(whole["blocks.1.hook_resid_post"], states["blocks.1.hook_resid_post"], atol=1e-5)
    True
"""  # noqa: E501

import gc
import html
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from theloom.devices import accelerator
from theloom.errors import InputError, ModelError
from theloom.extraction import padding, request
from theloom.extraction.padding import PaddedTokens, Tokens
from theloom.extraction.request import Request, ask
from theloom.hooks.blocks import Architecture
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.precision import TOLERANCE, Resolved, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, repr=False)
class HiddenStates(Mapping[str, torch.Tensor]):
    """The result of an extraction: a mapping from hook names to tensors.

    Attributes:
        hidden_states: By hook name, in the order of the forward pass, a tensor [batch, position, …]
            on the model's device, in the dtype of the forward pass. Attention scores and patterns
            are [batch, head, position, key].
        attention_mask: [batch, position], bool, on the CPU: true for tokens, false for padding.
        start: The position of a chunk's first token, counted from the first token of its row; 0 for
            a result that is no chunk.
        precision: The requested and the used precision with each fallback, where one was requested.
        points: The hook points, in the order of `hidden_states`.
    """

    hidden_states: dict[str, torch.Tensor]
    attention_mask: torch.Tensor
    start: int
    precision: Resolved | None
    points: tuple[HookPoint, ...]
    rows: PaddedTokens

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.hidden_states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.hidden_states)

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {tuple(value.shape)}" for name, value in self.hidden_states.items()
        )
        return f"HiddenStates({shapes})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td>"
            f"<td>{' × '.join(map(str, value.shape))}</td><td>{value.dtype}</td></tr>"
            for name, value in self.hidden_states.items()
        )
        heading = "<tr><th style='text-align:left'>hook point</th><th>shape</th><th>dtype</th></tr>"
        return f"<table>{heading}{cells}</table>"


def extract_hidden_states(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
) -> HiddenStates:
    """Extract hidden states in one forward pass, in eval mode and without gradients.

    Args:
        model: A causal LM, base model or encoder of `transformers`.
        tokens: Token ids [batch, position] or [position], or a tokenizer's output.
        hooks: Hook points, by name or glob; default: the residual after every block.
        layers: Blocks whose `hook_resid_post` is requested.
        attention_mask: [batch, position], 0 where a column is padding.

    Returns:
        The hidden states; the tensors are copies, which autograd takes as inputs.

    Raises:
        InputError: The tokens or the mask cannot be a batch.
        HookError: The model lacks a requested hook point.
        ModelError: The model cannot be run on these tokens.
    """
    requested = ask(model, tokens, hooks, layers, attention_mask)
    return _in_one_pass(requested, None)


def extract_streaming(
    model: "PreTrainedModel",
    tokens: Tokens,
    chunk_size: int = 512,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
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

    Yields:
        Chunks of [batch, up to chunk_size, …]. Attention scores and patterns of a chunk are
        [batch, head, position, keys so far].

    Raises:
        InputError: The tokens or the mask cannot be a batch.
        HookError: The model lacks a requested hook point.
        ModelError: The chunks would differ from one pass. This is tried on the model itself, with
            a few tokens, before the first chunk.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, found {chunk_size}")
    requested = ask(model, tokens, hooks, layers, attention_mask)
    requested.check_alike()
    if (longest := requested.rows.ids.shape[1]) > chunk_size:
        request.check_streams(requested.architecture, longest)
    return _chunks(requested, chunk_size)


def collect_streaming_results(chunks: Iterable[HiddenStates]) -> HiddenStates:
    """Join the chunks of `extract_streaming`.

    Memory for all positions is allocated at the first chunk and chunks are freed one by one, so at
    most one chunk is in memory on top of the result.

    Args:
        chunks: The chunks, in order. If they end early, `attention_mask` marks the missing rows.

    Returns:
        What `extract_hidden_states` returns for the same tokens.

    Raises:
        InputError: There is no chunk.
    """
    whole: dict[str, torch.Tensor] = {}
    points: tuple[HookPoint, ...] = ()
    rows, end = None, 0
    for chunk in chunks:
        rows, points = chunk.rows, chunk.points
        for point in points:
            value = chunk.hidden_states[point.name]
            if point.name not in whole:
                whole[point.name] = padding.empty(value, point, rows)
            padding.put_back(value, point, rows, chunk.start, whole[point.name])
            del value
        end = max(end, chunk.start + chunk.attention_mask.shape[1])
        del chunk  # before the next is made
    if rows is None:
        raise InputError(
            "there are no chunks to collect: the generator has been used, or was closed"
        )
    return HiddenStates(whole, rows.mask_given(end), 0, None, points, rows)


def extract_inference_optimized(
    model: "PreTrainedModel",
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    precision: str | None = None,
    clear_cache: bool = False,
    hooks: Sequence[str] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
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

    Returns:
        The hidden states, in the dtype of that precision.

    Raises:
        InputError: The tokens or the mask cannot be a batch.
        HookError: The model lacks a requested hook point.
        ModelError: The model cannot be run at that precision.
    """
    requested = ask(model, tokens, hooks, layers, attention_mask)
    try:
        return _in_one_pass(
            requested, None if precision is None else _resolved(requested.architecture, precision)
        )
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

    Returns:
        The hidden states, with their graph.

    Raises:
        InputError: The tokens or the mask cannot be a batch.
        HookError: The model lacks a requested hook point.
        ModelError: No weight that the hidden states depend on requires a gradient.
    """
    from theloom.extraction.gradient_checkpointing import Checkpointed
    from theloom.hooks.taps import Taps
    from theloom.model.forward import start_afresh

    requested = ask(model, tokens, hooks, layers, attention_mask)
    blocks, rows = requested.architecture.blocks, requested.rows
    requested.check_alike()
    kept_whole = {p.block for p in requested.points if p.value not in RESIDUALS}
    again = [block for number, block in enumerate(blocks) if number not in kept_whole]
    kept = _Kept(requested, whole=True, graph=True)
    inputs = {name: value.to(model.device) for name, value in requested.inputs().items()}
    taps = Taps(requested.architecture, requested.points, kept.keep)
    start_afresh(requested.architecture)
    with torch.enable_grad(), Checkpointed(again, use_reentrant), taps:
        taps.run(input_ids=rows.ids.to(model.device), use_cache=False, **inputs)
    if not any(value.requires_grad for value in kept.values.values()):
        raise ModelError(
            f"{type(model).__name__}: none of the hidden states depends on a weight that requires "
            "a gradient; use model.requires_grad_(), or extract_hidden_states where there is no "
            "backward pass"
        )
    return kept.result(0, None)


class _Kept:
    """The values of one forward pass, copied as they arise and, if they are the whole, in the
    columns given.
    """

    def __init__(self, requested: Request, whole: bool, graph: bool = False) -> None:
        self._requested, self._whole, self._graph = requested, whole, graph
        self._points = {p.name: p for p in requested.points}
        self.rows: list[int] | None = None  # those that run now; all where it is None
        self.values: dict[str, torch.Tensor] = {}

    def keep(self, name: str, value: torch.Tensor) -> None:
        # outside of inference mode, so that the copy can be an input of autograd
        with (
            nullcontext() if self._graph else torch.inference_mode(False),
            torch.set_grad_enabled(self._graph),
        ):
            if self._whole and not self._requested.rows.as_given:
                point, rows = self._points[name], self._requested.rows
                if name not in self.values:
                    self.values[name] = padding.empty(value, point, rows)
                running = rows if self.rows is None else rows.only(self.rows)
                padding.put_back(value, point, running, 0, self.values[name], self.rows)
            else:
                self.values[name] = value.clone()

    def result(self, start: int, resolved: Resolved | None) -> HiddenStates:
        """What was kept, which is then no longer here."""
        requested, values, self.values = self._requested, self.values, {}
        rows = requested.rows
        states = {p.name: values.pop(p.name) for p in requested.points}
        mask = rows.mask_given()
        if not self._whole:
            some = next(p for p in requested.points)
            mask = rows.mask()[:, start : start + states[some.name].shape[some.position_axis]]
            if rows.uneven:
                for point in requested.points:
                    padding.blank(states[point.name], point, rows, start)
        return HiddenStates(states, mask, start, resolved, tuple(requested.points), rows)


def _in_one_pass(requested: Request, resolved: Resolved | None) -> HiddenStates:
    from theloom.extraction.casting import InPrecision
    from theloom.hooks.blocks import evaluating
    from theloom.hooks.taps import Taps
    from theloom.model.forward import steps

    described = requested.architecture
    kept, groups = _Kept(requested, whole=True), requested.alike()
    parts = [requested.only(group) for group in groups] if len(groups) > 1 else [requested]
    inputs = [part.inputs() for part in parts]  # before any tap: it may run the model
    cast = (
        nullcontext()
        if resolved is None
        else InPrecision(described, torch_dtype(resolved.resolved))
    )
    with evaluating(described.model), cast, Taps(described, requested.points, kept.keep) as taps:
        for group, part, more in zip(groups, parts, inputs, strict=True):
            kept.rows = group if len(groups) > 1 else None
            for _ in steps(taps, part.rows.ids, part.rows.ids.shape[1], inputs=more):
                pass
    return kept.result(0, resolved)


def _chunks(requested: Request, chunk_size: int) -> Generator[HiddenStates, None, None]:
    from theloom.hooks.blocks import evaluating
    from theloom.hooks.taps import Taps
    from theloom.model.forward import steps

    kept = _Kept(requested, whole=False)
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
