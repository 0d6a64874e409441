"""Where a block of a decoder attends to an encoder's states, under TransformerLens' names.

`ln2` is then the norm before cross-attention, and `ln3` the one before the MLP.
"""

from collections.abc import Mapping

from torch import nn

from theloom.hooks.dataflow import Flow
from theloom.hooks.module_names import (
    ATTENTION_OUTPUT,
    QUERY_KEY_VALUE,
    find_cross_attention,
    heads_of,
    leaf,
    leaves,
)
from theloom.hooks.points import CROSS, CROSS_Q, CROSS_Z, KEYS_OF_SOURCE, POST_NORM
from theloom.hooks.sites import Site, by_head, norm_sites

_NONE = "this block has no attention to an encoder that TheLoom knows"
_OF_SOURCE = "its rows, or keys, are the source's tokens, not the target's"


def cross_sites(
    block: nn.Module, flow: Flow, own: Mapping[str, Site | str]
) -> dict[str, Site | str]:
    """Find the values of a decoder's block that others do not have, or have elsewhere.

    Args:
        block: of the decoder.
        flow: which tensors go into and out of its modules.
        own: the sites of the block as if it had no cross-attention.

    Returns:
        Sites by value, or the reason why there is none.
    """
    cross = find_cross_attention(block)
    if cross is None:
        return dict.fromkeys(CROSS, _NONE)
    norm = flow.norm_to(flow.input(cross), block)
    before = own["ln1.hook_scale"]
    post = isinstance(before, str) and before == POST_NORM
    if norm is None or post:  # its norms come behind, so its input is the residual stream
        stream, scales = Site(cross, "input"), norm_sites(None, POST_NORM)
    else:
        stream, scales = Site(norm.module, "input"), norm_sites(norm, "")
    found: dict[str, Site | str] = {
        "hook_resid_mid": POST_NORM if post else stream,
        "hook_cross_attn_in": stream,
        "hook_cross_attn_out": Site(cross, "output"),
        "hook_resid_mid_cross": own["hook_resid_mid"],
        **_by_head(cross, flow),
        **dict.fromkeys(KEYS_OF_SOURCE, _OF_SOURCE),
    }
    for value, site in zip(("hook_scale", "hook_normalized"), scales, strict=True):
        found[f"ln2.{value}"], found[f"ln3.{value}"] = site, own[f"ln2.{value}"]
    return found


def _by_head(cross: nn.Module, flow: Flow) -> dict[str, Site | str]:
    """Queries and mixed values of cross-attention: their rows are the target's tokens."""
    heads, _ = heads_of(cross)
    last = leaf(cross, ATTENTION_OUTPUT)
    query = next((m[0] for m in (leaves(cross, n) for n in QUERY_KEY_VALUE) if m), None)
    reason = f"the heads of {type(cross).__name__} cannot be told apart"
    found: dict[str, Site | str] = {CROSS_Q: reason, CROSS_Z: reason}
    if not heads:
        return found
    if query is not None and flow.width_out(query) and flow.width_out(query) % heads == 0:
        found[CROSS_Q] = Site(query, "output", by_head(heads))
    if last is not None and flow.width_in(last) and flow.width_in(last) % heads == 0:
        found[CROSS_Z] = Site(last, "input", by_head(heads))
    return found
