"""What each memory optimisation of the specification's table saves for a model and a workload:
computed, not quoted.

Every figure is a trace of the real classes: `trace.trace` for a forward pass,
`training.training_step` for a training step. Where a claim of the specification does not hold, the
figures say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from theloom.hooks.points import HookPoint
from theloom.hooks.taps import Taps
from theloom.memory import trace, training
from theloom.memory.sizes import Workload
from theloom.memory.storages import LiveStorages
from theloom.memory.trace import CAPTURED, CPU_KERNELS, CUDA_KERNELS
from theloom.memory.training import Recipe, TrainingMemory
from theloom.model.fake import FakeModel, fake_model
from theloom.model.without_bytes.shapes_only import shapes_only

if TYPE_CHECKING:
    from transformers import PretrainedConfig


CLAIMS = {
    "mixed precision": "50%",
    "selective caching": "70-90%",
    "streaming extraction": "unbounded",
    "gradient checkpointing": "40-50%",
    "torch.inference_mode()": "5-10%",
}


@dataclass(frozen=True)
class Bytes:
    """Peak bytes: of everything, and of what is beyond weights, gradients and optimiser states."""

    total: int
    activations: int


@dataclass(frozen=True)
class Saving:
    """What one optimisation saves in one workflow (inference or training).

    `compared` says what was compared. Where the optimisation does not apply, `after` is `before`.
    `claim` is the specification's figure.
    """

    optimisation: str
    workflow: str
    applies: bool
    before: Bytes
    after: Bytes
    compared: str

    @property
    def claim(self) -> str:
        """The specification's figure."""
        return CLAIMS[self.optimisation]

    @property
    def percent(self) -> float:
        """Percent of all bytes saved; negative where it costs more."""
        return _percent(self.before.total, self.after.total)

    @property
    def percent_of_activations(self) -> float:
        """Percent saved of what is beyond weights, gradients and optimiser states."""
        return _percent(self.before.activations, self.after.activations)


def optimisations(
    model_config: "PretrainedConfig",
    windows: int,
    tokens: int,
    chunk_size: int,
    hooks: Sequence[str],
    precision: str = "bf16",
    device: str = "cpu",
) -> list[Saving]:
    """The specification's table for a workload: each optimisation in inference and in training.

    Inference is a forward without the head that holds the chosen values, if no row says otherwise.
    About sixteen traces: a few seconds for a small model, a minute for one of 7 billion parameters.

    Args:
        model_config: of transformers; no weights are needed.
        windows: how many in a batch.
        tokens: of each window.
        chunk_size: tokens of a window in one forward step, where it streams.
        hooks: a filter as in `HookCatalog.select`.
        precision: `fp16` or `bf16`: the mixed one, and that of the other rows.
        device: as of `trace.trace`.

    Returns:
        A saving for each optimisation and workflow, in bytes.
    """
    return _Table(model_config, windows, tokens, chunk_size, hooks, precision, device).rows()


