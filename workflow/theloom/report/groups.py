"""Figures by the jobs that draw them; needs no plotting library."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from theloom.config.auto import OF_BLOCK, SIDES
from theloom.hooks.points import PATTERN

# by group, which is one job: names of figures and their titles in the report
GROUPS = {
    "memory": {"memory": "Memory by component", "gpus": "GPUs that the run fits on"},
    "answers": {
        "answers": "Lengths and ends of answers",
        "sampling": "Speed of sampling by shard",
    },
    "speed": {"throughput": "Speed and padding by shard", "time": "Time breakdown by shard"},
    "states": {
        "norms": "Norms by layer and position",
        "massive": "Massive activations",
        "similarity": "Layer similarity",
        "map": "Token map (PCA) of a middle layer",
    },
    "attention": {"attention": "Attention patterns"},
    "probe": {"probe": "Accuracy of a linear probe by hook point"},
    "runs": {
        "runs": "Comparison of runs",
        "layers": "Cosine similarity and norms by layer, between runs",
    },
}


def groups(filters: Sequence[str], label: str | None = None, answered: bool = False) -> list[str]:
    """List the groups of figures that a run has.

    Args:
        filters: the run's hook filter; empty: every hook point.
        label: `report.label`.
        answered: whether the run has answers.

    Returns:
        Names of groups; attention's only if the filter can match attention patterns, the probe's
        only with a label, and the answers' only of a run that has some.

    Examples:
        >>> groups(["blocks.*.hook_resid_post"])
        ['memory', 'speed', 'states']
    """
    name = f"blocks.0.{PATTERN}"
    captured = not filters or any(
        fnmatchcase(side + name, OF_BLOCK.sub(r"\g<1>0.", f))
        for f in filters
        for side in ("", *SIDES)
    )
    drawn = {"attention": captured, "probe": label is not None, "answers": answered}
    return ["memory", "speed", "states", *(name for name, there in drawn.items() if there)]
