"""What a scale a row costs: stored rows of one byte an element against the recomputed ones."""

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from theloom.dataset.activations import Activations
from theloom.dataset.rows import ScaledRows

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


class Cost(NamedTuple):
    """Of some rows of a hook point: the norm of a row's difference as a share of its own norm, on
    average and at most; its cosine similarity, on average and at least.
    """

    error: float
    max_error: float
    cosine: float
    min_cosine: float


def cost(stored: "torch.Tensor", truth: "torch.Tensor") -> Cost:
    """Compare rows to what was encoded. Values that are not finite are left out.

    Args:
        stored: (rows, …), decoded.
        truth: (rows, …), as the model gives them.

    Returns:
        The errors and similarities; those of equal rows for no rows, and for rows of zeros.

    Examples:
        >>> import torch
        >>> found = cost(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))
        >>> round(found.error, 3), round(found.min_cosine, 4)
        (0.1, 0.9985)
    """
    if not truth.numel():
        return Cost(0.0, 0.0, 1.0, 1.0)
    stored, truth = (t.flatten(1).cpu().double() for t in (stored, truth))
    finite = stored.isfinite() & truth.isfinite()
    stored, truth = stored.where(finite, 0.0), truth.where(finite, 0.0)
    norm = truth.norm(dim=1)
    error = ((stored - truth).norm(dim=1) / norm).where(norm > 0, stored.norm(dim=1))
    both = norm * stored.norm(dim=1)
    cosine = ((stored * truth).sum(1) / both).where(both > 0, 1.0)
    found = error.mean(), error.max(), cosine.mean(), cosine.min()
    return Cost(*(float(number) for number in found))


def rounding(acts: Activations, hook: str, rows: slice) -> "torch.Tensor | None":
    """How far stored values may be from those that were encoded.

    Args:
        acts: the run's activations.
        hook: a hook point.
        rows: which ones.

    Returns:
        (rows, …) float32 on the CPU; None where rows are stored as they were handed over.
    """
    import torch

    stored = acts[hook]
    if not isinstance(stored, ScaledRows):
        return None
    return torch.from_numpy(stored.rounding(rows)).float()


def over_documents(costs: np.ndarray) -> np.ndarray:
    """The costs of all documents together.

    Args:
        costs: (documents, hook points, 4) in the order of `Cost`.

    Returns:
        (hook points, 4): means, the largest error, the smallest cosine.
    """
    return np.stack(
        [
            costs[..., 0].mean(axis=0),
            costs[..., 1].max(axis=0),
            costs[..., 2].mean(axis=0),
            costs[..., 3].min(axis=0),
        ],
        axis=-1,
    )


def report(stored_as: str, hooks: list[str], costs: np.ndarray) -> None:
    """Log a line for each hook point.

    Args:
        stored_as: the precision of the store.
        hooks: names of the hook points.
        costs: (documents, hook points, 4) in the order of `Cost`.
    """
    for hook, found in zip(hooks, over_documents(costs).tolist(), strict=True):
        log.info("%s: %s", hook, words(stored_as, Cost(*found)))


def words(stored_as: str, found: Cost) -> str:
    """Tell what an encoding costs.

    Args:
        stored_as: the precision of the store.
        found: the cost.

    Returns:
        A clause for a report.

    Examples:
        >>> words("int8", Cost(0.0057, 0.0123, 0.99998, 0.9999))
        'int8 rows: relative error 0.57%, at most 1.23%; cosine 0.999980, at least 0.999900'
    """
    return (
        f"{stored_as} rows: relative error {found.error:.2%}, at most {found.max_error:.2%}; "
        f"cosine {found.cosine:.6f}, at least {found.min_cosine:.6f}"
    )
