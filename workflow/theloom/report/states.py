"""Figures of hidden states: norms, massive activations, layer similarity."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.auto import OF_BLOCK
from theloom.dataset.activations import Activations
from theloom.hooks.points import PATTERN, RESIDUALS, SCORES
from theloom.report import style
from theloom.report.style import Drawn, Table

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BLOCK = 256  # rows of every layer in memory at once

# An activation is massive where its magnitude is above 100 and about 1,000 times the median of its
# layer's hidden states: the definition of Sun, Chen, Kolter and Liu, "Massive Activations in Large
# Language Models" (2024).
MASSIVE_AT_LEAST, MASSIVE_TIMES_MEDIAN = 100.0, 1000.0
_MOST_LINES = 6


@dataclass(frozen=True)
class States:
    """Statistics of a sample of rows.

    Args:
        hooks: names of the hook points.
        rows: numbers of the rows, (rows,).
        position: position of each row in its window, (rows,).
        norm: Euclidean norm, (hooks, rows).
        largest: largest magnitude in a row, (hooks, rows).
        median: median magnitude in a row, (hooks, rows).
        cosine: mean cosine similarity over rows, (hooks, hooks).
    """

    hooks: list[str]
    rows: np.ndarray
    position: np.ndarray
    norm: np.ndarray
    largest: np.ndarray
    median: np.ndarray
    cosine: np.ndarray


def sampled_rows(acts: Activations, count: int, seed: int) -> np.ndarray:
    """Sample rows of entire windows at random; only the last window may be cut.

    Args:
        acts: activations of a run.
        count: number of rows.
        seed: of the random order of windows.

    Returns:
        Numbers of at most `count` rows, in ascending order.
    """
    order = np.random.default_rng(seed).permutation(acts.window_count)
    taken, chosen = 0, []
    for window in order:
        begin, end = (int(r) for r in acts.window_offset[window : window + 2])
        chosen.append(np.arange(begin, min(end, begin + count - taken)))
        taken += len(chosen[-1])
        if taken >= count:
            break
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def layers(acts: Activations) -> list[str]:
    """List the hook points of the residual stream.

    Args:
        acts: activations of a run.

    Returns:
        Names of hook points; without any of the residual stream, those of the most common shape,
        except attention's.
    """
    residual = [h for h in acts.hooks if h.split(".")[-1] in RESIDUALS]
    if residual:
        return residual
    flat = [h for h in acts.hooks if not h.endswith((PATTERN, SCORES))]
    widths = [acts[h].shape[1:] for h in flat]
    return [h for h, w in zip(flat, widths, strict=True) if w == max(widths, key=widths.count)]


def measure_states(acts: Activations, count: int, seed: int) -> States:
    """Compute the statistics of a sample, one block of rows of all layers at a time.

    Args:
        acts: activations of a run.
        count: number of rows to sample.
        seed: of the sample.

    Returns:
        The statistics.
    """
    hooks, rows = layers(acts), sampled_rows(acts, count, seed)
    norm, largest, median = (np.zeros((len(hooks), len(rows)), "<f4") for _ in range(3))
    cosine = np.zeros((len(hooks), len(hooks)))
    for at, states in _blocks(acts, hooks, rows):  # (hooks, rows of the block, width)
        norms = states.norm(dim=-1)
        norm[:, at] = norms.numpy()
        largest[:, at] = states.abs().amax(dim=-1).numpy()
        median[:, at] = states.abs().median(dim=-1).values.numpy()
        unit = states / norms.clamp_min(1e-30)[..., None]
        cosine += (unit.transpose(0, 1) @ unit.permute(1, 2, 0)).sum(dim=0).double().numpy()
    return States(
        hooks, rows, acts.position.numpy(rows), norm, largest, median, cosine / max(1, len(rows))
    )


def _blocks(
    acts: Activations, hooks: list[str], rows: np.ndarray
) -> Iterator[tuple[slice, "torch.Tensor"]]:
    import torch

    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        values = [acts[h][part].float().flatten(1) for h in hooks]
        yield slice(start, start + len(part)), torch.stack(values)


def short(hook: str) -> str:
    """Shorten the name of a hook point for a tick label.

    Args:
        hook: name of the hook point.

    Returns:
        Block and value; names outside blocks as they are.

    Examples:
        >>> short("blocks.5.hook_resid_post")
        '5 post'
    """
    match = OF_BLOCK.match(hook)
    if not match:
        return hook
    return f"{match[2]} {hook[match.end() :].replace('hook_', '').replace('resid_', '')}"


def tick_labels(hooks: list[str]) -> tuple[list[str], str]:
    """Shorten the names of hook points for the ticks of an axis.

    Args:
        hooks: names of the hook points.

    Returns:
        The numbers of the blocks alone where all blocks have the same value, else block and value;
        and the label of the axis.

    Examples:
        >>> tick_labels(["hook_embed", "blocks.0.hook_resid_post", "blocks.5.hook_resid_post"])
        (['embed', '0', '5'], 'layer (resid_post)')
    """
    matches = [OF_BLOCK.match(hook) for hook in hooks]
    values = {hook[m.end() :] for hook, m in zip(hooks, matches, strict=True) if m}
    if len(values) != 1:
        return [short(hook) for hook in hooks], "block and hook point"
    ticks = [
        match[2] if match else hook.removeprefix("hook_")
        for hook, match in zip(hooks, matches, strict=True)
    ]
    return ticks, f"layer ({values.pop().removeprefix('hook_')})"


def draw_norms(states: States, title: str) -> Drawn:
    """Draw the median norm by layer and position: lines for a few layers, a heat map for many.

    Args:
        states: statistics of a sample.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    bins = _position_bins(states.position)
    rows = []
    for n, hook in enumerate(states.hooks):
        for label, inside in bins:
            low, middle, high = np.percentile(states.norm[n, inside], [5, 50, 95])
            rows.append((hook, label, int(inside.sum()), float(low), float(middle), float(high)))
    table = Table(
        ("hook", "positions", "rows", "norm_5_percent", "norm_median", "norm_95_percent"), rows
    )
    heading = f"{title}: norm of the residual stream by position"
    count, at = len(states.hooks), np.arange(len(bins))
    if count <= _MOST_LINES:
        drawing, (panel,) = style.new(9, 4.5, heading)
        for n, hook in enumerate(states.hooks):
            low, middle, high = (np.array([r[c] for r in rows if r[0] == hook]) for c in (3, 4, 5))
            panel.plot(at, middle, label=hook, **style.line(n))
            panel.fill_between(at, low, high, color=style.COLOURS[n], alpha=0.15, linewidth=0)
        panel.set_yscale("log")
        panel.set_ylabel("norm (median; 5th to 95th percentile)")
        drawing.legend(loc="outside lower center", ncols=2)
        panel.set_xticks(at, [b[0] for b in bins], fontsize=9, rotation=30)
    else:
        grid = np.array([r[4] for r in rows]).reshape(count, len(bins))
        drawing, panel = _heat(grid, states.hooks, f"{heading} (median)", "norm", log=True)
        panel.set_xticks(at + 0.5, [b[0] for b in bins], fontsize=9, rotation=30)
    panel.set_xlabel("position in the window (tokens)")
    return Drawn(drawing, table)


