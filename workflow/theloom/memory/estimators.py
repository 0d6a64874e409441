"""Two ways to the same bytes: in closed form, at once, for Llama-like models; by a trace, for any
model.

Both answer for the base model that extraction loads, without LM head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

from theloom import precision as precisions
from theloom.config import model_dims
from theloom.config.model_dims import ModelDims
from theloom.config.schema import ArchitectureConfig
from theloom.hooks.points import (
    COMPUTED,
    RESIDUALS,
    HookCatalog,
    HookPoint,
    deepest_block,
    llama_catalog,
)
from theloom.memory import closed_form
from theloom.memory.sizes import BlockSizes, PeakBytes, Workload
from theloom.model.weight_format import WeightFormat, quantized_as, quantizing_bytes
from theloom.precision import BYTES
from theloom.rows.modality import sensed_by, source_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from theloom.model.fake import FakeModel


class Estimator(Protocol):
    """Bytes of one model, at any kind of weights, for any workload."""

    method: str
    size: ModelDims
    own: str | None  # the checkpoint's own quantisation, 8bit or 4bit

    def catalog(self) -> HookCatalog:
        """List the hook points of the model.

        Returns:
            The catalog.
        """

    def weights(self, kind: WeightFormat, points: Sequence[HookPoint] | None = None) -> int:
        """Bytes of parameters and buffers.

        Args:
            kind: of the weights.
            points: count those that reading these hook points needs; None: all.

        Returns:
            Bytes.
        """

    def largest_weight(self, kind: WeightFormat) -> int:
        """The largest tensor as it is in the checkpoint, which a quantising load holds beside its
        result.

        Args:
            kind: of the weights.

        Returns:
            Bytes.
        """

    def forward(
        self,
        kind: WeightFormat,
        workload: Workload,
        points: Sequence[HookPoint],
        held: bool = False,
        device: str = "cuda",
    ) -> PeakBytes:
        """The peak of one forward pass that reads hook points.

        Args:
            kind: of the weights.
            workload: windows, tokens and chunks of the pass.
            points: the hook points to read.
            held: their values are held until the end, instead of written as they come.
            device: `cuda` or `cpu`, whose kernels allocate.

        Returns:
            Bytes by category, weights apart.

        Raises:
            ModelError: the model cannot be traced.
        """

    def block_sizes(self, kind: WeightFormat, points: Sequence[HookPoint]) -> BlockSizes:
        """The weights layer by layer, up to the deepest hook point; as if on disk in the same
        precision.

        Args:
            kind: of the weights.
            points: the hook points to read.

        Returns:
            Bytes.
        """

    def block_forward(
        self, kind: WeightFormat, workload: Workload, points: Sequence[HookPoint]
    ) -> tuple[PeakBytes, int]:
        """The peak of one pass through one block on a GPU.

        Args:
            kind: of the weights.
            workload: windows, tokens and chunks of the pass.
            points: the hook points to read.

        Returns:
            Bytes by category, weights apart; and bytes of the arguments recorded for all blocks.

        Raises:
            ModelError: the model cannot be traced.
        """


class ClosedForm:
    """Llama-like models (`closed_form.covers`), hook points that the model makes anyway (`covers`),
    of which the residuals alone can be held. The device makes no difference to it.
    """

    method = "closed form"
    own: str | None = None

    def __init__(self, size: ModelDims) -> None:
        self.size = size

    @staticmethod
    def covers(points: Sequence[HookPoint], held: bool = False) -> bool:
        """Whether the closed form can tell what reading these hook points takes.

        Args:
            points: the hook points to read.
            held: their values are held until the end.

        Returns:
            True for residuals; where nothing is held, for all that the model makes anyway.
        """
        return all(p.value in RESIDUALS if held else p.value not in COMPUTED for p in points)

    def catalog(self) -> HookCatalog:
        return llama_catalog(self.size)

    def weights(self, kind: WeightFormat, points: Sequence[HookPoint] | None = None) -> int:
        if points is None:
            return closed_form.weights(self.size, kind)
        deepest = deepest_block(points)
        blocks = min(deepest + 1, self.size.num_blocks)
        return closed_form.weights(
            self.size, kind, blocks, final_norm=deepest >= self.size.num_blocks
        )

    def largest_weight(self, kind: WeightFormat) -> int:
        return 2 * max(
            closed_form.parameters(self.size, tied=True).largest_linear,
            self.size.vocab_size * self.size.hidden_size,
        )

    def forward(
        self,
        kind: WeightFormat,
        workload: Workload,
        points: Sequence[HookPoint],
        held: bool = False,
        device: str = "cuda",
    ) -> PeakBytes:
        residuals = {p.block + (p.value == "hook_resid_post") for p in points} if held else set()
        deepest = deepest_block(points, default=self.size.num_blocks)
        blocks = min(max(deepest, 0) + 1, self.size.num_blocks)
        return closed_form.forward(self.size, kind, workload, blocks, residuals)

    def block_sizes(self, kind: WeightFormat, points: Sequence[HookPoint]) -> BlockSizes:
        size, e, plain = self.size, BYTES[kind.precision], WeightFormat(kind.precision)
        embedding = size.vocab_size * size.hidden_size

        def block(kind: WeightFormat) -> int:
            return closed_form.weights(size, kind, 2) - closed_form.weights(size, kind, 1)

        return BlockSizes(
            block=block(kind),
            kept=size.hidden_size * e,
            embeddings=embedding * e,
            read=_run(points, size.num_blocks) * block(plain),
            **_quantising(kind, closed_form.parameters(size, tied=True).largest_linear),
        )

    def block_forward(
        self, kind: WeightFormat, workload: Workload, points: Sequence[HookPoint]
    ) -> tuple[PeakBytes, int]:
        tokens = max(workload.steps)
        recorded = 2 * tokens * self.size.head_dim * BYTES[kind.precision] + 8 * tokens
        return closed_form.forward(replace(self.size, num_blocks=1), kind, workload, 1), recorded


class Traced:
    """Any model that transformers builds, and any hook point: the forward pass on fake tensors."""

    method = "trace"

    def __init__(
        self,
        model_config: "PretrainedConfig",
        attention: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.size = model_dims.numbers(model_config)
        self._config, self._attention, self._trust = model_config, attention, trust_remote_code
        self.own = quantized_as(model_config)
        self._fakes: dict[WeightFormat, FakeModel] = {}
        self._left_out: dict[tuple[str, ...], list[str]] = {}
        if sensed_by(model_config):
            self.size = replace(self.size, context_length=self._rows())
        if model_dims.stages_of(model_config):
            described = self.fake(WeightFormat("fp32")).architecture
            blocks, width = len(described.blocks), described.hidden_size
            self.size = replace(self.size, num_blocks=blocks, hidden_size=width)

    def _rows(self) -> int:
        """Rows of the largest input of a tower that a run is planned for; of a decoder behind one
        the tokens of its longest target, where these are more.
        """
        from theloom.model.towers.row_counts import RowCounts

        counts = RowCounts(self.fake(WeightFormat("fp32")))
        longest = counts.longest
        if not source_of(self._config):
            return longest
        counts.check_trial(longest)
        return max(longest, self.size.context_length)

    def fake(self, kind: WeightFormat) -> "FakeModel":
        """Build the model without bytes, once for each kind of weights.

        Args:
            kind: of the weights.

        Returns:
            The fake model.

        Raises:
            ModelError: transformers cannot build it.
        """
        from theloom.model.fake import fake_model

        if kind not in self._fakes:
            self._fakes[kind] = fake_model(
                self._config,
                kind.precision,
                kind.quantization,
                self._attention,
                trust_remote_code=self._trust,
            )
        return self._fakes[kind]

    def catalog(self) -> HookCatalog:
        return self.fake(WeightFormat("fp32")).catalog

    def unneeded(self, points: Sequence[HookPoint]) -> list[str]:
        """Modules that no kind of weights needs: found once, and where nothing is quantised.

        Args:
            points: the hook points to read.

        Returns:
            Names of modules, as `FakeModel.unneeded`.
        """
        names = tuple(p.name for p in points)
        if names not in self._left_out:
            self._left_out[names] = self.fake(WeightFormat("fp32")).unneeded(points)
        return self._left_out[names]

    @cached_property
    def attention(self) -> str:
        """The attention implementation that transformers takes."""
        return str(self.fake(WeightFormat("fp32")).model.config._attn_implementation)

    @property
    def parameters(self) -> int:
        """Parameters of the whole base model."""
        return int(self.fake(WeightFormat("fp32")).model.num_parameters())

    def weights(self, kind: WeightFormat, points: Sequence[HookPoint] | None = None) -> int:
        from theloom.model import pruning

        left_out = [] if points is None else self.unneeded(points)
        return sum(pruning.storages(self.fake(kind).model, left_out))

    def largest_weight(self, kind: WeightFormat) -> int:
        return max(self.fake(WeightFormat("bf16")).weights)

    def forward(
        self,
        kind: WeightFormat,
        workload: Workload,
        points: Sequence[HookPoint],
        held: bool = False,
        device: str = "cuda",
        inputs: "Mapping[str, torch.Tensor] | None" = None,
    ) -> PeakBytes:
        from theloom.hooks.failures import refused
        from theloom.memory import trace

        fake = self.fake(kind)
        name = type(fake.model).__name__
        if len(workload.steps) == 1:  # the same pass, however much larger a chunk may be
            workload = replace(workload, chunk_size=workload.tokens)

        def traced() -> PeakBytes:
            with refused(f"{name} in {kind.name}: its memory cannot be predicted"):
                peak, _ = trace.trace(
                    fake, workload, points, held, kind.precision, device, inputs=inputs
                )
            return trace.parts(peak)

        if inputs is not None:
            return traced()
        return fake.remembered(("forward", workload, tuple(points), held, device), traced)

    def block_sizes(self, kind: WeightFormat, points: Sequence[HookPoint]) -> BlockSizes:
        from theloom.hooks.module_names import token_embedding
        from theloom.model.fake import is_linear

        described, plain = (
            self.fake(kind).architecture,
            self.fake(WeightFormat(kind.precision)).architecture,
        )
        blocks, whole = ([_nbytes(b) for b in found.blocks] for found in (described, plain))
        table = token_embedding(described.model)
        embedding = 0 if table is None else _nbytes(table)
        linear: list[Any] = [m for b in plain.blocks for m in b.modules() if is_linear(m)]
        largest = max((m.weight.numel() for m in linear), default=0)
        staged = (
            _quantising(kind, largest) if self.own is None else {"converted": 0, "tensor": largest}
        )
        return BlockSizes(
            block=max(blocks),
            kept=self.weights(kind) - sum(blocks) - embedding,
            embeddings=embedding,
            read=sum((whole if self.own is None else blocks)[: _run(points, len(blocks))]),
            **staged,
        )

    def block_forward(
        self, kind: WeightFormat, workload: Workload, points: Sequence[HookPoint]
    ) -> tuple[PeakBytes, int]:
        from theloom.memory.trace_block import trace_block

        found = trace_block(self.fake(kind), workload, points, "cuda")
        return found.parts, found.recorded


def _nbytes(module: Any) -> int:
    """Bytes of a module's weights, the scales of quantised ones included."""
    from theloom.model.fake import SCALED

    scaled = [
        b for m in module.modules() if isinstance(m, SCALED) for b in m.buffers(recurse=False)
    ]
    return sum(t.untyped_storage().nbytes() for t in [*module.parameters(), *scaled])


