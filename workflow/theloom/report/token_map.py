"""Figure of single tokens: one layer's rows in the plane of their principal components."""

from typing import TYPE_CHECKING

import numpy as np

from theloom.dataset.activations import Activations
from theloom.report import style
from theloom.report.style import Drawn, Table

if TYPE_CHECKING:
    import torch


def principal_plane(rows: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Project rows to the plane of their two principal components.

    Each row is scaled to length 1 first; otherwise a few massive rows would determine the plane.

    Args:
        rows: (n, width).

    Returns:
        Coordinates, (n, 2), and the explained variance as shares, (2,).
    """
    import torch

    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    centred = unit - unit.mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.abs().argmax(dim=1, keepdim=True)
    # the SVD leaves signs open: fixing them makes the map reproducible
    directions = directions * directions.gather(1, largest).sign()
    return centred @ directions[:2].T, (singular**2 / (singular**2).sum())[:2]


_KINDS = ("word", "subword", "number", "punctuation", "whitespace")


def token_kind(token: str) -> str:
    """Classify a token by its text.

    Args:
        token: text of the token.

    Returns:
        One of `word`, `subword`, `number`, `punctuation` and `whitespace`.

    Examples:
        >>> token_kind(" the"), token_kind("ing")
        ('word', 'subword')
    """
    bare = token.strip()
    if not bare:
        return "whitespace"
    if any(c.isalpha() for c in bare):
        return "word" if token[:1].isspace() else "subword"
    return "number" if any(c.isdigit() for c in bare) else "punctuation"


def draw_token_map(
    acts: Activations, hook: str, rows: np.ndarray, tokens: list[str], title: str
) -> Drawn:
    """Draw rows of one layer in the plane of their principal components, labelled with tokens.

    Args:
        acts: activations of a run.
        hook: name of the hook point.
        rows: numbers of the rows.
        tokens: texts of their tokens.
        title: start of the figure's title.

    Returns:
        The figure.
    """
    plane, share = principal_plane(acts[hook][rows].float().flatten(1))
    xy, kinds = plane.numpy(), [token_kind(t) for t in tokens]
    table = Table(
        ("row", "document", "position", "token", "kind", "component_1", "component_2"),
        [
            (int(r), int(d), int(p), t, k, float(x), float(y))
            for r, d, p, t, k, (x, y) in zip(
                rows,
                acts.document_of.numpy(rows),
                acts.position.numpy(rows),
                tokens,
                kinds,
                xy,
                strict=True,
            )
        ],
    )
    drawing, (panel,) = style.new(9, 7.5, f"{title}: {len(rows):,} tokens in {hook}")
    for n, kind in enumerate(_KINDS):
        here = np.array([k == kind for k in kinds])
        x, y = xy[here].T
        panel.plot(
            x,
            y,
            **style.line(n) | {"linestyle": ""},
            markersize=4,
            alpha=0.5,
            markeredgewidth=0,
            label=kind,
        )
    low, high = xy.min(axis=0), xy.max(axis=0)
    span = np.maximum(high - low, 1e-12)
    taken: list[tuple[float, float, float]] = []
    for n in _outermost_first(xy):
        text = tokens[n].strip()[:14]
        x, y = (xy[n] - low) / span  # in shares of the panel
        wide = 0.014 * len(text)
        if text and all(abs(y - b) > 0.028 or x + wide < a or a + w < x for a, b, w in taken):
            taken.append((x, y, wide))
            # matplotlib reads text between dollar signs as a formula
            panel.annotate(
                text.replace("$", r"\$"), xy[n], (3, 2), textcoords="offset points", fontsize=9
            )
    panel.margins(x=0.08)
    panel.set_xlabel(f"first principal component ({share[0]:.1%} of variance)")
    panel.set_ylabel(f"second ({share[1]:.1%})")
    drawing.legend(loc="outside lower center", ncols=5, markerscale=1.6)
    return Drawn(drawing, table)


def _outermost_first(xy: np.ndarray) -> np.ndarray:
    """The order in which points get labels: by distance from the median, outliers first."""
    spread = (xy - np.median(xy, axis=0)) / np.maximum(xy.std(axis=0), 1e-12)
    return np.argsort(-(spread**2).sum(axis=1), kind="stable")
