"""Where a file came from, as attributes: versions, code, config. They hold no secret, and no path
of a user's home.
"""

import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from theloom.config import locations
from theloom.store import file_format

PACKAGES = (
    "theloom",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "h5py",
    "numpy",
    "snakemake",
    "hydra-core",
)


def attributes(file_kind: str, **others: Any) -> dict[str, Any]:
    """The attributes that every file has: format, versions, code, and those that the stage adds.

    Args:
        file_kind: `activations`, `tokens`, `estimate`, `model` or `verification`.
        **others: what the stage adds; the user's home folder in them becomes `~`.

    Returns:
        Values by name; `set_attributes` writes them.

    Examples:
        >>> attributes("tokens", source="a/model")["format"]
        'theloom.tokens'
    """
    return {
        "format": f"theloom.{file_kind}",
        "format_version": file_format.FORMAT_VERSION,
        "python_version": platform.python_version(),
        "package_versions": {p: v for p in PACKAGES if (v := package_version(p))},
        "code_version": code_version(),
    } | {name: without_home(value) for name, value in others.items()}


@cache
def package_version(package: str) -> str | None:
    """The version of a package.

    Args:
        package: its name, as pip installs it.

    Returns:
        The version; None where it is not installed.

    Examples:
        >>> package_version("no-such-package") is None
        True
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def code_version() -> str:
    """The version of the code that runs.

    Returns:
        The commit of the checkout, with `+` if it has changes; outside of a checkout the version of
        the package.
    """
    checkout = locations.checkout()
    if checkout is not None:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        try:
            described = subprocess.run(
                command, cwd=checkout, capture_output=True, text=True, timeout=10, check=True
            )
            return described.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # no git, or no repository: the package's version has to do
    return package_version("theloom") or "unknown"


def without_home(value: Any) -> Any:
    """Write the user's home folder as `~` in every string.

    Args:
        value: strings, dicts and lists, nested.

    Returns:
        A copy; other values are left as they are.

    Examples:
        >>> without_home([str(Path.home() / "texts"), 3])
        ['~/texts', 3]
    """
    if isinstance(value, str):
        home = str(Path.home())
        return re.sub(rf"(?<![\w.-]){re.escape(home)}(?=/|$)", "~", value) if home != "/" else value
    if isinstance(value, dict):
        return {k: without_home(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_home(v) for v in value]
    return value
