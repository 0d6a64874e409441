"""Figure of single tokens: one layer's rows in the plane of their principal components."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from theloom.dataset.activations import Activations
from theloom.errors import printable
from theloom.report import style
from theloom.report.style import Drawn, Table

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox


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
_OTHER = "other"  # values of a label that have no colour of their own, and rows without a value
_AXES = ("component_1", "component_2")


def token_kind(token: str, starts: bool = False, pieces: str = "") -> str:
    """Classify a token by its text.

    Args:
        token: text of the token.
        starts: whether it is the first of a document, where words have no blank before them.
        pieces: what a token that goes on with a word begins with, such as `##`; empty: a word
            begins with a blank.

    Returns:
        One of `word`, `subword`, `number`, `punctuation` and `whitespace`.

    Examples:
        >>> token_kind(" the"), token_kind("ing"), token_kind("ing", starts=True)
        ('word', 'subword', 'word')
        >>> token_kind("the", pieces="##"), token_kind("##ing", pieces="##")
        ('word', 'subword')
    """
    bare = token.strip()
    if not bare:
        return "whitespace"
    if any(c.isalpha() for c in bare):
        begins = not token.startswith(pieces) if pieces else token[:1].isspace()
        return "word" if begins or starts else "subword"
    return "number" if any(c.isdigit() for c in bare) else "punctuation"


def draw_token_map(
    acts: Activations,
    hook: str,
    rows: np.ndarray,
    tokens: list[str],
    title: str,
    label: tuple[str, np.ndarray] | None = None,
) -> Drawn:
    """Draw rows of one layer in the plane of their principal components, labelled with tokens.

    Args:
        acts: activations of a run.
        hook: name of the hook point.
        rows: numbers of the rows.
        tokens: texts of their tokens.
        title: start of the figure's title.
        label: name of a label and its value for each row, masked where there is none; None:
            colours give the kind of token.

    Returns:
        The figure.
    """
    position, document = acts.position.numpy(rows), acts.document_of.numpy(rows)
    inner = position > 0
    left_out = 0
    if inner.sum() > 2 and not inner.all():
        left_out = int((~inner).sum())
        rows, position, document = rows[inner], position[inner], document[inner]
        tokens = [token for token, kept in zip(tokens, inner, strict=True) if kept]
    plane, share = principal_plane(acts[hook][rows].float().flatten(1))
    pieces = "##" if any(token.startswith("##") for token in tokens) else ""
    starts = np.isin(rows, _first_words(acts))
    kinds = [token_kind(t, s, pieces) for t, s in zip(tokens, starts, strict=True)]
    groups: Sequence[str] = _KINDS
    if label is not None:
        kinds = _values(label[1][inner] if left_out else label[1])
        groups = [*(v for v, _ in Counter(kinds).most_common() if v != _OTHER), _OTHER]
    xy = plane.numpy()
    columns = (rows.tolist(), document.tolist(), position.tolist(), tokens, kinds, xy.tolist())
    table = Table(
        ("row", "document", "position", "token", label[0] if label else "kind", *_AXES),
        [(*row, x, y) for *row, (x, y) in zip(*columns, strict=True)],
    )
    without = f"\n(without the {left_out:,} at position 0)" if left_out else ""
    drawing, (panel,) = style.new(9, 7.5, f"{title}: {len(rows):,} tokens in {hook}{without}")
    for n, kind in enumerate(groups):
        here = np.array([k == kind for k in kinds])
        if label is not None and not here.any():
            continue
        x, y = xy[here].T
        panel.plot(
            x,
            y,
            **style.line(n) | {"linestyle": ""},
            markersize=4,
            alpha=0.5,
            markeredgewidth=0,
            label=kind.replace("$", r"\$"),
        )
    panel.margins(x=0.08)
    panel.set_xlabel(f"first principal component ({share[0]:.1%} of variance)")
    panel.set_ylabel(f"second ({share[1]:.1%})")
    drawing.legend(loc="outside lower center", ncols=5, markerscale=1.6)
    drawing.draw_without_rendering()  # where everything is, of which labels keep clear
    _label(panel, xy, tokens)
    return Drawn(drawing, table)


def _values(label: np.ndarray) -> list[str]:
    """The label of each row, of the most common values; of the others `_OTHER`."""
    none = np.ma.getmaskarray(label)
    texts = [printable(str(value)) for value in np.ma.getdata(label)]
    common = Counter(t for t, n in zip(texts, none, strict=True) if not n)
    coloured = {value for value, _ in common.most_common(len(style.COLOURS) - 1)}
    return [t if t in coloured and not n else _OTHER for t, n in zip(texts, none, strict=True)]


def _first_words(acts: Activations) -> np.ndarray:
    """The rows at which the text of each document begins: its first, or its second where all
    documents begin with one and the same token, as BOS.
    """
    first = acts.document_offset[:-1]
    same = len(first) > 1 and len(np.unique(acts.input_ids.numpy(first), axis=0)) == 1
    return first + same


_LABELS = 40


def _label(panel: "Axes", xy: np.ndarray, tokens: list[str]) -> None:
    """Write tokens next to their points, the outermost first, none over another, and each text
    twice at most.
    """
    written: list[Bbox] = []
    times: Counter[str] = Counter()
    for n in _outermost_first(xy):
        # matplotlib reads text between dollar signs as a formula
        text = tokens[n].strip()[:14].replace("$", r"\$")
        if not text or times[text] == 2:
            continue
        label = panel.annotate(text, xy[n], (4, 3), textcoords="offset points", fontsize=9)
        box = label.get_window_extent().padded(2)
        if any(box.overlaps(other) for other in written):
            label.remove()
            continue
        written.append(box)
        times[text] += 1
        if len(written) == _LABELS:
            break


def _outermost_first(xy: np.ndarray) -> np.ndarray:
    """The order in which points get labels: by distance from the median, outliers first."""
    spread = (xy - np.median(xy, axis=0)) / np.maximum(xy.std(axis=0), 1e-12)
    return np.argsort(-(spread**2).sum(axis=1), kind="stable")
