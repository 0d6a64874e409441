"""Where a Hugging Face model keeps its blocks, and the numbers of its config.

Blocks are found from what transformers declares (`_can_record_outputs`, `_no_split_modules`), not from a list of
architectures.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from theloom.errors import ModelError
from theloom.schema import ArchitectureConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class BlockNotLoadedError(Exception):
    """A forward pass came to a block that is not loaded, since no hook point needs it: its end."""


@dataclass(frozen=True)
class Architecture:
    """A model, and its blocks in the order in which they run."""

    model: "PreTrainedModel"
    blocks: list["torch.nn.Module"]
    hidden_size: int

    @property
    def loaded(self) -> list["torch.nn.Module"]:
        """Those of the blocks that are loaded: the first ones, up to the deepest that is needed."""
        return [b for b in self.blocks if not getattr(b, "not_loaded", False)]


@dataclass(frozen=True)
class Numbers:
    """What a config says of a decoder's size. All sizes in elements, `context_length` in tokens (0: not said)."""

    model_type: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    sliding_window: bool = False  # whether the attention of any block sees less than the whole context


def numbers(config: "PretrainedConfig") -> Numbers:
    """The numbers of a model's text decoder. Raises ModelError where the config has no blocks or width."""
    text = config.get_text_config()
    blocks = getattr(text, "num_hidden_layers", None)
    hidden = getattr(text, "hidden_size", None)
    if not blocks or not hidden:
        raise ModelError(f"{config.model_type}: its config has no num_hidden_layers or hidden_size; not a text decoder")
    heads = _said(text, "num_attention_heads") or 1
    return Numbers(
        model_type=config.model_type,
        hidden_size=hidden,
        num_blocks=blocks,
        num_heads=heads,
        num_kv_heads=_said(text, "num_key_value_heads") or heads,
        head_dim=_said(text, "head_dim") or hidden // heads,
        intermediate_size=_said(text, "intermediate_size") or _said(text, "n_inner") or 4 * hidden,
        vocab_size=text.vocab_size,
        context_length=_context_length(text),
        sliding_window=bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True),
    )


# number positions from one after that of the padding token, so that the first ones are never used
POSITIONS_AFTER_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def _context_length(text: "PretrainedConfig") -> int:
    limit = getattr(text, "max_position_embeddings", None) or 0
    if limit and text.model_type in POSITIONS_AFTER_PADDING:
        return limit - 1 - (text.pad_token_id or 0)
    return limit


def _said(config: "PretrainedConfig", name: str) -> Any:
    """What a config says, the largest where it says something for every block by itself (Gemma 4), or None."""
    per_block = getattr(config, "per_layer_config", None) or []
    value = max((getattr(c, name, None) or 0 for c in per_block), default=0) or getattr(config, name, None)
    return max(value) if isinstance(value, list) else value


def numbers_of_profile(declared: ArchitectureConfig) -> Numbers:
    """The same from the numbers that a profile carries, without transformers."""
    return Numbers(
        model_type=declared.model_type,
        hidden_size=declared.hidden_size,
        num_blocks=declared.num_hidden_layers,
        num_heads=declared.num_attention_heads,
        num_kv_heads=declared.num_key_value_heads,
        head_dim=declared.head_dim or declared.hidden_size // declared.num_attention_heads,
        intermediate_size=declared.intermediate_size,
        vocab_size=declared.vocab_size,
        context_length=declared.max_position_embeddings,
    )


def describe(model: "PreTrainedModel") -> Architecture:
    """Find the blocks of a model. Raises ModelError where they cannot be told for certain.

    They are the list of as many modules as the config says, of classes that transformers declares for the part of the
    model that owns them. Where no list is so, any list of that length will do, or any of those classes; where more than
    one is, a forward pass of three tokens says which one runs.
    """
    size = numbers(model.config)
    every = _module_lists(model)
    lists = [(owner, blocks) for owner, blocks in every if len(blocks) in (size.num_blocks, _decoder_blocks(model))]
    declared = {name for owner, _ in every for name in _declared_block_classes(owner)}
    found = [blocks for owner, blocks in lists if _declared(owner, blocks)] or [blocks for _, blocks in lists]
    found = found or [blocks for owner, blocks in every if _declared(owner, blocks)]
    if len(found) > 1:
        found = _those_that_run(model, found)
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: cannot tell which modules are its {size.num_blocks} blocks "
            f"(declared: {', '.join(sorted(declared)) or 'none'}; lists of that length: {len(lists)})"
        )
    return Architecture(model, found[0], size.hidden_size)


def _decoder_blocks(model: "PreTrainedModel") -> int:
    """Blocks of the decoder, where a config has numbers for an encoder as well."""
    return int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None) or 0)


def _declared_block_classes(owner: "PreTrainedModel") -> set[str]:
    """Names of the classes that transformers declares to give hidden states, or never to be split over devices."""
    recorded: Any = (owner._can_record_outputs or {}).get("hidden_states")
    names = set(owner._no_split_modules or [])
    for entry in recorded if isinstance(recorded, list | tuple) else [recorded]:
        entry = getattr(entry, "target_class", entry)
        if entry is not None:
            names.add(entry if isinstance(entry, str) else entry.__name__)
    return names


def _declared(owner: "PreTrainedModel", blocks: list["torch.nn.Module"]) -> bool:
    declared = _declared_block_classes(owner)
    return all(type(block).__name__ in declared for block in blocks)


def _module_lists(model: "PreTrainedModel") -> list[tuple["PreTrainedModel", list["torch.nn.Module"]]]:
    """Every list of modules, with the innermost PreTrainedModel that it lies in."""
    import torch
    from transformers import PreTrainedModel

    owners: dict[str, PreTrainedModel] = {}
    found = []
    for name, module in model.named_modules():  # from the outside in
        parent = next((owners[n] for n in _prefixes(name) if n in owners), model)
        owners[name] = module if isinstance(module, PreTrainedModel) else parent
        if isinstance(module, torch.nn.ModuleList) and len(module):
            found.append((parent, list(module)))
    return found


def _prefixes(name: str) -> list[str]:
    """The names of the modules that one lies in, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _those_that_run(model: "PreTrainedModel", lists: list[list["torch.nn.Module"]]) -> list[list["torch.nn.Module"]]:
    """The lists whose modules all run, on their own or within each other's outermost, in a pass of three tokens."""
    from theloom.flow import forward_three_tokens

    ran: set[torch.nn.Module] = set()
    modules = {module for blocks in lists for module in blocks}
    handles = [module.register_forward_hook(lambda module, *_: ran.add(module)) for module in modules]
    try:
        forward_three_tokens(model)
    finally:
        for handle in handles:
            handle.remove()
    found = [blocks for blocks in lists if all(block in ran for block in blocks)]
    inner = {m for blocks in found for block in blocks for m in block.modules() if m is not block}
    return [blocks for blocks in found if not any(block in inner for block in blocks)]
