"""Hook points: TransformerLens names for values of a Hugging Face model.

A name says where in the model a value is. `locate` finds which of them a model has, `select` turns
a filter into hook points, and `taps` reads their values during a forward pass.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from theloom.config.auto import OF_BLOCK
from theloom.config.model_dims import ModelDims
from theloom.errors import HookError
from theloom.precision import SCALED

RESIDUALS = ("hook_resid_pre", "hook_resid_post")
SCORES, PATTERN = "attn.hook_attn_scores", "attn.hook_pattern"

ROUTER_LOGITS, ROUTER_SCORES = "mlp.hook_router_logits", "mlp.hook_router_scores"
EXPERT_INDICES = "mlp.hook_expert_indices"
MIXER_IN, MIXER_OUT = "mixer.hook_in", "mixer.hook_out"
SSM_STATE, CONV_STATE = "ssm.hook_state", "ssm.hook_conv_state"
NORMALIZER_STATE, MAX_STATE = "ssm.hook_normalizer_state", "ssm.hook_max_state"
STAGE_OUT = "hook_out"  # of a stage of an image model
STATES = (
    SSM_STATE,
    NORMALIZER_STATE,
    MAX_STATE,
    CONV_STATE,
)  # one for a document: after its last token
ROUTER = (ROUTER_LOGITS, ROUTER_SCORES, EXPERT_INDICES)

# the largest integer up to which a format has every one
INTEGERS = {"bf16": 2**8, "fp16": 2**11, "fp32": 2**24, "fp64": 2**53}

# in the order in which a forward pass reaches them
BEFORE_BLOCKS = ("hook_embed", "hook_pos_embed")

IN_BLOCK = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    SCORES,
    PATTERN,
    "attn.hook_z",
    "hook_attn_out",
    MIXER_IN,
    MIXER_OUT,
    *STATES,
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    *ROUTER,
    "hook_mlp_out",
    "hook_resid_post",
)

# of a block of a decoder that also attends to an encoder's states
KEYS_OF_SOURCE = tuple(f"cross_attn.hook_{value}" for value in ("k", "v", "attn_scores", "pattern"))
CROSS_Q, CROSS_Z = "cross_attn.hook_q", "cross_attn.hook_z"
CROSS = (
    "hook_cross_attn_in",
    CROSS_Q,
    *KEYS_OF_SOURCE,
    CROSS_Z,
    "hook_cross_attn_out",
    "hook_resid_mid_cross",
    "ln3.hook_scale",
    "ln3.hook_normalized",
)

FINAL_NORM = ("ln_final.hook_scale", "ln_final.hook_normalized")
LAST_STATE = "ln_final.hook_out"
AFTER_BLOCKS = (*FINAL_NORM, LAST_STATE)

# values that take memory of their own to read; the others are tensors that the model has made
# anyway
COMPUTED = frozenset(
    f"{norm}.hook_{value}" for norm in ("ln1", "ln2", "ln3") for value in ("scale", "normalized")
) | frozenset({SCORES, PATTERN, *FINAL_NORM})

NO_EXPERTS = "this block has no mixture of experts"
NOT_RECURRENT = "this block has no mixer whose state transformers keeps"
NO_LEARNED_POSITIONS = "it has no learned positions"
POST_NORM = "no norm comes before its attention, so that the norms it has see something else"


@dataclass(frozen=True)
class HookPoint:
    """One hook point of a model: its name, its block, which value of the block, and the shape of a
    token's row.

    `block` is -1 before the first block, and the number of blocks after the last. `shape` leaves
    out the axis of the keys, which attention scores and patterns have as their last.
    """

    name: str
    block: int
    value: str
    shape: tuple[int, ...]
    rows: int = 0  # of an image; 0: as many as the model has tokens

    @property
    def over_keys(self) -> bool:
        """Whether the value is (batch, heads, position, key) instead of (batch, position, …)."""
        return self.value in (SCORES, PATTERN)

    @property
    def of_document(self) -> bool:
        """Whether there is one value of a document, after its last token; it is read as a view that
        has it at every position.
        """
        return self.value in STATES

    @property
    def first(self) -> int:
        """The first position with a value of its own: 0; of a state the last one, -1."""
        return -1 if self.of_document else 0

    @property
    def position_axis(self) -> int:
        """The axis of a value along which its tokens lie."""
        return 2 if self.over_keys else 1

    @property
    def fill(self) -> float:
        """What the value is for a key that no token of the window has: that of a masked one."""
        return -math.inf if self.value == SCORES else 0.0

    def row(self, keys: int) -> tuple[int, ...]:
        """The shape of a row on disk.

        Args:
            keys: tokens of the longest window.

        Returns:
            `shape`, with the axis of the keys where the hook point is over them.

        Examples:
            >>> HookPoint("blocks.0.hook_resid_post", 0, "hook_resid_post", (32,)).row(128)
            (32,)
        """
        return (*self.shape, keys) if self.over_keys else self.shape

    def width(self, keys: int) -> int:
        """Elements of a row.

        Args:
            keys: tokens of the longest window.

        Returns:
            Their number.

        Examples:
            >>> HookPoint("blocks.0.attn.hook_q", 0, "attn.hook_q", (4, 8)).width(128)
            32
        """
        return math.prod(self.row(keys))


@dataclass(frozen=True)
class HookCatalog:
    """The hook points of a model, in the order of its forward pass, and by name the reason for each
    that it has not.
    """

    points: list[HookPoint]
    unsupported: dict[str, str]

    def select(self, filters: Iterable[str]) -> list[HookPoint]:
        """What a filter asks for (`select_points`).

        Args:
            filters: exact names or globs; none: all hook points.

        Returns:
            The hook points, in the order of the model.

        Raises:
            HookError: an entry names nothing.
        """
        return select_points(filters, self.points, self.unsupported)


def values_in_block(side: str) -> tuple[str, ...]:
    """The values that a block may have, in the order in which a forward pass reaches them.

    Args:
        side: `decoder` for that of an encoder-decoder.

    Returns:
        Their names.

    Examples:
        >>> "hook_cross_attn_out" in values_in_block("decoder"), len(values_in_block(""))
        (True, 29)
    """
    if side != "decoder":
        return IN_BLOCK
    behind = IN_BLOCK.index("ln2.hook_normalized") + 1
    return (*IN_BLOCK[:behind], *CROSS, *IN_BLOCK[behind:])


def point(
    value: str, block: int, num_blocks: int, shape: Sequence[int], side: str = ""
) -> HookPoint:
    """Describe a value in a block, or before or after all blocks, as a hook point.

    Args:
        value: its name, such as `hook_resid_pre`.
        block: number of the block.
        num_blocks: of the model.
        shape: of the value of one token.
        side: `encoder` or `decoder`, with which the name then begins.

    Returns:
        The hook point.
    """
    name = f"blocks.{block}.{value}" if 0 <= block < num_blocks else value
    return HookPoint(f"{side}.{name}" if side else name, block, value, tuple(shape))


def stage_point(number: int, width: int, rows: int) -> HookPoint:
    """Describe the output of a stage of an image model as a hook point.

    Args:
        number: of the stage, as the model's own `hidden_states` count.
        width: channels.
        rows: positions of an image of the model's own size.

    Returns:
        The hook point.

    Examples:
        >>> stage_point(2, 128, 784).name
        'stages.2.hook_out'
    """
    return HookPoint(f"stages.{number}.{STAGE_OUT}", number, STAGE_OUT, (width,), rows)


def check_integers(points: Iterable[HookPoint], catalog: HookCatalog, precision: str) -> None:
    """Check that the numbers of experts are stored exactly.

    Args:
        points: that are stored.
        catalog: of the model.
        precision: of the store.

    Raises:
        HookError: a block has more experts than the precision has integers, or it has none.
    """
    shapes = {p.name: p.shape for p in catalog.points}
    for requested in points:
        if requested.value != EXPERT_INDICES:
            continue
        if precision in SCALED:
            raise HookError(
                f"{requested.name}: numbers of experts are not exact in {precision}, where each "
                "row has a scale; set store.dtype=fp32, or leave this hook point out"
            )
        experts = shapes[requested.name.replace(EXPERT_INDICES, ROUTER_LOGITS)][-1]
        if experts - 1 > INTEGERS[precision]:
            raise HookError(
                f"{requested.name}: its {experts} experts are not told apart in {precision}, which "
                f"has every integer up to {INTEGERS[precision]:,}; set store.dtype=fp32"
            )


def residual_points(num_blocks: int, hidden_size: int, side: str = "") -> list[HookPoint]:
    """List the residual stream before and after every block.

    Args:
        num_blocks: of the model.
        hidden_size: elements of a token's residual.
        side: `encoder` or `decoder`, with which the names then begin.

    Returns:
        The hook points, in the order of the model.
    """
    return [
        point(value, block, num_blocks, [hidden_size], side)
        for block in range(num_blocks)
        for value in RESIDUALS
    ]


def llama_catalog(size: ModelDims) -> HookCatalog:
    """Make the catalog of a Llama-like model (`closed_form.covers`) from its numbers alone.

    Args:
        size: dimensions of the model.

    Returns:
        The catalog.
    """
    d, m, q, kv = (
        [size.hidden_size],
        [size.intermediate_size],
        [size.num_heads, size.head_dim],
        [size.num_kv_heads, size.head_dim],
    )
    shapes: dict[str, list[int]] = dict.fromkeys(IN_BLOCK, d)
    shapes |= {value: [1] for value in ("ln1.hook_scale", "ln2.hook_scale")}
    shapes |= dict.fromkeys(("attn.hook_q", "attn.hook_rot_q", "attn.hook_z"), q)
    shapes |= dict.fromkeys(("attn.hook_k", "attn.hook_rot_k", "attn.hook_v"), kv)
    shapes |= {value: [size.num_heads] for value in (SCORES, PATTERN)}
    shapes |= dict.fromkeys(("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"), m)
    n = size.num_blocks
    absent = {"hook_pos_embed": NO_LEARNED_POSITIONS}
    absent |= {f"blocks.{block}.{value}": NO_EXPERTS for block in range(n) for value in ROUTER}
    recurrent = (MIXER_IN, MIXER_OUT, *STATES)
    absent |= {f"blocks.{b}.{value}": NOT_RECURRENT for b in range(n) for value in recurrent}
    if size.model_type == "olmo2":
        values = [v for v in IN_BLOCK if v.startswith("ln")]
        absent |= {f"blocks.{block}.{value}": POST_NORM for block in range(n) for value in values}
    every = [
        point("hook_embed", -1, n, d),
        *(point(value, block, n, shapes[value]) for block in range(n) for value in IN_BLOCK),
        point("ln_final.hook_scale", n, n, [1]),
        point("ln_final.hook_normalized", n, n, d),
        point(LAST_STATE, n, n, d),
    ]
    return HookCatalog([p for p in every if p.name not in absent], absent)


def select_points(
    filters: Iterable[str],
    points: Sequence[HookPoint],
    unsupported: Mapping[str, str] | None = None,
) -> list[HookPoint]:
    """Find the hook points that a filter asks for.

    Args:
        filters: exact names or globs (`*`, `?`); `blocks.-1.` counts from the last block; none:
            all. States, of which a document has one, are chosen by entries with `ssm.` alone.
        points: of the model, in its order.
        unsupported: reasons, by name, of hook points that the model's architecture has not.

    Returns:
        The hook points, in the order of the model.

    Raises:
        HookError: an entry names nothing: with the reason, or with near matches.
    """
    entries = list(filters)
    if not entries:
        return [p for p in points if not p.of_document]
    unsupported = unsupported or {}
    num_blocks = 1 + max((p.block for p in points if OF_BLOCK.match(p.name)), default=-1)
    chosen: set[str] = set()
    for entry in entries:
        pattern = _from_the_end(entry, num_blocks)
        matched = {
            p.name
            for p in points
            if fnmatchcase(p.name, _literal_brackets(pattern))
            and (not p.of_document or "ssm." in entry)
        }
        if not matched:
            reason = next(
                (
                    r
                    for name, r in unsupported.items()
                    if fnmatchcase(name, _literal_brackets(pattern))
                ),
                None,
            )
            raise HookError(
                f"hook point {entry!r} is unavailable from this model: {reason}"
                if reason
                else _unknown(entry, pattern, points, num_blocks)
            )
        chosen |= matched
    return [p for p in points if p.name in chosen]


def check_names(filters: Iterable[str]) -> None:
    """Check that a filter's entries can name something in some model, however many blocks it has.

    Args:
        filters: as those of `select_points`.

    Raises:
        HookError: one cannot.
    """
    values = {
        f"{side}.{name}".removeprefix(".")
        for side in ("", "encoder", "decoder")
        for name in (
            *BEFORE_BLOCKS,
            *AFTER_BLOCKS,
            *(f"blocks.0.{value}" for value in values_in_block(side)),
        )
    } | {stage_point(0, 0, 0).name}
    for entry in filters:
        pattern = OF_BLOCK.sub(r"\g<1>0.", entry)
        if not any(fnmatchcase(name, _literal_brackets(pattern)) for name in values):
            near = next(iter(difflib.get_close_matches(pattern, sorted(values), n=1)), None)
            hint = (
                f"; did you mean {near.replace('blocks.0.', 'blocks.{block}.')!r}?" if near else ""
            )
            raise HookError(f"{entry!r} names no hook point of any model{hint}")


def _from_the_end(entry: str, num_blocks: int) -> str:
    match = OF_BLOCK.match(entry)
    if not match or not match[2].startswith("-"):
        return entry
    return f"{match[1]}{num_blocks + int(match[2])}.{entry[match.end() :]}"


def _literal_brackets(pattern: str) -> str:
    return pattern.replace("[", "[[]")


def deepest_block(points: Iterable[HookPoint], default: int | None = None) -> int:
    """The number of the deepest block that a forward pass must run to read hook points.

    Args:
        points: The hook points.
        default: The number where there are no hook points.

    Returns:
        −1 where they all come before the first block; the number of blocks where one comes after
        the last.

    Raises:
        ValueError: Without hook points and without a default.
    """
    blocks = [p.block for p in points]
    if not blocks and default is not None:
        return default
    return max(blocks)


def _unknown(entry: str, pattern: str, points: Sequence[HookPoint], num_blocks: int) -> str:
    glob = "*" in entry or "?" in entry
    requested = (
        f"hook filter {entry!r} matches nothing" if glob else f"unknown hook point {entry!r}"
    )
    near = _near(pattern, points, num_blocks)
    hint = (
        f"did you mean {near!r}?"
        if near
        else f"its hook points are like {points[0].name!r}, {points[-1].name!r}"
    )
    return f"{requested} (this model has {num_blocks} blocks, 0 to {num_blocks - 1}); {hint}"


def _near(pattern: str, points: Sequence[HookPoint], num_blocks: int) -> str | None:
    """The nearest name: a block number past the end counts as the last one; then the spelling of
    the value decides.
    """
    match = OF_BLOCK.match(pattern)
    if not match:
        return next(iter(difflib.get_close_matches(pattern, [p.name for p in points], n=1)), None)
    block = min(max(int(match[2]), 0), num_blocks - 1)
    values = {p.value for p in points if p.block == block}
    value = next(iter(difflib.get_close_matches(pattern[match.end() :], sorted(values), n=1)), None)
    return f"{match[1]}{block}.{value}" if value else None
