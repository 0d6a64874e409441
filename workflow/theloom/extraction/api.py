"""Hidden states of any transformers model, from Python: whole, in chunks, at another precision, or
with their graph.

The functions take a model as it is (a causal LM, a base model, an encoder) and leave it so: no hook
stays on it, and weights, attention implementation, training mode and checkpointing flags are what
they were, also after an error and between the chunks of a stream. Tokens are ids (batch, position),
(position,), lists, or what a tokenizer returns. `attention_mask` is 0 where a column is padding, on
the left or on the right of a row; a tokenizer's output brings its own. Rows of padding come back as
zeros (attention scores as -inf), and the mask with them. Special tokens are not padding unless the
mask says so.

Hook points are requested by `hooks`, filter entries as in the config (an exact name, a glob,
`blocks.-1.` for the last block; an empty list is every hook point of the model), by `layers`, short
for their hook_resid_post (negative ones count from the end), or by both. By default it is the
residual after every block. The forward ends after the deepest.
"""

import gc
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from theloom.errors import InputError, ModelError
from theloom.extraction import padding, request
from theloom.extraction.padding import Rows, Tokens
from theloom.extraction.request import Request, ask
from theloom.hooks.blocks import Architecture
from theloom.hooks.points import RESIDUALS, HookPoint
from theloom.precision import TOLERANCE, Resolved, choose_precision, cpu_has_fp16, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, repr=False)
class HiddenStates(Mapping[str, torch.Tensor]):
    """What an extraction gives; it is also a mapping from hook names to tensors.

    `hidden_states`: by hook name, in the order of the forward pass, a tensor [batch, position, …]
    on the model's device in the dtype of the forward pass; attention scores and patterns are
    [batch, head, position, key]. `attention_mask`: [batch, position], on the CPU: true where a row
    is a token's, false where it is padding's. `start`: of a chunk, the position of its first token
    in its row, counted from the row's first token: padding on the left is not streamed. 0
    otherwise. `precision`: where one was requested, what was requested, what was used, and each
    fallback.
    """

    hidden_states: dict[str, torch.Tensor]
    attention_mask: torch.Tensor
    start: int
    precision: Resolved | None
    points: tuple[HookPoint, ...]
    rows: Rows

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


def extract_hidden_states(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
) -> HiddenStates:
    """Hidden states of one forward pass in eval mode, without gradients: [batch, position, …] by
    hook name.

    The tensors are copies of their own, which autograd takes as inputs. Raises InputError,
    HookError, ModelError.
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
    """Hidden states chunk by chunk through the KV cache: each [batch, up to chunk_size, …], equal
    to one pass.

    A chunk's memory is free once the caller has let go of it; what stays until the generator ends
    or is closed is the KV cache. Keys grow: attention scores and patterns of a chunk are [batch,
    head, position, keys so far]. Padding on the left is skipped: chunks count positions from each
    row's first token, and `collect_streaming_results` puts rows back to the columns of `tokens`.
    Between chunks the model is free for other use.

    Raises InputError, HookError, and ModelError for a model whose rows would not be those of one
    pass, before the first chunk; that is tried on the model itself, on a few tokens, once.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, found {chunk_size}")
    requested = ask(model, tokens, hooks, layers, attention_mask)
    if requested.rows.ids.shape[1] > chunk_size:
        request.check_streams(requested.architecture)
    return _chunks(requested, chunk_size)


