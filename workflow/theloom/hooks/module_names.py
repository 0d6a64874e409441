"""What transformers calls the parts of a block: the small tables of names, and finding modules by
them.
"""

import re
from typing import Any

from torch import nn

from theloom.hooks.blocks import Architecture
from theloom.hooks.sites import is_norm

QUERY_KEY_VALUE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)

# by heads: for each key head its queries, then its key, then its value; else all queries, all keys,
# all values
IN_A_ROW, BY_HEADS = "in a row", "by heads"

FUSED_QUERY_KEY_VALUE = {
    "c_attn": IN_A_ROW,
    "qkv_proj": IN_A_ROW,
    "Wqkv": IN_A_ROW,
    "query_key_value": BY_HEADS,
}

ATTENTION_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo", "o")
GATE_UP_DOWN = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
GATE_AND_UP_IN_ONE = (("gate_up_proj", "down_proj"), ("Wi", "Wo"))

UP_DOWN = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc_in", "fc_out"),
    ("up_proj", "down_proj"),
    ("lin1", "lin2"),
    ("wi", "wo"),
    ("intermediate.dense", "output.dense"),
    ("intermediate_dense", "output_dense"),
)

MLP = ("mlp", "feed_forward", "ffn", "ffns", "block_sparse_moe", "moe", "ff", "feedforward")
OF_LAYER = ("DenseReluDense", "mlp")  # in the last part of a block, as T5's are
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
SCRAMBLED = ("CodeGenAttention",)  # its fused projection is cut for four devices first


def find_attention(block: nn.Module) -> nn.Module | None:
    """Find the self-attention of a block.

    Args:
        block: of a model.

    Returns:
        The module; None where no name or class says attention.
    """
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if (
            name.count(".") > 1
            or is_norm(module)
            or re.search(r"cross|encoder_attn|x_attn", name)
            or not name
        ):
            continue
        named = (
            last in ("attn", "self_attn", "attention", "self_attention")
            or "Attention" in type(module).__name__
        )
        if named and "norm" not in last and len([*module.parameters(), *module.buffers()]):
            return _without_residual(module)
    return None


def _without_residual(module: nn.Module) -> nn.Module:
    """The attention within a module that is norm, attention and residual together, as T5's are."""
    inner = [m for name, m in module.named_children() if name.endswith("SelfAttention")]
    return inner[0] if inner else module


def find_cross_attention(block: nn.Module) -> nn.Module | None:
    """Find the attention of a block to an encoder's states.

    Args:
        block: of a decoder.

    Returns:
        The module; None where no name says so.
    """
    return next((m for n, m in block.named_modules() if CROSS_ATTENTION.fullmatch(n)), None)


CROSS_ATTENTION = re.compile(
    r"(.*\.)?(encoder_attn|cross_?attn|cross_?attention|EncDecAttention)", re.IGNORECASE
)


def find_core(attn: nn.Module) -> nn.Module | None:
    """Find the module within attention whose forward has queries, keys and values meet.

    Args:
        attn: the attention of a block.

    Returns:
        That module, or `attn` itself; None where none is known.
    """
    from theloom.hooks import attention  # imports transformers, which names alone do without

    for module in attn.modules():
        if attention.uses_registry(module):
            return module
    for names in (*QUERY_KEY_VALUE, *((n,) for n in FUSED_QUERY_KEY_VALUE)):
        for module in attn.modules():
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                return module
    return None


def looks_causal(architecture: Architecture) -> bool:
    """Whether no block's self-attention declares to see to the right; `model.checks` tests it.

    Args:
        architecture: of a model.

    Returns:
        False where the self-attention of a block declares `is_causal=False`.
    """
    cores = [
        find_core(attn)
        for block in architecture.blocks
        if (attn := find_attention(block)) is not None
    ]
    return not any(getattr(core, "is_causal", None) is False for core in cores)


def find_mlp(block: nn.Module, attn: nn.Module | None) -> nn.Module | None:
    """Find the MLP of a block where it is one module.

    Args:
        block: of a model.
        attn: its attention, which is not taken for it.

    Returns:
        The module; None where its linears lie in the block itself.
    """
    parts: nn.Module | None = getattr(block, "layer", None)
    homes = [block, parts[-1]] if isinstance(parts, nn.ModuleList) and len(parts) else [block]
    return next(
        (
            m
            for home in homes
            for name in (MLP if home is block else OF_LAYER)
            if isinstance(m := getattr(home, name, None), nn.Module) and m is not attn
        ),
        None,
    )


def first_linear(block: nn.Module, attn: nn.Module | None) -> nn.Module | None:
    """Find the first linear of an MLP whose linears lie in the block itself.

    Args:
        block: of a model.
        attn: its attention, where none is looked for.

    Returns:
        The module, or None.
    """
    return next((m[0] for m in (leaves(block, n, attn) for n in UP_DOWN) if m), None)


def leaf(home: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    """Find a module by the last part of its name.

    Args:
        home: within which to look.
        names: the names, the first one preferred.

    Returns:
        The module; None where there is none, or no `home`.
    """
    if home is None:
        return None
    modules = dict(home.named_modules())
    for wanted in names:
        for name, module in modules.items():
            if name.rpartition(".")[2] == wanted and not is_norm(module):
                return module
    return None


def leaves(
    home: nn.Module, names: tuple[str, ...], exclude: nn.Module | None = None
) -> list[nn.Module] | None:
    """Find several modules next to each other by the last parts of their names.

    Args:
        home: within which to look.
        names: of all of them.
        exclude: within which not to look.

    Returns:
        The modules in the order of the names, nearest to the top; None if any is missing.
    """
    outside = set() if exclude is None else set(exclude.modules())
    modules = {n: m for n, m in home.named_modules() if m not in outside}
    prefixes = sorted(
        {n.rpartition(names[0])[0] for n in modules if f".{n}".endswith(f".{names[0]}")}, key=len
    )
    for prefix in prefixes:
        found = [modules.get(prefix + name) for name in names]
        if all(found):
            return [m for m in found if m is not None]
    return None


def heads_of(core: nn.Module) -> tuple[int, int]:
    """Count the heads of attention, from a module's own numbers or its config's.

    Args:
        core: a module that computes attention.

    Returns:
        Heads of queries and of keys; 0 where neither tells.
    """
    places = [core, getattr(core, "config", None)]
    heads = next(
        (getattr(p, n) for p in places for n in HEADS if isinstance(getattr(p, n, None), int)), 0
    )
    names = ("num_kv_heads", "num_key_value_heads")
    return heads, next(
        (getattr(p, n) for p in places for n in names if isinstance(getattr(p, n, None), int)),
        heads,
    )


def adds_residual(module: nn.Module) -> bool:
    """Whether a module, or one within it, takes the residual as well and adds it.

    Args:
        module: such as a block's attention or MLP.

    Returns:
        True by the names of arguments in its code.
    """
    taken = {name for m in module.modules() for name in type(m).forward.__code__.co_varnames[:4]}
    return bool(taken & {"residual", "input_tensor"})


def token_embedding(model: Any) -> nn.Module | None:
    """The module that embeds token ids.

    Args:
        model: of transformers, or a half of one.

    Returns:
        The one that it says; where it does not know, its only table that is not of positions or
        types.

    Examples:
        >>> from transformers import GPT2Config, GPT2Model
        >>> sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=32)
        >>> token_embedding(GPT2Model(GPT2Config(**sizes)))
        Embedding(32, 8)
    """
    try:
        said: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a half may be a plain module
        tables = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        found = [m for n, m in tables if not re.search(r"position|wpe|type", n)]
        return found[0] if len(found) == 1 else None
    return said
