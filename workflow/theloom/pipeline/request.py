"""What a call of Snakemake requests: `--config profiles=A,B set="…" overrides=FILE`.

Snakemake reads a value of `--config` as YAML, which strips quotes and cuts at ` #`. So the
arguments are read as they were typed. Jobs on a cluster get them encoded: their command lines go
through a shell, and the file may be edited while they wait.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theloom.config import overrides_file, words
from theloom.config.values import Assignment
from theloom.errors import ConfigError

KEYS = ("profiles", "set", "overrides", "typed")
"""What `--config` may hold; `typed` is how `theloom run` and jobs hand over encoded words."""


@dataclass(frozen=True)
class Request:
    """The profiles (None: the default), and what was typed for the keys."""

    profiles: str | None
    assignments: tuple[Assignment, ...]

    def arguments(self) -> list[str]:
        """The arguments of `--config` that request the same, and that every shell leaves alone.

        Returns:
            `key=value` words; none where nothing is requested.

        Examples:
            >>> Request("7b", ()).arguments()
            ['profiles=7b']
        """
        profiles = [] if self.profiles is None else [f"profiles={self.profiles}"]
        typed = [f"typed={words.encoded(self.assignments)}"] if self.assignments else []
        return profiles + typed


def read(config: Mapping[str, Any], typed: Sequence[str], is_module: bool = False) -> Request:
    """What a call requests.

    Args:
        config: Snakemake's config, which may come from a file too.
        typed: The arguments of `--config` as they were typed. They go before the config.
        is_module: Whether another workflow uses this one, whose config may hold keys of its own.

    Returns:
        The profiles, and the keys with their words.

    Raises:
        ConfigError: An argument is unknown or there twice, or its words are wrong.

    Examples:
        >>> read({}, ["profiles=7b", "set=report.title='a #1'"]).assignments[0].values
        ('a #1',)
    """
    given: dict[str, Any] = {key: config[key] for key in KEYS if config.get(key) is not None}
    seen: set[str] = set()
    for key, _, value in (argument.partition("=") for argument in typed):
        if key in seen:
            raise ConfigError(f"--config {key}=: given twice; put all of it into one {key}")
        seen.add(key)
        given[key] = value
    unknown = sorted((set(config) | seen) - set(KEYS))
    if unknown and not is_module:
        raise ConfigError(
            f"--config takes profiles, set and overrides, found {', '.join(unknown)}; "
            'to set a key of the configuration: --config set="memory.streaming_chunk_size=256"'
        )
    for key in KEYS:
        if not isinstance(given.get(key, ""), str):
            raise ConfigError(
                f"{key} takes text, found {given[key]!r}; put quotes round the whole value"
            )
    sources = [
        overrides_file.read(Path(given["overrides"])) if "overrides" in given else [],
        words.from_text(given.get("set", "")),
        words.decoded(given["typed"]) if "typed" in given else [],
    ]
    return Request(given.get("profiles") or None, tuple(words.merged(*sources)))


def of_words(
    profiles: str | None,
    typed: Sequence[str],
    files: Sequence[Path] = (),
    text: Sequence[Assignment] = (),
) -> Request:
    """What the words of a command line request, as a shell has split them.

    Args:
        profiles: A comma list; None: the default profile.
        typed: `key=value` words.
        files: YAML files of keys, of which a later one wins; words go before all of them.
        text: What one text of words, `set`, has assigned.

    Returns:
        The profiles, and the keys with their words.

    Raises:
        ConfigError: A word or a file is wrong.

    Examples:
        >>> of_words("7b", ["report.title=a #1"]).assignments[0].values
        ('a #1',)
    """
    sources = [*map(overrides_file.read, files), text, words.from_words(typed)]
    return Request(profiles, tuple(words.merged(*sources)))
