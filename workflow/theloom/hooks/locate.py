"""Where the values of hook points are in a Hugging Face model.

Projections are known by the names that transformers uses for them (`module_names`). Which norm
comes before what, and whether attention and MLP run one after the other, is seen in a forward pass
of three tokens: by which module's output is which one's input. What a model has not, or has in
another meaning, is refused with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from theloom.errors import HookError
from theloom.hooks import attention
from theloom.hooks.attention import ROT_K, ROT_Q
from theloom.hooks.blocks import Architecture
from theloom.hooks.cross import cross_sites
from theloom.hooks.dataflow import Flow
from theloom.hooks.layouts.chunked import sees_whole_pass
from theloom.hooks.layouts.ends import ListedBlock, of_several_streams
from theloom.hooks.module_names import (
    ATTENTION_OUTPUT,
    BY_HEADS,
    FUSED_QUERY_KEY_VALUE,
    GATE_AND_UP_IN_ONE,
    GATE_UP_DOWN,
    IN_A_ROW,
    QUERY_KEY_VALUE,
    SCRAMBLED,
    UP_DOWN,
    adds_residual,
    find_attention,
    find_core,
    find_mlp,
    first_linear,
    heads_of,
    leaf,
    leaves,
    token_embedding,
)
from theloom.hooks.points import (
    BEFORE_BLOCKS,
    FINAL_NORM,
    IN_BLOCK,
    LAST_STATE,
    NO_EXPERTS,
    NO_LEARNED_POSITIONS,
    PATTERN,
    POST_NORM,
    RESIDUALS,
    ROUTER,
    SCORES,
    HookPoint,
    point,
    values_in_block,
)
from theloom.hooks.recurrent import recurrent_sites
from theloom.hooks.routers import declared_routers, router_sites
from theloom.hooks.sites import Site, by_head, columns, first_rows, grouped, norm_sites, stream
from theloom.rows.modality import senses


@dataclass
class Anatomy:
    """The sites of all hook points that a model has, by name, and the reasons for those that it has
    not.
    """

    final_norm: nn.Module | None = None
    end: nn.Module | None = None  # after it, all hook points behind the blocks have been read
    sites: dict[str, Site] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    points: list[HookPoint] = field(default_factory=list)  # of the sites, without shapes
    signature: tuple[int, ...] = ()

    @staticmethod
    def of(architecture: Architecture) -> "Anatomy":
        """The anatomy of a model, found once as long as its modules are the same.

        Args:
            architecture: the model with its blocks.

        Returns:
            The sites of its hook points, and the reasons for those that it does not have.

        Raises:
            ModelError: the model's code fails with a few tokens.
        """
        signature = tuple(map(id, architecture.model.modules()))
        found = _known.get(architecture.model)
        if found is None or found.signature != signature:
            found = _known[architecture.model] = _find(architecture)
            found.signature = signature
        return found

    def site(self, requested: HookPoint) -> Site:
        """Where a hook point is.

        Args:
            requested: the hook point.

        Returns:
            The module, and how to read the value there.

        Raises:
            HookError: the model does not have it.
        """
        if requested.name not in self.sites:
            raise HookError(
                f"{requested.name}: "
                f"{self.unsupported.get(requested.name, 'this model has no such hook point')}"
            )
        return self.sites[requested.name]


_known: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def _find(architecture: Architecture) -> Anatomy:
    found = Anatomy()
    count, values = len(architecture.blocks), values_in_block(architecture.side)
    flow = Flow(architecture)
    organs: list[tuple[int, str, Site | str]] = []
    organs += [(-1, value, where) for value, where in _before(architecture, flow).items()]
    declared = declared_routers(architecture.model)
    for number, block in enumerate(architecture.loaded):
        if architecture.repeats:
            organs += [
                (number, value, _SEVERAL_CALLS) for value in values if value not in RESIDUALS
            ]
            organs += [(number, *ends) for ends in _residuals(architecture, number).items()]
            continue
        sites = _Block(block, flow).sites(declared)
        sites |= _residuals(architecture, number)
        if architecture.side == "decoder":
            sites |= cross_sites(block, flow, sites)
        organs += [(number, value, sites[value]) for value in values]
    norm = flow.norm_of(flow.output(architecture.blocks[-1]), outside=True)
    several = norm is not None and flow.ran.count(norm.module) > 1
    if norm is not None and not several:
        found.final_norm = norm.module
    missing = _SEVERAL_CALLS if several else "no norm takes the last block's output"
    final = norm_sites(None if several else norm, missing)
    unloaded = range(len(architecture.loaded), count)
    organs += [
        (number, value, "its block is not loaded") for number in unloaded for value in values
    ]
    organs += [(count, value, where) for value, where in zip(FINAL_NORM, final, strict=True)]
    last = _last_state(architecture, flow)
    missing = "the model's last hidden state is no module's output"
    if last is not None and flow.ran.count(last.module) > 1:
        last, missing = None, _SEVERAL_CALLS
    found.end = found.final_norm if last is None else last.module
    organs.append((count, LAST_STATE, missing if last is None else last))
    if sees_whole_pass(architecture.model):
        organs = [(n, value, _of_tokens(where)) for n, value, where in organs]
    for block_number, value, where in organs:
        new = point(value, block_number, count, (), architecture.side)
        if isinstance(where, str):
            found.unsupported[new.name] = where
        else:
            found.sites[new.name] = where
            found.points.append(new)
    return found


def _last_state(architecture: Architecture, flow: "Flow") -> Site | None:
    """Where what the model gives as its last hidden state comes out: of the final norm for most, a
    projection behind it, the last block, or a module round it.
    """
    last = architecture.called[-1]
    behind = flow.ran[flow.ran.index(last) :] if last in flow.ran else []
    around = (m for m in flow.ran if m is not last and last in m.modules())
    places = chain((m for m in behind if not flow.in_a_block(m)), [last], around)
    if isinstance(architecture.blocks[-1], ListedBlock):
        return architecture.ends_of(len(architecture.blocks) - 1)[1]
    found = (m for m in places if flow.last_state and flow.output(m) == flow.last_state)
    return next((Site(m, "output") for m in found), None)


def _residuals(architecture: Architecture, number: int) -> dict[str, Site | str]:
    """The sites of a block's residual stream."""
    ends = (replace(site, read=stream) for site in architecture.ends_of(number))
    found: dict[str, Site | str] = dict(zip(RESIDUALS, ends, strict=True))
    if architecture.ends and of_several_streams(architecture.blocks):
        found["hook_resid_mid"] = "its attention adds to another stream than its MLP"
    return found


