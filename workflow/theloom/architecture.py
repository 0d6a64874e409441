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
    heads = getattr(text, "num_attention_heads", None) or 1
    return Numbers(
        model_type=config.model_type,
        hidden_size=hidden,
        num_blocks=blocks,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        intermediate_size=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        vocab_size=text.vocab_size,
        context_length=getattr(text, "max_position_embeddings", None) or 0,
        sliding_window=bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True),
    )


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
    """Find the blocks of a model. Raises ModelError where they cannot be told for certain."""
    size = numbers(model.config)
    declared = _declared_block_classes(model)
    lists = _module_lists(model, size.num_blocks)
    blocks = next((found for found in lists if all(type(b).__name__ in declared for b in found)), None)
    if blocks is None and len(lists) == 1:
        blocks = lists[0]
    if blocks is None:
        raise ModelError(
            f"{type(model).__name__}: cannot tell which modules are its {size.num_blocks} blocks "
            f"(declared: {', '.join(sorted(declared)) or 'none'}; lists of that length: {len(lists)})"
        )
    return Architecture(model, blocks, size.hidden_size)


def _declared_block_classes(model: "PreTrainedModel") -> set[str]:
    """Names of the classes that transformers declares to give hidden states, or never to be split over devices."""
    from transformers import PreTrainedModel

    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorded: Any = (module._can_record_outputs or {}).get("hidden_states")
            for entry in recorded if isinstance(recorded, list | tuple) else [recorded]:
                entry = getattr(entry, "target_class", entry)
                if entry is not None:
                    names.add(entry if isinstance(entry, str) else entry.__name__)
            names.update(module._no_split_modules or [])
    return names


def _module_lists(model: "PreTrainedModel", length: int) -> list[list["torch.nn.Module"]]:
    import torch

    return [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == length]
