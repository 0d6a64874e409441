"""Models that pad a pass to whole chunks of their attention, and cut it into them (Reformer): their
rows depend on the length of the pass, and may depend on chance.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from theloom.errors import HookError


def pads_to_chunks(module: nn.Module) -> bool:
    """Whether a module pads its tokens to whole chunks, behind them.

    Args:
        module: of a model.

    Returns:
        True where its class has such a method.
    """
    return hasattr(type(module), "_pad_to_mult_of_chunk_length")


def sees_whole_pass(model: nn.Module) -> bool:
    """Whether what a token sees depends on how long the pass is.

    Args:
        model: of transformers.

    Returns:
        True where attention cuts the pass into chunks: the first of them sees the last, and hashes
        sort all tokens of a pass.
    """
    return any(pads_to_chunks(module) for module in model.modules())


def hashing(model: nn.Module) -> list[nn.Module]:
    """The modules that sort the tokens of a pass by hashes.

    Args:
        model: of transformers.

    Returns:
        Those whose class has such a method; none for most models.
    """
    if model not in _hashing:  # found once: passes over all modules would cost each batch
        _hashing[model] = [m for m in model.modules() if hasattr(type(m), "_hash_vectors")]
    return _hashing[model]


_hashing: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


def check_seed(module: Any, args: Any, output: Any) -> None:
    """A forward hook of modules that hash.

    Args:
        module: of a model.
        args: of its call.
        output: what it returned; it has `buckets` where it hashed.

    Raises:
        HookError: it hashed by random rotations, so that the rows of the pass are others each time.
    """
    if output.buckets is not None and module.hash_seed is None:
        raise HookError(
            f"{type(module).__name__} sorts the tokens of more than {module.chunk_length} by "
            "random rotations, which are others in each pass; set hash_seed in the model's "
            f"config.json, or corpus.context_length to at most {module.chunk_length}"
        )