def _of_tokens(where: Site | str) -> Site | str:
    """The site of a model that pads the tokens itself, behind them."""
    return where if isinstance(where, str) else replace(where, read=first_rows(where.read))


def _before(architecture: Architecture, flow: "Flow") -> dict[str, Site | str]:
    if senses(architecture.model.config):
        return dict.fromkeys(
            BEFORE_BLOCKS,
            "what is embedded are patches or frames without class token and positions; the rows "
            "that go into the blocks are hook_resid_pre of the first one",
        )
    embedding = token_embedding(architecture.part)
    positions = [
        module
        for name, module in architecture.part.named_modules()
        if isinstance(module, nn.Embedding) or hasattr(module, "axial_pos_shape")
        if module is not embedding and module in flow.ran
        if re.search(r"wpe|position", name) and not flow.in_a_block(module)
    ]
    embed: Site | str = "its embedding is not a module that runs"
    if embedding is not None and embedding in flow.ran:
        norm = flow.norm_of(flow.output(embedding), outside=True)
        # a norm is counted to the embedding
        embed = Site(embedding if norm is None else norm.module, "output")
    return {
        "hook_embed": embed,
        "hook_pos_embed": Site(positions[0], "output")
        if len(positions) == 1
        else NO_LEARNED_POSITIONS,
    }


_SEVERAL_CALLS = "its module runs several times in a pass"


