"""Numbers of rows of hook points in stages, of which a run has one."""

import math
from collections.abc import Sequence

from theloom.errors import HookError
from theloom.hooks.points import HookPoint


def check_one_resolution(points: Sequence[HookPoint]) -> None:
    """Check that the hook points of a run have the same number of rows.

    Args:
        points: that are stored.

    Raises:
        HookError: they have several; with the number of each.

    Examples:
        >>> from theloom.hooks.points import stage_point
        >>> check_one_resolution([stage_point(0, 64, 196), stage_point(1, 64, 196)])
    """
    if len({one.rows for one in points}) > 1:
        raise HookError(
            "memory.activation_cache_filter: the hook points have different numbers of rows for an "
            f"image, and those of a run share their rows: {listed_stages(points)}; make a run for "
            "each number of rows"
        )


def listed_stages(points: Sequence[HookPoint]) -> str:
    """Hook points in stages, for messages.

    Args:
        points: of the catalog.

    Returns:
        Names with their rows and widths, each of them once.

    Examples:
        >>> from theloom.hooks.points import stage_point
        >>> found = [stage_point(0, 64, 196), stage_point(1, 64, 196), stage_point(2, 96, 49)]
        >>> listed_stages(found)
        'stages.0.hook_out to stages.1.hook_out (196 rows of 64), stages.2.hook_out (49 rows of 96)'
    """
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for one in points:
        groups.setdefault((one.rows, one.shape), []).append(one.name)
    return ", ".join(
        f"{' to '.join(dict.fromkeys((names[0], names[-1])))} ({rows:,} rows of {math.prod(shape)})"
        for (rows, shape), names in groups.items()
    )
