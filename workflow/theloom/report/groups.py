"""Which figures a run has, by the jobs that draw them: known without what draws them."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from theloom.hooks.points import PATTERN

# by group, which is one job: the figures' names and what the report calls them
GROUPS = {
    "memory": {"memory": "Memory by component", "gpus": "GPUs that it fits on"},
    "speed": {"throughput": "Speed and padding by shard", "time": "Where the time went"},
    "states": {
        "norms": "Norms by layer and position",
        "massive": "Massive activations",
        "similarity": "Similarity of layers",
        "map": "Map of a middle layer",
    },
    "attention": {"attention": "Attention patterns"},
    "runs": {"runs": "Runs side by side"},
}


def groups(filters: Sequence[str]) -> list[str]:
    """The groups of figures that a run has: attention's only where its hook filter can take
    attention patterns.
    """
    name = f"blocks.0.{PATTERN}"
    captured = not filters or any(
        fnmatchcase(name, re.sub(r"^blocks\.-?\d+\.", "blocks.0.", f)) for f in filters
    )
    return ["memory", "speed", "states", *["attention"] * captured]
