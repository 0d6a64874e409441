"""A model without the weights of its blocks: what it does before, between and after them.

The shell is the unmodified model of transformers on the meta device, with its real non-persistent buffers (rotary
frequencies and the like) and its small weights outside the blocks. Its own forward, with every block's replaced by a
recorder that lets the residual through, gives what enters the first block, and the arguments of every block: masks,
rotary tables, positions. These depend on a batch's shape alone (`refusals` holds a model to that), so they are recorded
once a shape.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers import AutoModel, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers import HfQuantizer

from theloom import architecture, checkpoint, quantizing, trace
from theloom.architecture import Architecture
from theloom.block_source import BlockSource
from theloom.checkpoint import OUTSIDE, Checkpoint
from theloom.errors import ModelError
from theloom.kv_cache import PrefillCache
from theloom.precision import torch_dtype
from theloom.quantizing import PartLoader

RESIDUAL = "hidden_states"  # what blocks call it where it comes by name


class _Stop(Exception):  # noqa: N818
    """Ends the shell's forward once all is recorded."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block: all but the residual, whose place is kept, and the KV cache, which is not."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool  # whether the residual comes by name

    def run(self, block: nn.Module, residual: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The block's output for a residual (batch, position, hidden size)."""

        def fill(value: Any) -> Any:
            if value is CACHE:
                return cache
            return value.to(residual.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(fill, self.args), tree_map(fill, self.kwargs)
        output = block(*args, **kwargs | {RESIDUAL: residual}) if self.named else block(residual, *args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


class _Placeholder:
    """Stands for a KV cache in recorded arguments."""


CACHE = _Placeholder()


class Frame:
    """A model seen as what is round its blocks; it may be one without bytes.

    `outputs` says of every block how many values it returns (0: a tensor, not a tuple), `residual_dtype` the precision
    of the residual stream; `blockwise.look` finds both.
    """

    def __init__(self, described: Architecture, device: torch.device) -> None:
        self.architecture, self.device = described, device
        self.model, self.blocks = described.model, described.blocks
        self.outputs: list[int] = [0] * len(self.blocks)
        self.residual_dtype = self.model.dtype

    @property
    def streams(self) -> bool:
        """Whether a block's part of the KV cache is keys and values alone, which a cache of its own can hold."""
        layers = DynamicCache(config=self.model.config).layers
        return len(layers) == len(self.blocks) and all(
            type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers
        )

    def enter(self, ids: torch.Tensor, seen: int = 0, streamed: bool = False) -> torch.Tensor:
        """What enters the first block for token ids (batch, position), of which `seen` came before these."""
        found: list[torch.Tensor] = []

        def first(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found.append(_residual(args, kwargs))
            raise _Stop

        self._forward(first, ids, seen, streamed)
        return found[0]

    def record(self, ids: torch.Tensor, seen: int = 0, streamed: bool = False) -> list[Call]:
        """Every block's arguments for token ids of a shape, on the host. Raises ModelError for a block not met."""
        calls: list[Call] = []
        to_host = _Once()

        def through(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if number != len(calls):
                raise ModelError(f"{self._name}: its blocks do not run once each, in order")
            named = not (args and isinstance(args[0], torch.Tensor))
            calls.append(Call(tree_map(to_host, args if named else args[1:]), _mapped(to_host, kwargs, named), named))
            if number == len(self.blocks) - 1:
                raise _Stop
            residual, count = _residual(args, kwargs), self.outputs[number]
            return (residual, *[None] * (count - 1)) if count else residual

        self._forward(through, ids, seen, streamed)
        if len(calls) < len(self.blocks):
            raise ModelError(f"{self._name}: only {len(calls)} of its {len(self.blocks)} blocks ran")
        return calls

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _forward(self, run: Callable[..., Any], ids: torch.Tensor, seen: int, streamed: bool) -> None:
        """The model's own forward, with every block's work replaced; the modules stay themselves."""
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": streamed}
        if streamed:
            inputs["past_key_values"] = cache_that_saw(self.model.config, seen)
        blocks: Sequence[Any] = self.blocks
        try:
            for number, block in enumerate(blocks):
                block.forward = lambda *args, _number=number, **kwargs: run(_number, args, kwargs)
            with torch.inference_mode():
                self.model(**inputs)
        except _Stop:
            pass
        finally:
            for block in blocks:
                vars(block).pop("forward", None)


class Shell(Frame):
    """The shell of a model in a folder. Raises ModelError where it cannot be built so.

    `enter` and `record` need the embeddings: `with shell.embedded(source)`.
    """

    def __init__(
        self,
        folder: Path,
        model_config: PretrainedConfig,
        precision: str,
        device: torch.device,
        attention: str | None = None,
        trust_remote_code: bool = False,
        quantizer: HfQuantizer | None = None,
    ) -> None:
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        dtype = torch_dtype(precision)

        def empty() -> PreTrainedModel:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModel.from_config(
                    model_config, dtype=dtype, trust_remote_code=trust_remote_code, **options
                )
            _fill_buffers(model, device)  # before there are layers whose weights cannot be initialised
            if quantizer is not None:
                quantizing.replace_layers(model, quantizer, dtype, device)
            model.eval().requires_grad_(False)
            _keep_precise(model, dtype)
            return model

        model, loader = empty(), None if quantizer is None else PartLoader(empty(), quantizer)
        super().__init__(architecture.describe(model), device)
        self.checkpoint = Checkpoint(model, self.blocks, checkpoint.index(folder), loader)

    @contextmanager
    def embedded(self, source: BlockSource) -> Iterator[None]:
        """All weights outside the blocks attached; those of embeddings stay in the file, and on the host."""
        part, keys = OUTSIDE, self.checkpoint.keys[OUTSIDE]
        with ExitStack() as opened:
            opened.callback(self.checkpoint.detach, part)
            mapped = self.mapped
            self.checkpoint.put({k: source.mapped(k) for k in mapped}, torch.device("cpu"))
            rest = [k for k in keys if k not in set(mapped)]
            if self.checkpoint.quantized:
                self.checkpoint.place(part, self.checkpoint.load(part, source.on_disk(rest), self.device))
            else:
                self.checkpoint.attach(part, source.read(rest), self.device)
            if mapped and self.device.type != "cpu":
                for module in self._embeddings().values():
                    opened.enter_context(_on_host(module, self.device))
            yield

    @property
    def mapped(self) -> list[str]:
        """The keys of embeddings, which stay in their files."""
        if self.checkpoint.is_converted(OUTSIDE):
            return []
        large = {f"{name}.weight" for name in self._embeddings()}
        return [k for k in self.checkpoint.keys[OUTSIDE] if self.checkpoint.target(k) in large]

    def _embeddings(self) -> dict[str, nn.Module]:
        inside = {m for block in self.blocks for m in block.modules()}
        modules = self.model.named_modules()
        return {name: m for name, m in modules if isinstance(m, nn.Embedding) and m not in inside}

    @contextmanager
    def without_bytes(self) -> Iterator[FakeTensorMode]:
        """The whole model on fake CPU tensors for a while: to see how values go through it."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        was: list[tuple[dict[str, Any], str, torch.Tensor]] = [
            (cast(Any, table), leaf, tensor)
            for module in self.model.modules()
            for table in (module._parameters, module._buffers)
            for leaf, tensor in table.items()
            if tensor is not None
        ]
        fakes: dict[int, torch.Tensor] = {}
        with mode:
            for table, leaf, tensor in was:
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if parameter else fake
                table[leaf] = fakes[id(tensor)]
        try:
            with mode, trace._shapes_alone(), quantizing.shapes_alone(self.model):
                yield mode
        finally:
            for table, leaf, tensor in was:
                table[leaf] = tensor


class _Once:
    """Moves tensors to the host, each once, and leaves out KV caches."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Cache):
            return CACHE
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._moved:  # the original is kept, so that its id stays its own
            self._moved[id(value)] = (value, value.cpu())
        return self._moved[id(value)][1]


def _mapped(to_host: _Once, kwargs: dict[str, Any], named: bool) -> dict[str, Any]:
    """Arguments by name in their order, the residual's place kept."""
    return {name: None if named and name == RESIDUAL else tree_map(to_host, value) for name, value in kwargs.items()}


def _residual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args and isinstance(args[0], torch.Tensor) else kwargs[RESIDUAL]


def cache_that_saw(config: PretrainedConfig, seen: int) -> DynamicCache:
    """A KV cache without data, which tells every layer that `seen` tokens came before: for positions and masks."""
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = seen
        else:
            plain: Any = layer
            plain.get_seq_length = lambda: seen
            plain.get_mask_sizes = lambda queries: (seen + queries, 0)
    return cache


class BlockCache(PrefillCache):
    """The KV cache of one block. Raises ModelError where the block looks at another's, which is not there."""

    def __init__(self, config: PretrainedConfig, block: int) -> None:
        super().__init__(config=config)
        self._block = block

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, self._own(layer_idx), *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._own(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._own(layer_idx))

    def _own(self, asked: int) -> int:
        if asked != self._block:
            raise ModelError(
                f"block {self._block} looks at the KV cache of block {asked}: documents longer than a chunk cannot go "
                "through this model block by block; set extraction.execution=resident"
            )
        return asked


def _keep_precise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that the model's class wants in FP32 are so, as `from_pretrained` leaves them."""
    kept = list(model._get_dtype_plan(dtype))
    if not kept:
        return
    pattern = build_glob_alternation(kept)[0]
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.to(torch.float32)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Make real the buffers that are in no file: the model's own initialisation fills them, as on loading."""
    made = []
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            meta = module._buffers.get(leaf)
            if meta is not None:
                real = torch.empty_like(meta, device=device)
                module._buffers[leaf] = real.fill_(float("nan")) if real.is_floating_point() else real
                made.append((module, leaf))
    for module in model.modules():  # all of them: some fill their children's
        model._init_weights(module)
    for module, leaf in made:
        buffer = module._buffers[leaf]
        if buffer is not None and buffer.is_floating_point() and buffer.isnan().any():
            raise ModelError(
                f"{type(model).__name__}: the buffer {leaf} of {type(module).__name__} cannot be made anew"
            )


@contextmanager
def _on_host(module: nn.Module, device: torch.device) -> Iterator[None]:
    """An embedding whose weights are on the host: tokens go there, rows come back."""

    def host(value: Any) -> Any:
        return value.cpu() if isinstance(value, torch.Tensor) else value

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(host, args), tree_map(host, kwargs)

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(lambda _, __, output: output.to(device), prepend=True),
    ]
    buffers = {leaf: buffer for leaf, buffer in module._buffers.items() if buffer is not None}
    module._buffers.update({leaf: buffer.cpu() for leaf, buffer in buffers.items()})
    try:
        yield
    finally:
        module._buffers.update(buffers)
        for handle in handles:
            handle.remove()