def _quantising(kind: WeightFormat, largest: int) -> dict[str, int]:
    """Bytes that quantising the largest weight takes: of a GPU next to its result, and of the host.

    On the host the weight lies once, as it was read; LLM.int8() copies it back there before it
    quantises it.
    """
    if kind.quantization is None:
        return {"converted": 0, "tensor": 0}
    size = BYTES[kind.precision]
    copies = 2 if kind.quantization == "int8" else 1
    return {
        "converted": quantizing_bytes(kind.quantization, largest, size),
        "tensor": copies * largest * size,
    }


def _run(points: Sequence[HookPoint], blocks: int) -> int:
    """How many blocks run, up to the deepest hook point."""
    return min(deepest_block(points, default=blocks) + 1, blocks)


def config_of(numbers: ArchitectureConfig) -> "PretrainedConfig":
    """Make a transformers config from the numbers of a profile.

    Args:
        numbers: `model.architecture`.

    Returns:
        The config.
    """
    from transformers import AutoConfig

    known = {
        k: v
        for k, v in cast(Any, numbers).items()
        if k not in ("model_type", "parameters") and v is not None
    }
    return AutoConfig.for_model(numbers.model_type, **known)


def row_bytes(points: Sequence[HookPoint], precision: str, keys: int) -> int:
    """Compute the bytes on disk of the hidden states of one row, with its scales where it has any.

    Args:
        points: hook points that are stored.
        precision: of the store.
        keys: tokens of the longest window.

    Returns:
        Bytes.
    """
    return sum(precisions.row_bytes(precision, p.width(keys)) for p in points)