class _Block:
    """One block: its attention, its MLP and its norms."""

    def __init__(self, block: nn.Module, flow: "Flow") -> None:
        self._block, self._flow = block, flow
        self._attention = find_attention(block)
        self._mlp = find_mlp(block, self._attention)
        self._entry: Any = (
            self._mlp if self._mlp is not None else first_linear(block, self._attention)
        )
        self._before_attention = flow.input(self._attention)
        self._before_mlp = flow.input(self._entry)
        self._ln1 = flow.norm_to(self._before_attention, block)
        if self._ln1 is None and self._attention is not None:  # ESM has it within its attention
            core = find_core(self._attention)
            self._ln1 = flow.norm_to(flow.input(core), block)
            within = flow.norm_of(self._before_attention) if core is None else None
            if within is not None and within.module in self._attention.modules():
                self._ln1 = within  # as Reformer's are, whose queries are its keys
        self._ln2 = flow.norm_to(self._before_mlp, block)

    def sites(self, declared: Sequence[Any]) -> dict[str, Site | str]:
        block, attn, mlp = self._block, self._attention, self._mlp
        found: dict[str, Site | str] = dict.fromkeys(IN_BLOCK, "")
        found |= self._norms()
        found |= (
            self._of_attention()
            if attn is not None
            else _none("attn.", "this block has no attention")
        )
        found["hook_attn_out"] = self._out(
            attn, leaf(attn, ATTENTION_OUTPUT), "this block has no attention"
        )
        found |= self._neurons()
        found |= self._router(declared)
        found |= recurrent_sites(block)
        last = self._last_linear()
        found["hook_mlp_out"] = self._out(mlp, last, "its MLP is not one that TheLoom knows")
        if mlp is None and isinstance(last, nn.Module):
            found["hook_mlp_out"] = Site(last, "output")
        return found

    def _norms(self) -> dict[str, Site | str]:
        flow, ln1, ln2 = self._flow, self._ln1, self._ln2
        found: dict[str, Site | str] = {}
        reason = POST_NORM if ln1 is None else ""
        parallel = (
            ln1 is not None
            and ln2 is not None
            and flow.input(ln2.module) == flow.input(self._block)
        )
        shared = ln1 is not None and ln2 is not None and ln2.module is ln1.module
        for name, norm in (("ln1", ln1), ("ln2", None if shared else ln2)):
            why = reason or (
                "attention and MLP share one norm" if shared else "no norm leads into its MLP"
            )
            pair = norm_sites(None if reason else norm, why)
            found |= dict(zip((f"{name}.hook_scale", f"{name}.hook_normalized"), pair, strict=True))
        if ln1 is None and ln2 is None and self._before_mlp:
            found["hook_resid_mid"] = Site(self._entry, "input")
        elif ln1 is None or ln2 is None:
            found["hook_resid_mid"] = (
                reason or "the residual between attention and MLP is no module's input"
            )
        elif parallel or shared:
            found["hook_resid_mid"] = "its attention and MLP run in parallel"
        else:
            found["hook_resid_mid"] = Site(ln2.module, "input")
        return found

    def _out(self, module: nn.Module | None, last: nn.Module | None, reason: str) -> Site | str:
        """What attention or MLP adds to the residual: its output, or that of the norm which takes
        it.
        """
        if module is None:
            return reason
        if adds_residual(module):
            return (
                Site(last, "output") if last is not None else "it comes out with the residual added"
            )
        after = self._flow.norm_of(self._flow.output(module))
        if after is not None and self._flow.inside(after.module, self._block):
            return Site(after.module, "output")
        return Site(module, "output")

    def _of_attention(self) -> dict[str, Site | str]:
        attn = self._attention
        assert attn is not None
        core = find_core(attn)
        if core is None:
            return _none("attn.", f"the projections of {type(attn).__name__} are not known")
        registry = attention.uses_registry(core)
        found: dict[str, Site | str] = {}
        for value in (SCORES, PATTERN):
            found[value] = Site(core, "inside")
        for value in (ROT_Q, ROT_K):
            if not attention.rotates(core):
                found[value] = "its positions are not rotary"
            elif not registry:
                found[value] = f"{type(core).__name__} rotates where nothing outside can see it"
            else:
                found[value] = Site(core, "inside")
        own = str(getattr(getattr(core, "config", None), "_attn_implementation", None) or "eager")
        if not registry and own != "eager":
            reason = (
                f"{type(core).__name__} shows them in eager attention alone: load it with "
                "attention=eager"
            )
            found[SCORES] = found[PATTERN] = reason
        return found | self._projections(attn, core)

    def _projections(self, attn: nn.Module, core: nn.Module) -> dict[str, Site | str]:
        names = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
        heads, kv_heads = self._flow.heads.get(core) or heads_of(core)
        last = leaf(attn, ATTENTION_OUTPUT)
        z = self._flow.width_in(last)
        if not heads or not z or z % heads:
            return dict.fromkeys(names, f"the heads of {type(attn).__name__} cannot be told apart")
        assert last is not None
        found: dict[str, Site | str] = {"attn.hook_z": Site(last, "input", by_head(heads))}
        separate = next((m for m in (leaves(attn, n) for n in QUERY_KEY_VALUE) if m), None)
        if separate:
            widths = [self._flow.width_out(m) for m in separate]
            size = widths[0] // heads
            said = self._flow.head_size.get(core)
            if widths[0] % heads or (said and said != size):
                reason = (
                    f"the query projection of {type(attn).__name__} holds more than queries, or "
                    "only part of them"
                )
                return found | dict.fromkeys(names[:3], reason)
            kv = max(1, widths[1] // size)
            for name, module, n in zip(names, separate, (heads, kv, kv), strict=False):
                found[name] = Site(module, "output", by_head(n))
            return found
        fused = next(
            ((n, m) for n in FUSED_QUERY_KEY_VALUE if (m := leaf(attn, (n,))) is not None), None
        )
        width = self._flow.width_out(fused[1]) if fused else 0
        size = z // heads
        if (
            fused is None
            or not width
            or type(attn).__name__ in SCRAMBLED
            or (width // size - heads) % 2
        ):
            kind = type(attn).__name__
            reason = f"{kind} has its queries, keys and values in a projection of another kind"
            return found | dict.fromkeys(names[:3], reason)
        kv_heads = (width // size - heads) // 2
        layout = FUSED_QUERY_KEY_VALUE[fused[0]]
        if type(attn).__name__ == "GPTBigCodeAttention" and kv_heads == heads:
            layout = BY_HEADS
        ends = [heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size]
        for name, start, stop, n in zip(
            names, [0, *ends], ends, (heads, kv_heads, kv_heads), strict=False
        ):
            read = (
                columns(start, stop, n)
                if layout == IN_A_ROW
                else grouped(heads, kv_heads, size, name[-1])
            )
            found[name] = Site(fused[1], "output", read)
        return found

    def _neurons(self) -> dict[str, Site | str]:
        home = self._mlp if self._mlp is not None else self._block
        names = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
        if any("experts" in name for name, _ in home.named_modules()):
            return dict.fromkeys(names, "the neurons of experts are of other tokens in each expert")
        exclude = self._attention if self._mlp is None else None
        ungated = "its MLP has no gate"
        if three := next((m for m in (leaves(home, n, exclude) for n in GATE_UP_DOWN) if m), None):
            gate, up, down = three
            return dict(
                zip(
                    names,
                    (Site(gate, "output"), Site(up, "output"), Site(down, "input")),
                    strict=True,
                )
            )
        if two := next(
            (m for m in (leaves(home, n, exclude) for n in GATE_AND_UP_IN_ONE) if m), None
        ):
            half = self._flow.width_out(two[0]) // 2
            both = (
                Site(two[0], "output", columns(0, half)),
                Site(two[0], "output", columns(half, 2 * half)),
            )
            return dict(zip(names, (*both, Site(two[1], "input")), strict=True))
        if two := next((m for m in (leaves(home, n, exclude) for n in UP_DOWN) if m), None):
            post = Site(two[1], "input")
            if self._flow.width_out(two[0]) > self._flow.width_in(two[1]):
                mixed = "its MLP makes gate and values in one, in an order that is not known"
                return dict(zip(names, (mixed, mixed, post), strict=True))
            return dict(zip(names, (Site(two[0], "output"), ungated, post), strict=True))
        return dict.fromkeys(names, "its MLP is not one that TheLoom knows")

    def _router(self, declared: Sequence[Any]) -> dict[str, Site | str]:
        if not any(re.search("expert|moe|router", name) for name, _ in self._block.named_modules()):
            return dict.fromkeys(ROUTER, NO_EXPERTS)
        return router_sites(declared, self._block, self._attention, self._flow.several)

    def _last_linear(self) -> nn.Module | None:
        home = self._mlp if self._mlp is not None else self._block
        exclude = self._attention if self._mlp is None else None
        pairs = (*GATE_UP_DOWN, *GATE_AND_UP_IN_ONE, *UP_DOWN)
        return next((m[-1] for m in (leaves(home, n, exclude) for n in pairs) if m), None)


def _none(prefix: str, reason: str) -> dict[str, Site | str]:
    return {value: reason for value in IN_BLOCK if value.startswith(prefix)}
