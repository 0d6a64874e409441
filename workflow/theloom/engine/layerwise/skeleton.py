"""A model without the weights of its blocks: what it does before, between and after them.

The shell is the unmodified model of transformers on the meta device, with its real non-persistent
buffers (rotary frequencies and the like) and its small weights outside the blocks. Its own forward,
with every block's replaced by a recorder that lets the residual through, gives what enters the
first block, and the arguments of every block: masks, rotary tables, positions. These depend on a
batch's shape alone (`examine` holds a model to that), so they are recorded once a shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers import HfQuantizer

from theloom.engine.layerwise import quantize, weights_index
from theloom.engine.layerwise.block_loader import BlockSource
from theloom.engine.layerwise.quantize import PartLoader
from theloom.engine.layerwise.weights_index import OUTSIDE, Checkpoint
from theloom.errors import ModelError
from theloom.hooks.blocks import find_blocks
from theloom.hooks.catalog import build_catalog
from theloom.model.adapters.files import AdapterFiles
from theloom.model.adapters.merging import read_adapters
from theloom.model.attention_kernels import repeat_keys_where_needed
from theloom.model.block_calls import (
    CACHE,
    PROBE_TOKENS,
    BlockCalls,
    Call,
    Frame,
    inspect_calls,
    leaf_kind,
    leaves,
    refusal,
)
from theloom.model.checkpoint.classes import auto_class
from theloom.model.length_switches import fix_frequencies
from theloom.model.without_bytes.mode import WithoutBytes
from theloom.model.without_bytes.shapes_only import shapes_only
from theloom.precision import torch_dtype


class Shell(Frame):
    """The shell of a model in a folder.

    `enter` and `record` need the embeddings: `with shell.embedded(source)`.

    Raises:
        ModelError: it cannot be built so.
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
        adapters: Sequence[AdapterFiles] = (),
    ) -> None:
        repeat_keys_where_needed()
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        dtype = torch_dtype(precision)

        def empty() -> PreTrainedModel:
            with torch.device("meta"):
                model: PreTrainedModel = auto_class(model_config, trust_remote_code).from_config(
                    model_config, dtype=dtype, trust_remote_code=trust_remote_code, **options
                )
            _fill_buffers(
                model, device
            )  # before there are layers whose weights cannot be initialised
            if quantizer is not None:
                quantize.replace_layers(model, quantizer, dtype, device)
            model.eval().requires_grad_(False)
            _keep_precise(model, dtype)
            return model

        model, loader = empty(), None if quantizer is None else PartLoader(empty(), quantizer)
        try:
            described = find_blocks(model)
        except ModelError as error:
            raise ModelError(
                f"{type(model).__name__} cannot be run layer by layer: its blocks are not known "
                f"without its weights ({error}); set extraction.execution=resident"
            ) from None
        super().__init__(described, device)
        merged = read_adapters(model, adapters) if adapters else None
        stored = weights_index.index(folder)
        self.checkpoint = Checkpoint(model, self.blocks, stored, loader, merged)

    @contextmanager
    def embedded(self, source: BlockSource) -> Iterator[None]:
        """Attach all weights outside the blocks; those of embeddings stay in the file, and on the
        host.

        Args:
            source: reads them.
        """
        part, keys = OUTSIDE, self.checkpoint.keys[OUTSIDE]
        with ExitStack() as opened:
            opened.callback(self.checkpoint.detach, part)
            mapped = self.mapped
            self.checkpoint.put({k: source.mapped(k) for k in mapped}, torch.device("cpu"))
            rest = [k for k in keys if k not in set(mapped)]
            if self.checkpoint.quantized:
                self.checkpoint.place(
                    part, self.checkpoint.load(part, source.on_disk(rest), self.device)
                )
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
    def without_bytes(self) -> Iterator[WithoutBytes]:
        """Have the whole model on fake CPU tensors for a while, to see how values go through it.

        Yields:
            The mode in which the tensors are fake.
        """
        mode = WithoutBytes()
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
                    fakes[id(tensor)] = (
                        nn.Parameter(fake, requires_grad=False) if parameter else fake
                    )
                table[leaf] = fakes[id(tensor)]
        choose_again = fix_frequencies(self.model)
        try:
            with mode, shapes_only(), quantize.shapes_alone(self.model):
                yield mode
        finally:
            choose_again()
            for table, leaf, tensor in was:
                table[leaf] = tensor


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
    """Make real the buffers that are in no file: the model's own initialisation fills them, as on
    loading.
    """
    made = []
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            meta = module._buffers.get(leaf)
            if meta is not None:
                real = torch.empty_like(meta, device=device)
                module._buffers[leaf] = (
                    real.fill_(float("nan")) if real.is_floating_point() else real
                )
                made.append((module, leaf))
    for module in model.modules():  # all of them: some fill their children's
        model._init_weights(module)
    for module, leaf in made:
        buffer = module._buffers[leaf]
        if buffer is not None and buffer.is_floating_point() and buffer.isnan().any():
            raise ModelError(
                f"{type(model).__name__}: the buffer {leaf} of {type(module).__name__} cannot be "
                "initialized"
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


PLAIN = (int, float, str, bool, torch.dtype, torch.device, type(None))


def examine(shell: Shell, source: BlockSource) -> None:
    """Find the shell's hook points and what its blocks return.

    Args:
        shell: which learns them.
        source: reads its weights.

    Raises:
        ModelError: the model is refused.
    """
    with shell.without_bytes():
        seen = inspect_calls(shell)
        build_catalog(shell.architecture)
    _texts(shell, source, seen)


def _texts(shell: Shell, source: BlockSource, seen: BlockCalls) -> None:
    """The shell calls the blocks as the model does, and in the same way for two texts."""
    vocabulary = shell.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(5)
    with shell.embedded(source):
        calls = [
            shell.record(torch.randint(vocabulary, (2, PROBE_TOKENS), generator=generator))
            for _ in range(2)
        ]
    for number, (first, second) in enumerate(zip(*calls, strict=True)):
        ours, others = list(_leaves_of(first)), list(_leaves_of(second))
        if [leaf_kind(*leaf) for leaf in ours] != [leaf_kind(*leaf) for leaf in seen.calls[number]]:
            raise refusal(
                shell, f"block {number} takes more than the residual from the blocks before it"
            )
        for (path, one), (_, other) in zip(ours, others, strict=True):
            if isinstance(one, torch.Tensor):
                if one.shape != other.shape or not torch.equal(one, other):
                    raise refusal(
                        shell,
                        f"block {number} is given something that depends on the text ({path})",
                    )
            elif not isinstance(one, PLAIN) and one is not CACHE:
                raise refusal(
                    shell,
                    f"block {number} is given a {type(one).__name__}, which may carry state "
                    f"({path})",
                )


def _leaves_of(call: Call) -> Iterator[tuple[str, Any]]:
    kwargs = {k: v for k, v in call.kwargs.items() if not (call.named and k == "hidden_states")}
    return leaves((call.args, kwargs))
