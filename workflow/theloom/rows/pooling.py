"""How the rows of several tokens become one."""

import numpy as np

ADDED_UP = ("mean", "sum", "max")  # made of several tokens' values; `first` and `last` are of one
POOLS = ("none", *ADDED_UP, "first", "last")


def pooled(mask: np.ndarray, group: np.ndarray, pool: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the rows of a document are made of, and the last one of each row.

    Args:
        mask: Which tokens are kept, (tokens,) bool.
        group: The number of the row that each token would be part of, ascending, (tokens,).
        pool: What becomes of them; `first` and `last` take one token.

    Returns:
        Which tokens rows are made of, (tokens,) bool; the last of each row, (rows,).

    Examples:
        >>> mask, row = pooled(np.array([False, True, True]), np.zeros(3, "i4"), "mean")
        >>> mask.tolist(), row.tolist()
        ([False, True, True], [2])
    """
    kept = mask.nonzero()[0]
    if pool == "none":
        return mask, kept
    starts = (np.diff(group[kept], prepend=-2) != 0).nonzero()[0]
    ends = np.append(starts[1:], len(kept))[: len(starts)] - 1
    if pool in ("first", "last"):  # one token is the row
        chosen = kept[starts if pool == "first" else ends]
        of_one = np.zeros(len(mask), bool)
        of_one[chosen] = True
        return of_one, chosen
    return mask, kept[ends]
