"""Names of runs: short, the same for the same overrides, and different for different ones.

A name depends on the run's own profile and overrides alone: a point of a sweep that is run again by
itself finds its files. What is left out of a name (odd characters, long values) is in it as a hash.
"""

import hashlib
import re
from collections.abc import Sequence

from theloom.errors import ConfigError

LONGEST = 100
"""Characters of a name that the user gives. File systems take 255 bytes for a name."""

SHORT = 64
"""Characters of a name that is made of the profile and the overrides."""

_LONGEST_PART = 60


def run_name(base: str, overrides: Sequence[str]) -> str:
    """The name of a run's folder.

    Args:
        base: The profile, or the name that the user gave.
        overrides: `key=value` of each key that belongs into the name.

    Returns:
        `base+key=value+…` with the last word of each key (`shown_key`). Where that is longer than
        `SHORT`, a hash of all overrides stands at the end, behind those that fit, plain ones first.

    Examples:
        >>> run_name("7b", ["memory.precision_mode=bf16", "verify.seed=3"])
        '7b+precision_mode=bf16+seed=3'
    """
    parts = [_part(override) for override in overrides]
    name = "+".join([base, *parts])
    if len(name) <= SHORT or not parts:
        return name
    left, kept = SHORT - len(base) - 9, set()
    for at in sorted(range(len(parts)), key=lambda at: not _is_plain(overrides[at])):
        if len(parts[at]) < left:
            kept.add(at)
            left -= len(parts[at]) + 1
    shown = [part for at, part in enumerate(parts) if at in kept]
    return "+".join([base, *shown, _hash(overrides)])


def of_profile(profile: str) -> str:
    """The name of a profile as a part of a run's name.

    Args:
        profile: The name of a profile.

    Returns:
        The name itself, or a shortened one with a digest where it cannot be a folder's name or is
        too long.

    Examples:
        >>> of_profile("smollm2-135m")
        'smollm2-135m'
    """
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", profile) and ".." not in profile
    return profile if plain and len(profile) < _LONGEST_PART else _shortened(profile, profile)


def check(name: str) -> None:
    """Check a name that the user gave.

    Args:
        name: Of a run.

    Raises:
        ConfigError: It cannot be a folder's, or is too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", name) or ".." in name:
        several = "; for two runs write name=A name=B" if "," in name else ""
        raise ConfigError(
            f"name={name!r}: a run's name is a folder's; use letters, digits, '.', '_', '-', '+', "
            f"'=', and a letter or digit first{several}"
        )
    if len(name) > LONGEST:
        raise ConfigError(
            f"name={name[:20]}…: {len(name)} characters; a run's name has at most {LONGEST}"
        )


def _text(override: str) -> str:
    """An override with the last word of its key; of answers, whose words others have, with all."""
    key, _, value = override.partition("=")
    return f"{shown_key(key)}={value}"


def shown_key(key: str) -> str:
    """How a key is written in a run's name.

    Args:
        key: The dotted name of a key.

    Returns:
        Its last part; of an answers key all of it, since `seed` is in two sections.

    Examples:
        >>> shown_key("verify.seed"), shown_key("answers.seed")
        ('seed', 'answers.seed')
    """
    return key if key.startswith("answers.") else key.rpartition(".")[2]


def _is_plain(override: str) -> bool:
    """Whether an override is safe in a path as it is, short, and like no other one that is not."""
    text = _text(override)
    looks_hashed = re.search(r"-[0-9a-f]{8}$", text)
    return text == _safe(text) and not looks_hashed and len(text) <= _LONGEST_PART


def _part(override: str) -> str:
    text = _text(override)
    return text if _is_plain(override) else _shortened(text, override)


def _shortened(text: str, whole: str) -> str:
    """The first plain characters of a text, and a hash that keeps it apart from all like it."""
    return f"{_safe(text)[:48] or 'x'}-{_hash([whole])}"


def _safe(text: str) -> str:
    return re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-."))


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8]
