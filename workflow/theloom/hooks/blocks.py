"""Where a Hugging Face model keeps its blocks, and the numbers of its config.

Blocks are found from what transformers declares (`_can_record_outputs`, `_no_split_modules`), not
from a list of architectures.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from theloom.config.model_dims import numbers, side_of, stages_of
from theloom.errors import ModelError
from theloom.hooks.layouts.ends import (
    Ends,
    ends_of_streams,
    listed_blocks,
    of_several_streams,
    on_copy,
    parts_of,
)
from theloom.hooks.layouts.trial import forward_three_tokens
from theloom.hooks.pass_state import PassState
from theloom.hooks.points import RESIDUALS, HookPoint, residual_points
from theloom.hooks.sites import Site
from theloom.hooks.stages.search import find_stages
from theloom.hooks.stages.stage import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """A model, and its blocks in the order in which they run. A module that runs several times in
    a pass, as ALBERT's, is as many blocks. Those of a model in stages are the modules whose outputs
    its stages are, and its hidden size is the widest of theirs.

    `ends` says where the residual stream enters and leaves each block; where it is empty, these are
    the block's first input and output.
    """

    model: "PreTrainedModel"
    blocks: list["torch.nn.Module"]
    hidden_size: int
    stages: Stages | None = None
    ends: Sequence[Ends] = ()

    @property
    def called(self) -> list["torch.nn.Module"]:
        """The modules that the model calls to run its blocks, in that order: mostly the blocks."""
        return [part for block in self.blocks for part in parts_of(block)]

    def ends_of(self, block: int) -> Ends:
        """Where the residual stream enters a block, and where it is after it.

        Args:
            block: its number.

        Returns:
            The two sites, of `hook_resid_pre` and `hook_resid_post`, which are read as a whole.
        """
        if self.ends:
            return self.ends[block]
        return Site(self.blocks[block], "input"), Site(self.blocks[block], "output")

    def residual(self, point: HookPoint) -> Site:
        """Where a residual is.

        Args:
            point: `hook_resid_pre` or `hook_resid_post` of a block.

        Returns:
            The site, which is read as a whole.
        """
        return self.ends_of(point.block)[RESIDUALS.index(point.value)]

    @property
    def loaded(self) -> list["torch.nn.Module"]:
        """Those of the blocks that are loaded: the first ones, up to the deepest that is needed."""
        return [b for b in self.blocks if not getattr(b, "not_loaded", False)]

    @cached_property
    def calls(self) -> list[int]:
        """Of each block, how often its module ran before in the same pass."""
        return [self.blocks[:number].count(block) for number, block in enumerate(self.blocks)]

    @cached_property
    def repeats(self) -> bool:
        """Whether a module runs several times in a pass, as several blocks; the input and the
        output of one may be two stages.
        """
        return self.stages is None and any(self.calls)

    @property
    def side(self) -> str:
        """`encoder` or `decoder` where the model is read as that half of itself; else empty."""
        return side_of(self.model.config)

    @property
    def part(self) -> "PreTrainedModel":
        """The module that owns embedding, blocks and final norm: a half, or the model."""
        return part_of(self.model)

    @property
    def stream(self) -> list[HookPoint]:
        """What the model's own hidden states are of: the residuals before and after every block, or
        the outputs of all stages.
        """
        if self.stages is not None:
            return self.stages.catalog.points
        return residual_points(len(self.blocks), self.hidden_size, self.side)

    def on(self, model: "PreTrainedModel") -> "Architecture":
        """The same for another copy of the model.

        Args:
            model: of the same class; parts that do not run may be missing.

        Returns:
            Its architecture.
        """
        there, ends = on_copy(self.model, model, self.blocks, self.ends)
        stages = None if self.stages is None else self.stages.on(there)
        return Architecture(model, there, self.hidden_size, stages, ends)

    @cached_property
    def pass_state(self) -> PassState:
        """What the model remembered when this was first read: before the first pass over tokens."""
        return PassState(self.model)


def part_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """The half of an encoder-decoder that is read; of any other model the model itself.

    Args:
        model: of transformers.

    Returns:
        The module `encoder` or `decoder`, or the model.
    """
    side = side_of(model.config)
    return getattr(model, side) if side else model


def find_blocks(model: "PreTrainedModel") -> Architecture:
    """Find the blocks of a model.

    They are the list of as many modules as the config says, of classes that transformers declares
    for the part of the model that owns them. Where no list is so, any list of that length will do,
    or any of those classes; where more than one is, a forward pass of three tokens says which one
    runs. Where several run in turn, one module of each list is a block (`layouts.ends`).

    Args:
        model: of transformers; its weights may be on the meta device.

    Returns:
        The model with its blocks.

    Raises:
        ModelError: they cannot be told for certain.
    """
    if stages_of(model.config):
        stages = find_stages(model)
        modules = [stage.site.module for stage in stages.found]
        return Architecture(model, modules, max(s.width for s in stages.found), stages)
    size = numbers(model.config)
    every = _module_lists(part_of(model))
    lists = [
        (owner, blocks)
        for owner, blocks in every
        if len(blocks) in (size.num_blocks, _decoder_blocks(model))
    ]
    declared = {name for owner, _ in every for name in _declared_block_classes(owner)}
    found = [blocks for owner, blocks in lists if _declared(owner, blocks)] or [
        blocks for _, blocks in lists
    ]
    if not found:
        found = [blocks for owner, blocks in every if _declared(owner, blocks)]
        found = _repeated(model, found) or found
    if len(found) > 1:
        found = _those_that_run(model, found)
    if len(found) == 2 and all(hasattr(model, part) for part in ("encoder", "decoder")):
        raise ModelError(
            f"{type(model).__name__} has an encoder and a decoder, and both run: whose hidden "
            "states are meant cannot be told; name hook points of one of them, as "
            "encoder.blocks.0.hook_resid_post, or give a model of one of them alone"
        )

    def run() -> Any:
        return forward_three_tokens(model, output_hidden_states=True)

    if (listed := _listed(lists, found, run)) is not None:
        return Architecture(model, listed[0], size.hidden_size, ends=listed[1])
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: cannot tell which modules are its {size.num_blocks} blocks "
            f"(declared: {', '.join(sorted(declared)) or 'none'}; lists of that length: "
            f"{len(lists)})"
        )
    ends: Sequence[Ends] = ()
    if of_several_streams(found[0]):
        ends = ends_of_streams(type(model).__name__, found[0], run)
    return Architecture(model, found[0], size.hidden_size, ends=ends)


def _listed(
    lists: list[tuple["PreTrainedModel", list["torch.nn.Module"]]],
    found: list[list["torch.nn.Module"]],
    run: Any,
) -> tuple[list["torch.nn.Module"], list[Ends]] | None:
    """Blocks that lie in several lists of one owner, all of which run."""
    owners = {id(owner): owner for owner, blocks in lists if blocks in found}
    if len(found) < 2 or len(owners) != 1 or len({len(blocks) for blocks in found}) != 1:
        return None
    (owner,) = owners.values()
    return listed_blocks(owner, found, run)


def _decoder_blocks(model: "PreTrainedModel") -> int:
    """Blocks of the decoder, where a config has numbers for an encoder as well."""
    return int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None) or 0)


def _declared_block_classes(owner: "PreTrainedModel") -> set[str]:
    """Names of the classes that transformers declares to give hidden states, or never to be split
    over devices.
    """
    # a half may be a plain module, as in FSMT
    recorded: Any = (getattr(owner, "_can_record_outputs", None) or {}).get("hidden_states")
    names = set(getattr(owner, "_no_split_modules", None) or [])
    for entry in recorded if isinstance(recorded, list | tuple) else [recorded]:
        entry = getattr(entry, "target_class", entry)
        if entry is not None:
            names.add(entry if isinstance(entry, str) else entry.__name__)
    return names


def _declared(owner: "PreTrainedModel", blocks: list["torch.nn.Module"]) -> bool:
    declared = _declared_block_classes(owner)
    return all(type(block).__name__ in declared for block in blocks)


def _module_lists(
    model: "PreTrainedModel",
) -> list[tuple["PreTrainedModel", list["torch.nn.Module"]]]:
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


def _repeated(
    model: "PreTrainedModel", lists: list[list["torch.nn.Module"]]
) -> list[list["torch.nn.Module"]]:
    """The modules of some lists in the order in which they run, where one runs more than once; no
    list where none does.
    """
    ran: list[torch.nn.Module] = []
    try:
        with _told_of({module for blocks in lists for module in blocks}, ran.append):
            forward_three_tokens(model)
    except ModelError:  # it may run in another precision, or on real values
        return []
    return [ran] if len(set(ran)) < len(ran) else []


@contextmanager
def _told_of(
    modules: "set[torch.nn.Module]", told: "Callable[[torch.nn.Module], object]"
) -> Iterator[None]:
    """Tell of each call of some modules."""
    handles = [m.register_forward_hook(lambda module, *_: told(module) and None) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _those_that_run(
    model: "PreTrainedModel", lists: list[list["torch.nn.Module"]]
) -> list[list["torch.nn.Module"]]:
    """The lists whose modules all run, on their own or within each other's outermost, in a pass of
    three tokens.
    """
    ran: set[torch.nn.Module] = set()
    with _told_of({module for blocks in lists for module in blocks}, ran.add):
        forward_three_tokens(model)
    found = [blocks for blocks in lists if all(block in ran for block in blocks)]
    inner = {m for blocks in found for block in blocks for m in block.modules() if m is not block}
    return [blocks for blocks in found if not any(block in inner for block in blocks)]
