"""Groups of shards that one job extracts, each a rule of Snakemake's.

A rule has a fixed list of outputs, so a group cannot be a wildcard. Its rule's name says which
shards it is of: a job on a cluster, which parses the Snakefile again without the runs' configs,
builds the one rule that it was sent for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from theloom.config import sharding
from theloom.config.compose import Run

_RULE = re.compile(r"extract_shards_(\d+)_to_(\d+)_of_(\d+)")

ANY_RUN = "[^/]+"


@dataclass(frozen=True)
class ShardGroup:
    """Shards `first` to `last` of `shards`, of every run whose name matches `runs`.

    Examples:
        >>> group = ShardGroup(2, 3, 16)
        >>> group.rule, group.label, group.names[0]
        ('extract_shards_2_to_3_of_16', '00002-to-00003-of-00016', '00002-of-00016')
    """

    first: int
    last: int
    shards: int
    runs: str = ANY_RUN

    @property
    def rule(self) -> str:
        """The name of its rule."""
        return f"extract_shards_{self.first}_to_{self.last}_of_{self.shards}"

    @property
    def label(self) -> str:
        """The name of its log and of its benchmark."""
        return f"{self.first:05d}-to-{self.last:05d}-of-{self.shards:05d}"

    @property
    def names(self) -> list[str]:
        """The names of its shards, without `.h5`."""
        return [f"{n:05d}-of-{self.shards:05d}" for n in range(self.first, self.last + 1)]


def of_runs(runs: Mapping[str, Run]) -> list[ShardGroup]:
    """The groups of the runs that have jobs of several shards.

    Args:
        runs: Planned runs by name.

    Returns:
        Each group once, with the runs that it is of.
    """
    cut: dict[tuple[int, int], list[str]] = {}
    for name, run in runs.items():
        shards, per_job = (
            run.config["extraction"]["shards"],
            run.config["resources"]["shards_per_job"],
        )
        if per_job > 1 and shards > 1:
            cut.setdefault((shards, min(per_job, shards)), []).append(name)
    named: dict[tuple[int, int, int], list[str]] = {}
    for (shards, per_job), names in cut.items():
        for group in sharding.groups(shards, per_job):
            named.setdefault((group[0], group[-1], shards), []).extend(names)
    return [
        ShardGroup(*group, runs="|".join(map(re.escape, names))) for group, names in named.items()
    ]


def of_words(words: Sequence[str]) -> list[ShardGroup]:
    """The group of a job on a cluster.

    Args:
        words: The command line of the job's Snakemake, which names its rule.

    Returns:
        The groups that it names; none for a job of another rule.

    Examples:
        >>> of_words(["--target-jobs", "extract_shards_2_to_3_of_16:run=tiny"])
        [ShardGroup(first=2, last=3, shards=16, runs='[^/]+')]
    """
    found = {match.groups() for word in words for match in _RULE.finditer(word)}
    return [ShardGroup(int(first), int(last), int(n)) for first, last, n in sorted(found)]


def others(groups: Sequence[ShardGroup]) -> str:
    """The constraint of runs whose shards each have a job.

    Args:
        groups: Of all other runs.

    Returns:
        A regular expression that matches no run of these groups.

    Examples:
        >>> import re
        >>> pattern = others([ShardGroup(0, 1, 2, "a|b")])
        >>> [bool(re.fullmatch(pattern, run)) for run in ("a", "ab", "c")]
        [False, True, True]
    """
    grouped = sorted({g.runs for g in groups} - {ANY_RUN})
    return f"(?!(?:{'|'.join(grouped)})(?:/|$)){ANY_RUN}" if grouped else ANY_RUN