def collect_streaming_results(chunks: Iterable[HiddenStates]) -> HiddenStates:
    """The chunks of `extract_streaming` as one result: what `extract_hidden_states` gives for the
    same tokens.

    Room for all positions is taken at the first chunk, and chunks are let go one by one, so that at
    most one is in memory beside the result. Where the chunks end early, the mask says which rows
    there are. Raises InputError where there is no chunk.
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
    """`extract_hidden_states` at another precision: auto, fp32, fp16 or bf16; None is the model's
    own.

    The values are those of the model loaded at that precision. The weights stay as they are: beside
    them there is a converted copy of what lies outside of the blocks (token embedding, norms; not
    the LM head) and of one block at a time, which is made anew for each call; for many calls load
    the model at that precision. Where the device lacks it, it falls back (BF16, FP16, FP32), which
    is logged and recorded on the result. `clear_cache` gives what CUDA's allocator holds unused
    back to the driver afterwards. Raises InputError, HookError, ModelError.
    """
    requested = ask(model, tokens, hooks, layers, attention_mask)
    try:
        return _in_one_pass(
            requested, None if precision is None else _resolved(requested.architecture, precision)
        )
    finally:
        if clear_cache:
            gc.collect()
            torch.cuda.empty_cache()


def extract_with_checkpointing(
    model: "PreTrainedModel",
    tokens: Tokens,
    hooks: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | Sequence[Any] | None = None,
    use_reentrant: bool = False,
) -> HiddenStates:
    """Hidden states with their graph, for a backward pass that computes each block again instead of
    keeping its inside.

    Gradients are those of the plain forward. Dropout acts where the model is in training mode; do
    not change its mode or weights before the backward. A block of which an inner hook point is
    requested keeps its inside, which is what was requested. `use_reentrant` is
    torch.utils.checkpoint's: the reentrant kind takes `backward()` but not `torch.autograd.grad`.
    Raises InputError, HookError, and ModelError where nothing requires a gradient.
    """
    from theloom.extraction.gradient_checkpointing import Checkpointed
    from theloom.hooks.taps import Taps

    requested = ask(model, tokens, hooks, layers, attention_mask)
    blocks, rows = requested.architecture.blocks, requested.rows
    kept_whole = {p.block for p in requested.points if p.value not in RESIDUALS}
    again = [block for number, block in enumerate(blocks) if number not in kept_whole]
    kept = _Kept(requested, whole=True, graph=True)
    inputs = {name: value.to(model.device) for name, value in requested.inputs().items()}
    taps = Taps(requested.architecture, requested.points, kept.keep)
    with torch.enable_grad(), Checkpointed(again, use_reentrant), taps:
        taps.run(input_ids=rows.ids.to(model.device), use_cache=False, **inputs)
    if not any(value.requires_grad for value in kept.values.values()):
        raise ModelError(
            f"{type(model).__name__}: none of the hidden states depends on a weight "
            "that requires a gradient; "
            "use model.requires_grad_(), or extract_hidden_states where there is no backward pass"
        )
    return kept.result(0, None)


class _Kept:
    """The values of one forward pass, copied as they arise and, if they are the whole, in the
    columns given.
    """

    def __init__(self, requested: Request, whole: bool, graph: bool = False) -> None:
        self._requested, self._whole, self._graph = requested, whole, graph
        self._points = {p.name: p for p in requested.points}
        self.values: dict[str, torch.Tensor] = {}

    def keep(self, name: str, value: torch.Tensor) -> None:
        # outside of inference mode, so that the copy can be an input of autograd
        with (
            nullcontext() if self._graph else torch.inference_mode(False),
            torch.set_grad_enabled(self._graph),
        ):
            if self._whole and not self._requested.rows.as_given:
                point, rows = self._points[name], self._requested.rows
                whole = padding.empty(value, point, rows)
                padding.put_back(value, point, rows, 0, whole)
                self.values[name] = whole
            else:
                self.values[name] = value.clone()

    def result(self, start: int, resolved: Resolved | None) -> HiddenStates:
        """What was kept, which is then no longer here."""
        requested, values, self.values = self._requested, self.values, {}
        rows = requested.rows
        found = {p.name: values.pop(p.name) for p in requested.points}
        mask = rows.mask_given()
        if not self._whole:
            some = next(p for p in requested.points)
            mask = rows.mask()[:, start : start + found[some.name].shape[some.position_axis]]
            if rows.uneven:
                for point in requested.points:
                    padding.blank(found[point.name], point, rows, start)
        return HiddenStates(found, mask, start, resolved, tuple(requested.points), rows)


def _in_one_pass(requested: Request, resolved: Resolved | None) -> HiddenStates:
    from theloom.extraction.casting import InPrecision
    from theloom.hooks.blocks import evaluating
    from theloom.hooks.taps import Taps
    from theloom.model.forward import steps

    described = requested.architecture
    inputs = requested.inputs()
    kept = _Kept(requested, whole=True)
    cast = (
        nullcontext()
        if resolved is None
        else InPrecision(described, torch_dtype(resolved.resolved))
    )
    with evaluating(described.model), cast, Taps(described, requested.points, kept.keep) as taps:
        for _ in steps(taps, requested.rows.ids, requested.rows.ids.shape[1], inputs=inputs):
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
    capability = gpu.compute_capability(described.model.device)
    fp16_here = cpu_has_fp16() if capability is None and requested == "fp16" else True
    return choose_precision(requested, capability, fp16_here)
