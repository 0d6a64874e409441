"""Whether a model can run block by block: what would come out wrong is refused, with the reason.

A shell records a block's arguments once for all batches of a shape, and hands a block nothing but the residual of the
one before. That is right where the arguments do not depend on the text, and nothing else goes from block to block. Both
are looked at: in a pass of the model on tensors without bytes, and in two passes of the shell over different texts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from theloom.block_source import BlockSource
from theloom.catalogue import catalogue
from theloom.errors import ModelError
from theloom.shell import CACHE, Call, Frame, Shell

PLAIN = (int, float, str, bool, torch.dtype, torch.device, type(None))
TOKENS = 5


def examine(shell: Shell, source: BlockSource) -> None:
    """Find the shell's hook points and what its blocks return. Raises ModelError for a model that is refused."""
    with shell.without_bytes():
        seen = look(shell)
        catalogue(shell.architecture)
    _texts(shell, source, seen)


def look(frame: Frame) -> "_Blocks":
    """See how the blocks of a model without bytes are called. Raises ModelError for a model that is refused."""
    _whole_blocks(frame)
    seen = _Blocks(frame)
    if len(seen.dtypes) > 1:
        raise refusal(frame, f"its residual stream changes its precision ({', '.join(map(str, seen.dtypes))})")
    frame.outputs, frame.residual_dtype = seen.outputs, seen.dtypes.pop()
    return seen


class _Blocks:
    """How the blocks are called in a whole forward pass, and what they return."""

    def __init__(self, shell: Frame) -> None:
        self.calls: list[list[tuple[str, Any]]] = []
        self.outputs: list[int] = []
        self.dtypes: set[torch.dtype] = set()
        self._shell = shell
        self._last: Any = None
        self._shared: dict[int, Any] = {}
        handles = []
        for number, block in enumerate(shell.blocks):
            handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(block.register_forward_hook(self._after))
        try:
            with torch.inference_mode():
                shell.model(input_ids=torch.zeros(2, TOKENS, dtype=torch.int64), use_cache=False)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise refusal(shell, f"it cannot be run without its weights ({' '.join(str(error).split())})") from None
        finally:
            for handle in handles:
                handle.remove()
        if len(self.calls) != len(shell.blocks):
            raise refusal(shell, f"{len(self.calls)} of its {len(shell.blocks)} blocks ran")

    def _before(self, number: int) -> Any:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number != len(self.calls):
                raise refusal(self._shell, f"block {number} ran out of turn")
            named = not (args and isinstance(args[0], torch.Tensor))
            residual = kwargs.get("hidden_states") if named else args[0]
            expected = (2, TOKENS, self._shell.architecture.hidden_size)
            if not isinstance(residual, torch.Tensor) or tuple(residual.shape) != expected:
                shape = list(residual.shape) if isinstance(residual, torch.Tensor) else type(residual).__name__
                raise refusal(self._shell, f"what goes into block {number} is no residual stream of its own: {shape}")
            if number and residual is not self._last:
                raise refusal(self._shell, f"the residual is changed between block {number - 1} and block {number}")
            self.dtypes.add(residual.dtype)
            rest = (args if named else args[1:], {k: v for k, v in kwargs.items() if not (named and v is residual)})
            self._no_shared_state(number, rest)
            self.calls.append(list(_leaves(rest)))

        return hook

    def _after(self, block: Any, args: Any, output: Any) -> None:
        self.outputs.append(len(output) if isinstance(output, tuple | list) else 0)
        self._last = output[0] if isinstance(output, tuple | list) else output

    def _no_shared_state(self, number: int, arguments: Any) -> None:
        args, kwargs = arguments
        for value in [*args, *kwargs.values()]:
            if isinstance(value, dict | list | set):
                if id(value) in self._shared:
                    kind = type(value).__name__
                    raise refusal(self._shell, f"blocks pass a {kind} from one to the next (block {number} has it too)")
                self._shared[id(value)] = value


def _whole_blocks(shell: Frame) -> None:
    """Every block has weights and modules of its own."""
    owner: dict[int, int] = {}
    for number, block in enumerate(shell.blocks):
        for part in [*block.modules(), *block.parameters()]:
            if owner.setdefault(id(part), number) != number:
                raise refusal(shell, f"block {number} shares weights with block {owner[id(part)]}")


def _texts(shell: Shell, source: BlockSource, seen: _Blocks) -> None:
    """The shell calls the blocks as the model does, and in the same way for two texts."""
    vocabulary = shell.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(5)
    with shell.embedded(source):
        calls = [shell.record(torch.randint(vocabulary, (2, TOKENS), generator=generator)) for _ in range(2)]
    for number, (first, second) in enumerate(zip(*calls, strict=True)):
        ours, others = list(_leaves_of(first)), list(_leaves_of(second))
        if [_kind(*leaf) for leaf in ours] != [_kind(*leaf) for leaf in seen.calls[number]]:
            raise refusal(shell, f"block {number} takes more than the residual from the blocks before it")
        for (path, one), (_, other) in zip(ours, others, strict=True):
            if isinstance(one, torch.Tensor):
                if one.shape != other.shape or not torch.equal(one, other):
                    raise refusal(shell, f"block {number} is given something that depends on the text ({path})")
            elif not isinstance(one, PLAIN) and one is not CACHE:
                raise refusal(shell, f"block {number} is given a {type(one).__name__}, which may carry state ({path})")


def _leaves_of(call: Call) -> Iterator[tuple[str, Any]]:
    kwargs = {k: v for k, v in call.kwargs.items() if not (call.named and k == "hidden_states")}
    return _leaves((call.args, kwargs))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple | list):
        for number, entry in enumerate(value):
            yield from _leaves(entry, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _kind(path: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return path, tuple(value.shape), value.dtype
    return path, "cache" if isinstance(value, Cache) or value is CACHE else type(value)


def refusal(shell: Frame, reason: str) -> ModelError:
    """The one line with which a model is refused."""
    model: PreTrainedModel = shell.model
    return ModelError(
        f"{type(model).__name__} cannot be run block by block: {reason}; set extraction.execution=resident"
    )
