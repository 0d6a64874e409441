"""Models that compute a token otherwise in a longer document: where, and how a pass is told.

LongRoPE has two sets of rotary frequencies, and dynamic NTK scaling one for every length beyond the
trained one. transformers chooses by the longest position of a *pass*, so a short window beside a
long one, or a chunk of a long one, would get another document's frequencies. Here windows share a
batch only where their lengths choose alike (`corpus.batching`), and a chunk's pass is told how long
its document is (`as_long_as`).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


# keys of configs that hold such a length
_LENGTHS = (
    "sliding_window",
    "sliding_window_size",
    "local_attention",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
    "index_topk",
    "original_max_position_embeddings",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class LengthSwitch:
    """A length beyond which a model computes its tokens otherwise.

    Attributes:
        name: What changes there, as the model's config names it.
        beyond: Tokens of the longest document that is computed the first way.
        every_length: Whether each length beyond it has a way of its own; else all share one.
    """

    name: str
    beyond: int
    every_length: bool

    def way(self, tokens: int) -> int:
        """A number that two lengths share if their documents are computed alike.

        Args:
            tokens: Length of a document.

        Returns:
            0 up to `beyond`; then the length itself where each has a way of its own, else 1.

        Examples:
            >>> longrope = LengthSwitch("longrope", 4096, every_length=False)
            >>> [longrope.way(tokens) for tokens in (24, 4096, 4097, 9000)]
            [0, 0, 1, 1]
        """
        if tokens <= self.beyond:
            return 0
        return tokens if self.every_length else 1


def ways(switches: Iterable[LengthSwitch], tokens: int) -> tuple[int, ...]:
    """Tell how a document is computed, by switch.

    Args:
        switches: Of the model.
        tokens: Length of the document.

    Returns:
        A number for each switch; documents with the same numbers are computed alike.
    """
    return tuple(switch.way(tokens) for switch in switches)


def length_switches(config: "PretrainedConfig") -> tuple[LengthSwitch, ...]:
    """The switches that a model's config names.

    Args:
        config: A config of transformers, or of a model with code of its own.

    Returns:
        The switches, shortest first; none for most models.

    Examples:
        >>> from transformers import LlamaConfig
        >>> rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        >>> length_switches(LlamaConfig(max_position_embeddings=64, rope_parameters=rope))
        (LengthSwitch(name='dynamic', beyond=64, every_length=True),)
    """
    found: set[tuple[int, str, bool]] = set()
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        trained = _number(part, "max_position_embeddings") or _number(part, "seq_length")
        for rope in _ropes(part):
            name = str(rope.get("rope_type") or rope.get("type") or "default")
            if "dynamic" in name and trained:
                found.add((trained, name, True))
            elif name in ("longrope", "su"):
                original = rope.get("original_max_position_embeddings") or _number(
                    part, "original_max_position_embeddings"
                )
                if original:
                    found.add((int(original), name, False))
        if getattr(part, "use_dynamic_ntk", False) and trained:
            found.add((trained, "use_dynamic_ntk", True))
        if getattr(part, "attention_type", None) == "block_sparse":
            full = (5 + 2 * int(part.num_random_blocks)) * int(part.block_size)
            found.add((full, "block_sparse", True))
    return tuple(LengthSwitch(name, beyond, every) for beyond, name, every in sorted(found))


def notable_lengths(config: "PretrainedConfig") -> tuple[int, ...]:
    """Tokens beyond which a model attends to, or places, a document's tokens otherwise.

    These are its switches, and lengths that need no care in batches and chunks but deserve a look:
    sliding windows, chunked and sparse attention, the trained length.

    Args:
        config: The model's config.

    Returns:
        Lengths in tokens, shortest first.

    Examples:
        >>> from transformers import MistralConfig
        >>> notable_lengths(MistralConfig(sliding_window=4096, max_position_embeddings=32768))
        (4096, 32768)
    """
    text = config.get_text_config(decoder=True)
    found = {switch.beyond for switch in length_switches(config)}
    found |= {n for name in _LENGTHS if (n := _number(text, name)) is not None and n > 1}
    return tuple(sorted(found))


def rotary_modules(model: "nn.Module") -> list["nn.Module"]:
    """Find the modules that choose rotary frequencies by the longest position of a pass.

    Args:
        model: Of transformers.

    Returns:
        The modules; none for most models.
    """
    if model not in _with_rope:  # found once: passes over all modules would cost each batch
        _with_rope[model] = [m for m in model.modules() if "rope_type" in vars(m)]
    return [
        module
        for module in _with_rope[model]
        if any("dynamic" in name or name == "longrope" for name in _types(module))
        and "position_ids" in inspect.signature(type(module).forward).parameters
    ]


@contextmanager
def as_long_as(model: "nn.Module", tokens: int) -> Iterator[None]:
    """Passes of chunks use the rotary frequencies of a document of so many tokens.

    Each module that chooses frequencies is shown one more position, the document's last, whose own
    result is dropped.

    Args:
        model: The model; as it was when the context closes.
        tokens: Length of the document.
    """
    import torch

    def longer(positions: "torch.Tensor") -> "torch.Tensor":
        last = positions.new_full((*positions.shape[:-1], 1), tokens - 1)
        return torch.cat((positions, last), dim=-1)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": longer(kwargs["position_ids"])}
        return (args[0], longer(args[1]), *args[2:]), kwargs

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(value[..., :-1, :] for value in output)

    with ExitStack() as opened:
        for module in rotary_modules(model):
            opened.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            opened.callback(module.register_forward_hook(after).remove)
        yield


def forget_lengths(model: "nn.Module") -> None:
    """Drop the frequencies that earlier, longer passes left in a model with dynamic scaling.

    transformers keeps them until a pass is shorter than the trained length.

    Args:
        model: Of transformers.
    """
    import torch

    for module in rotary_modules(model):
        buffer: Any = next(module.buffers())
        first = torch.zeros(1, 1, dtype=torch.int64, device=buffer.device)
        kinds: Any = module.rope_type
        for layer in kinds if isinstance(kinds, dict) else (None,):
            more = () if layer is None else (layer,)
            with torch.no_grad():
                module(torch.zeros(1, device=buffer.device), first, *more)


def fix_frequencies(model: "nn.Module") -> Callable[[], None]:
    """Make a model without bytes stop choosing: a position that has no value cannot be looked at.

    Args:
        model: The model; frequencies have the same shape whatever is chosen.

    Returns:
        What undoes it.
    """
    undo = ExitStack()
    for module in rotary_modules(model):
        kinds: Any = module.rope_type
        fixed: Any = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
        undo.callback(setattr, module, "rope_type", kinds)
        module.rope_type = fixed
        for rope in _ropes(module.config):
            undo.callback(rope.__setitem__, "rope_type", rope["rope_type"])
            rope["rope_type"] = "default"
    return undo.close


_with_rope: "WeakKeyDictionary[nn.Module, list[nn.Module]]" = WeakKeyDictionary()


def _types(module: "nn.Module") -> Sequence[str]:
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return [str(kind) for kind in kinds.values()]
    return [kinds] if isinstance(kinds, str) else []


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The descriptions of rotary positions in a config: one, or one for each type of layer."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, dict):
            inner = [value for value in rope.values() if isinstance(value, dict)]
            found += inner or [rope]
    return found


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return int(value) if isinstance(value, int | float) and value > 0 else None
