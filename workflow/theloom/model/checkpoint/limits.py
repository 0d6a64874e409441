"""Bounds of a model that a config may describe: beyond them, building it even without weights would
take hours, or all memory.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import LAYERS, SIZE
from theloom.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

EXPERTS = 100_000
MODULES = 300_000  # the largest models have half as many
_DEEPEST = 32

_LIMITS = (
    (re.compile(r"(^|_)(layers?|blocks?|depths?|block_count|cells|codebooks)($|_count$)"), LAYERS),
    (re.compile(r"(^|_)experts$|^expert_count$"), EXPERTS),
    (re.compile(r"(_size|_dim|_heads?|_length|_embeddings|_positions|head_count|_inner)$"), SIZE),
    (re.compile(r"^(n_embd|n_positions|n_ctx|d_model|d_ff|d_kv|dim|hidden_dim)$"), SIZE),
)
_NOT_NEGATIVE = re.compile(
    r"^(vocab_size|hidden_size|intermediate_size|num_hidden_layers|num_attention_heads"
    r"|num_key_value_heads|head_dim|n_embd|n_layer|n_head|n_inner|d_model|block_count"
    r"|embedding_length)$"
)


def check_config(described: Mapping[str, Any], where: str) -> None:
    """Check the numbers of a model's config, those of its parts included.

    Args:
        described: what `config.json`, or a GGUF file's metadata, holds.
        where: which model, for the message.

    Raises:
        ModelError: a number is negative or beyond its bound, or the config is nested too deeply.

    Examples:
        >>> check_config({"num_hidden_layers": 10**7}, "model.source: x")
        Traceback (most recent call last):
            ...
        theloom.errors.ModelError: model.source: x: num_hidden_layers=10000000 in its config is \
beyond 1,000; give the config of a model that exists
    """
    left: list[tuple[str, Any, int]] = [("", described, 0)]
    while left:
        name, value, depth = left.pop()
        if depth > _DEEPEST:
            raise ModelError(f"{where}: its config has more than {_DEEPEST} levels; correct it")
        if isinstance(value, Mapping):
            left += [(str(key), child, depth + 1) for key, child in value.items()]
        elif isinstance(value, list):
            left += [(name, child, depth + 1) for child in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name.rpartition(".")[2], value, where)


def _check_number(name: str, value: float, where: str) -> None:
    most = next((limit for pattern, limit in _LIMITS if pattern.search(name)), None)
    if most is not None and not value <= most:
        raise ModelError(
            f"{where}: {name}={_shown(value)} in its config is beyond {most:,}; give the config of "
            "a model that exists"
        )
    if _NOT_NEGATIVE.search(name) and not value >= 0:
        raise ModelError(f"{where}: {name}={_shown(value)} in its config is negative; correct it")


def _shown(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 1e18 else str(value)


@contextmanager
def bounded_build() -> Iterator[None]:
    """Within the context a model of too many modules is a ModelError before it fills the memory."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def registered(parent: "nn.Module", name: str, child: "nn.Module | None") -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise ModelError(
                f"{type(parent).__name__}: more than {MODULES:,} modules by its config; give the "
                "config of a model that exists"
            )

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
