"""Figures of attention patterns: heat maps by head, if patterns were captured."""

from typing import Any

import numpy as np

from theloom.dataset.activations import Activations
from theloom.hooks.points import PATTERN
from theloom.report import style
from theloom.report.style import Drawn, Table

_LAYERS, _HEADS, _TOKENS = 3, 4, 24
_HOW = "add blocks.*.attn.hook_pattern, or one block's, to memory.activation_cache_filter"


def patterns(acts: Activations, document: int, tokens: list[str], title: str) -> Drawn:
    """Draw the attention weights among a document's first tokens, for some layers and heads.

    Args:
        acts: activations of the run.
        document: number of the document.
        tokens: texts of its first tokens.
        title: start of the figure's title.

    Returns:
        The figure; a note if the run has no attention patterns.
    """
    hooks = [h for h in acts.hooks if h.endswith(PATTERN)]
    if not hooks:
        return style.note(
            f"{title}: attention patterns", f"The run captured no attention patterns; {_HOW}."
        )
    if acts.row_tokens is not None:
        return style.note(
            f"{title}: attention patterns",
            "The run stores the rows of some tokens alone (rows.keep), and a pattern needs all.",
        )
    hooks = [
        hooks[n] for n in np.unique(np.linspace(0, len(hooks) - 1, _LAYERS).round().astype(int))
    ]
    shown = acts.document(document)
    window_end = acts.window_offset[np.searchsorted(acts.window_offset, shown.rows.start, "right")]
    count = min(len(shown), _TOKENS, int(window_end) - shown.rows.start)
    rows = slice(shown.rows.start, shown.rows.start + count)
    heads = min(_HEADS, acts[hooks[0]].shape[1])
    labels = [_label(t) for t in tokens[:count]]
    size = (2.2 * heads + 1.2, 2.2 * len(hooks) + 1.2)
    heading = f"{title}: attention patterns, first {count} tokens of {shown.id}"
    drawing, panels = style.new(
        *size, heading, rows=len(hooks), columns=heads, sharex=True, sharey=True
    )
    values: list[tuple[object, ...]] = []
    for layer, hook in enumerate(hooks):
        grid = acts[hook][rows].float().numpy()[:, :, :count]  # (query, head, key)
        for head in range(heads):
            panel = panels[layer * heads + head]
            look: dict[str, Any] = {
                "cmap": style.HEAT,
                "vmin": 0,
                "vmax": 1,
                "interpolation": "none",
            }
            mesh = panel.imshow(np.sqrt(grid[:, head]), extent=(0, count, count, 0), **look)
            panel.grid(visible=False)
            panel.set_title(f"block {hook.split('.')[1]}, head {head}", fontsize=10)
            values += [
                (hook, head, q, k, tokens[q], tokens[k], float(grid[q, head, k]))
                for q in range(count)
                for k in range(q + 1)
            ]
    at = np.arange(count) + 0.5
    for panel in panels[::heads]:
        panel.set_yticks(at, labels, fontsize=6)
    for panel in panels[-heads:]:
        panel.set_xticks(at, labels, fontsize=6, rotation=90)
    drawing.supxlabel("key token (attended to)", fontsize=10)
    drawing.supylabel("query token", fontsize=10)
    bar = drawing.colorbar(
        mesh,
        ax=panels,
        label="attention weight (square-root colour scale)",
        ticks=np.sqrt([0, 0.1, 0.25, 0.5, 1]),
    )
    bar.ax.set_yticklabels(["0", "0.1", "0.25", "0.5", "1"])
    return Drawn(
        drawing,
        Table(("hook", "head", "query", "key", "query_token", "key_token", "weight"), values),
    )


def _label(token: str) -> str:
    return (token.replace("\n", "⏎").strip() or "␣")[:9].replace("$", r"\$")
