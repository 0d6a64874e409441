"""How much two models' hidden states of the same tokens differ, by hook point."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from theloom.pairs.pair import Pair


@dataclass(frozen=True)
class Similarity:
    """Hidden states of one hook point of a model beside those of another one.

    Args:
        hook: the hook point.
        cosine: mean cosine similarity of the two rows of a token; NaN where no token has two finite
            rows that are not zero.
        norm_ratio: mean of the second row's Euclidean norm over the first one's; or NaN.
        rows: tokens that they are the means of.
    """

    hook: str
    cosine: float
    norm_ratio: float
    rows: int


def similarity(pair: "Pair", hook: str, rows: np.ndarray, first: str, other: str) -> Similarity:
    """Compare the rows of a hook point of two models of a pair.

    Args:
        pair: the models.
        hook: a hook point that both have, with rows of as many elements.
        rows: numbers of the rows to compare.
        first: name of a model.
        other: name of another one, whose norms are divided by the first one's.

    Returns:
        The means. Rows with values that are not finite, and rows of zeros, are left out.

    Raises:
        HookError: a model has no such hook point.
        ValueError: their rows have other shapes.

    Examples:
        >>> import theloom
        >>> file = "results/tiny/activations.h5"
        >>> pair = theloom.open_pair(file, file, names=["base", "tuned"])
        >>> hook, rows = "blocks.1.hook_resid_post", np.arange(100)
        >>> found = similarity(pair, hook, rows, "base", "tuned")
        >>> round(found.cosine, 6), found.norm_ratio, found.rows
        (1.0, 1.0, 100)
    """
    a, b = (pair.models[name][hook][rows].double().flatten(1) for name in (first, other))
    if a.shape != b.shape:
        raise ValueError(f"{hook}: rows of {a.shape[1]} and of {b.shape[1]} elements")
    norms, others = a.norm(dim=1), b.norm(dim=1)
    whole = norms.isfinite() & others.isfinite() & (norms > 0) & (others > 0)
    a, b, norms, others = a[whole], b[whole], norms[whole], others[whole]
    cosine = (a * b).sum(1) / (norms * others)
    ratio = others / norms
    return Similarity(hook, float(cosine.mean()), float(ratio.mean()), int(whole.sum()))