def draw_massive(states: States, title: str) -> Drawn:
    """Draw by layer the share of tokens with a massive activation, and the largest magnitude.

    Args:
        states: statistics of a sample.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    medians = np.median(states.median, axis=1) if states.rows.size else np.zeros(len(states.hooks))
    limit = np.maximum(MASSIVE_AT_LEAST, MASSIVE_TIMES_MEDIAN * medians)
    share = (states.largest > limit[:, None]).mean(axis=1)
    largest = states.largest.max(axis=1, initial=0.0)
    table = Table(
        ("hook", "median_magnitude", "largest_magnitude", "threshold", "share_of_tokens"),
        [
            (h, float(m), float(x), float(t), float(s))
            for h, m, x, t, s in zip(states.hooks, medians, largest, limit, share, strict=True)
        ],
    )
    height = 1.8 + min(0.32 * len(states.hooks), 11)
    heading = f"{title}: massive activations in {len(states.rows):,} tokens"
    drawing, (left, right) = style.new(9, height, heading, columns=2, sharey=True)
    at = np.arange(len(states.hooks))
    bars = left.barh(at, 100 * share, 0.7, color=style.COLOURS[0])
    right.plot(
        largest, at, linestyle="", marker="D", color=style.COLOURS[1], label="largest magnitude"
    )
    right.plot(
        limit,
        at,
        linestyle="",
        marker="|",
        color="black",
        markersize=14,
        label="threshold of massive activations",
    )
    right.plot(
        medians, at, linestyle="", marker="o", color=style.COLOURS[2], label="median magnitude"
    )
    if len(at) <= 24:
        left.bar_label(bars, [f"{100 * s:.2g}" for s in share], padding=3, fontsize=9)
    ticks, label = tick_labels(states.hooks)
    left.set_yticks(at, ticks, fontsize=9 if len(at) <= 32 else 6)
    left.set_ylabel(label)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_xlim(0, max(1.0, left.get_xlim()[1]))
    left.set_xlabel("tokens with one, %")
    right.set_xscale("log")
    right.set_xlabel("magnitude")
    drawing.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return Drawn(drawing, table)


def draw_similarity(states: States, title: str) -> Drawn:
    """Draw layer similarity: the mean cosine similarity of a token's states in each pair of layers.

    Args:
        states: statistics of a sample.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    rows = [
        (a, b, float(states.cosine[i, j]))
        for i, a in enumerate(states.hooks)
        for j, b in enumerate(states.hooks)
    ]
    heading = f"{title}: cosine similarity between layers"
    drawing, panel = _heat(
        states.cosine, states.hooks, heading, "mean cosine similarity", log=False
    )
    count = len(states.hooks)
    if count <= 10:
        for i in range(count):
            for j in range(count):
                value = states.cosine[i, j]
                ink = "black" if value > 0.55 else "white"
                panel.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", color=ink)
    step = max(1, count // 16)
    ticks, label = tick_labels(states.hooks)
    turned: dict[str, Any] = {} if label.startswith("layer") else {"rotation": 60, "ha": "right"}
    panel.set_xticks(np.arange(count)[::step] + 0.5, ticks[::step], **turned)
    panel.set_xlabel(label)
    return Drawn(drawing, Table(("hook", "other_hook", "mean_cosine"), rows))


def _heat(
    grid: np.ndarray, hooks: list[str], title: str, label: str, log: bool
) -> tuple["Figure", "Axes"]:
    from matplotlib.colors import LogNorm, Normalize

    drawing, (panel,) = style.new(9, 2.2 + min(0.3 * len(hooks), 10), title)
    scale = (
        LogNorm(max(1e-12, grid.min()), grid.max()) if log else Normalize(min(0.0, grid.min()), 1)
    )
    mesh = panel.pcolormesh(grid, cmap=style.HEAT, norm=scale)
    drawing.colorbar(mesh, ax=panel, label=label)
    panel.grid(visible=False)
    ticks, axis = tick_labels(hooks)
    panel.set_yticks(np.arange(len(hooks)) + 0.5, ticks, fontsize=9 if len(hooks) <= 32 else 6)
    panel.set_ylabel(axis)
    panel.invert_yaxis()
    return drawing, panel


def _position_bins(position: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Positions in bins that double, 0 and 1 by themselves; those without a row are left out."""
    edges = [0, 1, 2]
    while position.size and edges[-1] <= position.max():
        edges.append(2 * edges[-1])
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (position >= low) & (position < high)
        if inside.any():
            bins.append((str(low) if high == low + 1 else f"{low}–{high - 1}", inside))
    return bins


def middle_layer(acts: Activations) -> str:
    """Find the middle one of the captured layers.

    Args:
        acts: activations of a run.

    Returns:
        Name of the hook point.
    """
    names = layers(acts)
    return names[len(names) // 2]
