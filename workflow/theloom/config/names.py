"""Names of runs: short, the same for the same overrides, and different for different ones.

A name is the profile and the overrides, as far as they are plain and short. Whatever is left out
of it (odd characters, long values, keys that a sweep does not vary) is in it as a hash.
"""

import hashlib
import re
from collections.abc import Sequence

from theloom.errors import ConfigError

LONGEST = 100
"""Characters of a run's name. File systems take 255 bytes, and other names contain it."""

_LONGEST_PART = 60
_PLAIN = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def run_name(base: str, swept: Sequence[str], fixed: Sequence[str]) -> str:
    """The name of a run's folder.

    Args:
        base: The profile, or the name that the user gave.
        swept: `key=value` of each key that varies within this call.
        fixed: The others that belong into the name.

    Returns:
        `base+key=value+…` with the last word of each key. In a sweep a hash stands for all that is
        fixed; where the name would be too long, a hash stands for what does not fit.

    Examples:
        >>> run_name("7b", [], ["memory.precision_mode=bf16", "verify.seed=3"])
        '7b+precision_mode=bf16+seed=3'
        >>> run_name("7b", ["verify.seed=3"], ["memory.precision_mode=bf16"])
        '7b+seed=3+a5c9a6ae'
    """
    if swept:
        parts = [*map(_part, swept), *([_hash(fixed)] if fixed else [])]
    else:
        parts = [_part(override) for override in fixed]
    name = "+".join([base, *parts])
    if len(name) <= LONGEST:
        return name
    short, end = base, f"+{_hash([*swept, *fixed])}"
    for part in map(_part, swept or fixed):
        if len(f"{short}+{part}{end}") > LONGEST:
            break
        short += f"+{part}"
    return short + end


def of_profile(profile: str) -> str:
    """The name of a profile as a part of a run's name."""
    if re.fullmatch(_PLAIN, profile) and len(profile) <= _LONGEST_PART:
        return profile
    return _shortened(profile, profile)


def check(name: str) -> None:
    """Check a name that the user gave.

    Raises:
        ConfigError: It cannot be a folder's, or is too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", name) or ".." in name:
        raise ConfigError(
            f"name={name!r}: a run's name is a folder's; use letters, digits, '.', '_', '-', '+', "
            "'=', and a letter or digit first; give name=A name=B for two runs"
        )
    if len(name) > LONGEST:
        raise ConfigError(
            f"name={name[:20]}…: {len(name)} characters; a run's name has at most {LONGEST}"
        )


def _part(override: str) -> str:
    """An override with the last word of its key, and only characters that are safe in a path."""
    key, _, value = override.partition("=")
    text = f"{key.rpartition('.')[2]}={value}"
    plain = re.fullmatch(r"[A-Za-z0-9._=-]+", text) and text == text.strip("-.")
    looks_hashed = re.search(r"-[0-9a-f]{8}$", text)
    if plain and not looks_hashed and len(text) <= _LONGEST_PART:
        return text
    return _shortened(text, override)


def _shortened(text: str, whole: str) -> str:
    """The first plain characters of a text, and a hash that keeps it apart from all like it."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")[:48]
    return f"{plain or 'x'}-{_hash([whole])}"


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8]