class _Table:
    def __init__(
        self,
        model_config: "PretrainedConfig",
        windows: int,
        tokens: int,
        chunk_size: int,
        hooks: Sequence[str],
        precision: str,
        device: str,
    ) -> None:
        self._config, self._precision, self._device = model_config, precision, device
        self._one_pass = Workload(windows, tokens, tokens)
        self._chunks = Workload(windows, tokens, min(chunk_size, tokens))
        self._fake = fake_model(model_config, precision)
        self._points = self._fake.catalog.select(hooks)

    def rows(self) -> list[Saving]:
        rows: list[Saving] = []

        def row(
            name: str,
            workflow: str,
            before: Bytes,
            after: Bytes,
            compared: str,
            applies: bool = True,
        ) -> None:
            rows.append(Saving(name, workflow, applies, before, after, compared))

        low, tokens, chunk = self._precision, self._one_pass.tokens, self._chunks.chunk_size
        chosen, every = self._points, self._fake.residuals
        held = self._pass(self._fake, chosen)
        full = fake_model(self._config, "fp32")
        step, step_full = self._step(low), self._step("fp32")

        name = "mixed precision"
        row(
            name,
            "inference",
            self._pass(full, chosen),
            held,
            f"FP32 against {low}, weights and values",
        )
        row(
            name,
            "training",
            step_full,
            self._step(low, autocast=True),
            f"FP32 against {low} autocast, FP32 weights",
        )
        row(
            name,
            "training",
            step_full,
            step,
            f"FP32 against all in {low}: weights, gradients and moments",
        )

        name, several = "selective caching", f"all {len(every)} values held against {len(chosen)}"
        row(
            name,
            "inference",
            self._pass(self._fake, every),
            held,
            f"{several}; stops after the deepest",
        )
        row(
            name,
            "training",
            self._holding(every),
            self._holding(chosen),
            f"{several}; autograd keeps most anyway",
        )

        name, written = "streaming extraction", "values written as they come"
        one, many = (
            self._pass(self._fake, chosen, store=low),
            self._pass(self._fake, chosen, store=low, chunks=True),
        )
        row(
            name,
            "inference",
            one,
            many,
            f"one pass of {tokens} against chunks of {chunk} with a KV cache; {written}",
        )
        cut = self._step(low, tokens=chunk, accumulated=chunk < tokens)
        limits = "gradients accumulated, no token sees an earlier chunk"
        row(
            name,
            "training",
            step,
            cut,
            f"a step on {tokens} tokens against chunks of {chunk}: {limits}",
        )

        name = "gradient checkpointing"
        checkpointed = fake_model(self._config, low)
        checkpointed.model.activation_checkpointing_enable()
        nothing = "no effect without a backward"
        row(
            name,
            "inference",
            held,
            self._pass(checkpointed, chosen),
            f"off against on: {nothing}",
            applies=False,
        )
        row(
            name,
            "training",
            step,
            self._step(low, checkpointing=True),
            "off against on for every block",
        )

        name = "torch.inference_mode()"
        graph, no_grad = (
            self._pass_outside_inference_mode(chosen, enabled) for enabled in (True, False)
        )
        compared = (
            "with autograd's graph (under torch.no_grad() "
            f"{_percent(graph.total, no_grad.total):.1f}% is saved)"
        )
        row(name, "inference", graph, held, compared)
        row(
            name,
            "training",
            step,
            step,
            "cannot be used: autograd refuses its tensors",
            applies=False,
        )
        return rows

    def _step(self, precision: str, tokens: int | None = None, **options: bool) -> Bytes:
        tokens = tokens or self._one_pass.tokens
        windows = self._one_pass.windows
        return _of_step(
            training.training_step(
                self._config, precision, windows, tokens, device=self._device, **options
            )
        )

    def _pass(
        self,
        fake: FakeModel,
        points: list[HookPoint],
        store: str | None = None,
        chunks: bool = False,
    ) -> Bytes:
        workload = self._chunks if chunks else self._one_pass
        peak, _ = trace.trace(
            fake, workload, points, held=store is None, store=store, device=self._device
        )
        return Bytes(sum(fake.weights) + peak.total, peak.total)

    def _pass_outside_inference_mode(self, points: list[HookPoint], grad: bool) -> Bytes:
        """A forward of a model as it is loaded, its parameters asking for gradients."""
        fake = fake_model(self._config, self._precision)
        described = fake.architecture  # by a pass of its own, without gradients
        fake.model.requires_grad_(True)
        with fake.mode, shapes_only():
            ids = torch.zeros(self._one_pass.windows, self._one_pass.tokens, dtype=torch.int64)
            peak = forward_peak(described, ids, points, grad, self._device)
        return Bytes(sum(fake.weights) + peak, peak)

    def _holding(self, points: list[HookPoint]) -> Bytes:
        """A training step that holds the values of hook points, as the model gives them, until the
        next forward.
        """
        fake = fake_model(self._config, self._precision, lm_head=True)
        kept: list[Any] = []
        fake.model.register_forward_pre_hook(lambda *_: kept.clear())
        for point in points:
            site = fake.architecture.residual(point)
            if site.place == "input":
                site.module.register_forward_pre_hook(
                    lambda _, args, kwargs, site=site: kept.append(site.given(args, kwargs)),
                    with_kwargs=True,
                )
            else:
                site.module.register_forward_hook(
                    lambda _, args, out, site=site: kept.append(site.chosen(out))
                )
        return _of_step(
            training.trace_step(
                fake, self._one_pass.windows, self._one_pass.tokens, Recipe(), self._device
            )
        )


def forward_peak(
    described: Any, ids: torch.Tensor, points: list[HookPoint], grad: bool, device: str = "cpu"
) -> int:
    """Trace one pass that holds values, outside inference mode.

    Args:
        described: the architecture of a model, real or fake.
        ids: token ids, (windows, positions) int64.
        points: the hook points to read and hold.
        grad: whether autograd's graph is built.
        device: as of `trace.trace`.

    Returns:
        Bytes at the peak; weights and inputs are not counted.
    """
    cuda = device == "cuda"
    live = LiveStorages(
        whole=(*training.OWN_KERNELS, *(CUDA_KERNELS if cuda else ())),
        inside={} if cuda else CPU_KERNELS,
    )
    live.ignore([ids, *described.model.parameters(), *described.model.buffers()])
    kept: list[torch.Tensor] = []

    def hold(name: str, value: torch.Tensor) -> None:
        live.mark(value, CAPTURED)
        kept.append(value)

    with torch.set_grad_enabled(grad), Taps(described, points, hold) as taps, live:
        taps.run(input_ids=ids, use_cache=False)
    return live.peak().total


def _of_step(memory: TrainingMemory) -> Bytes:
    return Bytes(memory.peak, memory.activations)


def _percent(before: int, after: int) -> float:
    return 100 * (1 - after / before) if before else 0.0
