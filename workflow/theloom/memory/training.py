"""The memory of one training step, predicted.

A step is that of a causal language model with its head: forward with `labels` (the loss of
transformers, in FP32), backward, `torch.optim.AdamW`, gradients freed. It is the second step that
counts, when the optimiser has its states. The precision is one of three schemes:

- `fp32`: weights, gradients, both moments and computation in FP32: 16 bytes a parameter.
- `fp16` or `bf16` with `autocast`: weights (they are the FP32 master copy), gradients and moments
  in FP32, computation under `torch.autocast`: 16 bytes a parameter, and the 16-bit copies of the
  weights among the saved activations. A gradient scaler is not traced; it needs no memory of the
  model's size.
- `fp16` or `bf16` alone: everything in 16 bits, the moments too, as AdamW makes them: 8 bytes a
  parameter.

Against the CPU allocator (tests/memory/test_training.py): within 0.1%. What is not seen: the state
of the random generator that checkpointing keeps for each block, 5 kB of host memory. On CUDA
autocast keeps more operations in FP32 than on the CPU, whose lists are traced: with autocast the
figures are a lower bound there. The KV cache is off, as it should be.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from theloom.errors import ModelError
from theloom.memory import trace
from theloom.memory.storages import TEMPORARIES, LiveStorages, Peak
from theloom.model.fake import FakeModel, fake_model
from theloom.model.without_bytes.shapes_only import shapes_only
from theloom.precision import torch_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


WEIGHTS, GRADIENTS, OPTIMIZER_STATES = "weights", "gradients", "optimizer_states"
SAVED, LOGITS = "saved_activations", trace.LOGITS
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Recipe:
    """How a step is trained.

    `autocast` is the dtype of torch.autocast (fp16, bf16), or None. `foreach` is AdamW's: true on
    CUDA by default, with one temporary of the size of all weights; false on the CPU, with one of
    the size of the largest. `accumulated`: gradients of an earlier backward are held.
    """

    checkpointing: bool = False
    use_reentrant: bool = False
    autocast: str | None = None
    foreach: bool = True
    accumulated: bool = False


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step, by category: at the peak of each phase, and at the end of the
    forward.

    Categories: weights (with buffers), gradients, optimizer_states, saved_activations (what
    autograd keeps from forward to backward, but for logits), logits (and everything of their shape:
    the loss's temporaries and gradients, saved or not), temporaries (all else; a checkpointed
    block's recomputed activations too). Inputs are not counted.
    """

    phases: Mapping[str, Mapping[str, int]]
    after_forward: Mapping[str, int]

    @property
    def where(self) -> str:
        """The phase of the step's peak: forward, backward or optimizer."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def by_category(self) -> Mapping[str, int]:
        """Bytes of each category at the highest peak."""
        return self.phases[self.where]

    @property
    def peak(self) -> int:
        """Bytes at the highest peak."""
        return sum(self.by_category.values())

    @property
    def activations(self) -> int:
        """Bytes beyond weights, gradients and states: the more of those at the peaks of forward and
        backward.
        """
        resident = (WEIGHTS, GRADIENTS, OPTIMIZER_STATES)
        return max(
            sum(n for c, n in self.phases[p].items() if c not in resident) for p in PHASES[:2]
        )


def training_step(
    model_config: "PretrainedConfig",
    precision: str,
    windows: int,
    tokens: int,
    checkpointing: bool = False,
    autocast: bool = False,
    use_reentrant: bool = False,
    foreach: bool = True,
    accumulated: bool = False,
    device: str = "cpu",
) -> TrainingMemory:
    """Trace one step of training, without weights or a GPU.

    Args:
        model_config: of transformers.
        precision: of the weights, or of autocast: `fp32`, `fp16` or `bf16`.
        windows: how many in the batch.
        tokens: of each window.
        checkpointing: activations of blocks are recomputed in the backward pass.
        autocast: weights are FP32, and `precision` is that of torch.autocast.
        use_reentrant: of torch's checkpoints.
        foreach: of AdamW, as in `Recipe`.
        accumulated: gradients of an earlier backward are held.
        device: `cpu` or `cuda`, as of `trace.trace`; on cuda attention is taken to be fused with
            dropout too.

    Returns:
        Bytes by category.

    Raises:
        ModelError: autocast in FP32, or the model cannot be built.
    """
    if autocast and precision == "fp32":
        raise ModelError("autocast needs a precision of 16 bits: fp16 or bf16")
    fake = fake_model(model_config, "fp32" if autocast else precision, lm_head=True)
    recipe = Recipe(
        checkpointing, use_reentrant, precision if autocast else None, foreach, accumulated
    )
    return trace_step(fake, windows, tokens, recipe, device)


def trace_step(
    fake: FakeModel, windows: int, tokens: int, recipe: Recipe, device: str = "cpu"
) -> TrainingMemory:
    """`training_step` on a fake model with its head.

    Args:
        fake: the model, whose weights are of the precision that the recipe needs.
        windows: how many in the batch.
        tokens: of each window.
        recipe: how it is trained.
        device: `cpu` or `cuda`.

    Returns:
        Bytes by category.
    """
    with fake.mode, shapes_only(), _fused_dropout() if device == "cuda" else nullcontext():
        return measure(fake.model, torch.zeros(windows, tokens, dtype=torch.int64), recipe, device)


def measure(
    model: "PreTrainedModel", ids: torch.Tensor, recipe: Recipe, device: str = "cpu"
) -> TrainingMemory:
    """`training_step` on a model with its head, real or fake; it is left ready to train and with
    its weights.

    Args:
        model: which runs three steps at most.
        ids: token ids, (windows, tokens) int64.
        recipe: how it is trained.
        device: `cpu` or `cuda`.

    Returns:
        Bytes by category.
    """
    optimizer = prepare(model, recipe)
    live = _Step(ids.numel(), model.config.get_text_config().vocab_size, device)
    live.ignore([ids, *model.parameters(), *model.buffers()])
    weights = {
        t.untyped_storage()._cdata: t.untyped_storage()
        for t in [*model.parameters(), *model.buffers()]
    }
    resident = sum(storage.nbytes() for storage in weights.values())
    ends: list[int] = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: live.mark(p.grad, GRADIENTS))
        for p in model.parameters()
    ]
    try:
        with live:
            step(model, optimizer, ids, replace(recipe, accumulated=False), live)
            for state in optimizer.state.values():
                for tensor in state.values():
                    live.mark(tensor, OPTIMIZER_STATES)
            if recipe.accumulated:
                _forward(model, ids, recipe, live).backward()
            first = len(live.events)
            step(model, optimizer, ids, recipe, live, lambda phase: ends.append(len(live.events)))
    finally:
        for hook in hooks:
            hook.remove()
    spans = zip(PHASES, [first, *ends[:-1]], ends, strict=True)
    phases = {phase: _whole(live.peak(start, end - 1), resident) for phase, start, end in spans}
    return TrainingMemory(phases, _whole(live.peak(ends[0] - 1, ends[0] - 1), resident))


def prepare(model: "PreTrainedModel", recipe: Recipe) -> torch.optim.AdamW:
    """Make a model ready to train by a recipe.

    Args:
        model: which is changed.
        recipe: how it is trained.

    Returns:
        The optimizer, of learning rate 0: finite gradients leave the weights.
    """
    model.train().requires_grad_(True)
    model.activation_checkpointing_disable()
    if recipe.checkpointing:  # the name of gradient_checkpointing_enable from transformers 5.23 on
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": recipe.use_reentrant}
        )
    return torch.optim.AdamW(model.parameters(), lr=0.0, foreach=recipe.foreach)


def step(
    model: "PreTrainedModel",
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    recipe: Recipe,
    live: "_Step | None" = None,
    ended: Callable[[str], None] = lambda phase: None,
) -> None:
    """Run one training step.

    Args:
        model: made ready by `prepare`.
        optimizer: of `prepare`.
        ids: token ids, (windows, tokens) int64.
        recipe: how it is trained.
        live: is told what belongs to what; None: nobody.
        ended: is called with the name of each phase at its end.
    """
    loss = _forward(model, ids, recipe, live)
    ended("forward")
    loss.backward()
    ended("backward")
    optimizer.step()
    ended("optimizer")
    optimizer.zero_grad(set_to_none=True)


def _forward(
    model: "PreTrainedModel", ids: torch.Tensor, recipe: Recipe, live: "_Step | None"
) -> torch.Tensor:
    dtype = torch_dtype(recipe.autocast) if recipe.autocast else None
    cast = torch.autocast(ids.device.type, dtype) if dtype else nullcontext()
    with cast, live.saving() if live else nullcontext():
        return model(input_ids=ids, labels=ids, use_cache=False).loss


class _Step(LiveStorages):
    """Live storages that know logits by their shape, and what autograd saves."""

    def __init__(self, tokens: int, vocabulary: int, device: str) -> None:
        whole = (*OWN_KERNELS, *trace.CUDA_KERNELS) if device == "cuda" else OWN_KERNELS
        super().__init__(whole=whole, inside={} if device == "cuda" else CPU_KERNELS)
        self._logits = (tokens * vocabulary, vocabulary)

    def saving(self) -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not self._of_logits(tensor):
                self.mark(tensor, SAVED)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def _of_logits(self, tensor: torch.Tensor) -> bool:
        return tensor.ndim > 1 and (tensor.numel(), tensor.shape[-1]) == self._logits

    def _born(self, tensor: torch.Tensor, operation: str) -> None:
        super()._born(tensor, operation)
        if self._of_logits(tensor):
            self.mark(tensor, LOGITS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # AdamW reads its number of steps
        return super().__torch_dispatch__(func, types, args, kwargs)


def _whole(peak: Peak, weights: int) -> dict[str, int]:
    found = {WEIGHTS: weights, **peak.by_category}
    order = (WEIGHTS, GRADIENTS, OPTIMIZER_STATES, SAVED, LOGITS, TEMPORARIES)
    return {category: found.get(category, 0) for category in order}


@contextmanager
def _fused_dropout() -> Iterator[None]:
    """Attention with dropout as CUDA has it: its fused kernels keep a seed, no mask; the CPU's have
    no dropout.
    """
    attention = functional.scaled_dot_product_attention

    def fused(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention


def _cpu_attention_backward_buffers(gradient: torch.Tensor, query: torch.Tensor, *_: Any) -> int:
    """Bytes that the fused CPU attention's backward takes within itself, for each thread: as
    trace's of the forward.

    In 16 bits, on processors that multiply them, oneDNN's products take up to some 0.4 MB a thread
    more: left out.
    """
    tokens = query.shape[2]
    rows = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    products, float_bytes = 2 * rows * min(tokens, 512), 4
    own = float_bytes * (products + rows)
    if query.dtype != torch.float32:
        own += query.element_size() * products
    return own * torch.get_num_threads()


# composite operations that have one kernel on the CPU and on CUDA all the same
OWN_KERNELS = (torch.ops.aten.silu_backward.default, torch.ops.aten.mish_backward.default)
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

CPU_KERNELS: dict[Any, Callable[..., int]] = {
    **trace.CPU_KERNELS,
    _BACKWARD: _cpu_attention_backward_buffers,
}
