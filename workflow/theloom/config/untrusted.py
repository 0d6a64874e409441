"""Config files from somebody else: what they could do beyond giving values to keys.

Hydra and OmegaConf let a value read the environment (`${oc.env:…}`), and YAML lets a short file
stand for a huge one. Values end up in files that are shared, and in commands of a scheduler.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from antlr4 import ParserRuleContext
from omegaconf import errors as omegaconf_errors
from omegaconf import grammar_parser

from theloom.config import values
from theloom.credentials import has_credential
from theloom.errors import ConfigError

MOST_BYTES = 1 << 20
_MOST_NODES = 100_000  # aliases written out

# Keys that a user's own submit command may format. No blank, no quote and no operator of a shell.
_OF_COMMANDS = ("resources.gpu_model", "resources.constraint")
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.:,+-]*"


def check_file(path: Path) -> None:
    """Check a YAML file before anything composes it; one that is no YAML is left to its reader.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is huge or nested too deeply, or a value calls a resolver.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}: more than {MOST_BYTES:,} bytes; a config has fewer")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        check_nodes(root, str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; a config has few levels") from None
    for text in _scalars(root):
        if call := _resolver(text):
            raise ConfigError(
                f"{path}: {call} calls a resolver, which may read the environment or the machine "
                "into a file that is shared; write the value itself, or ${another.key}"
            )


def check_nodes(root: yaml.Node | None, where: str) -> None:
    """Check that a YAML document stays small when its aliases are expanded.

    Args:
        root: Of the composed document; None for an empty one.
        where: The file or key, for the message.

    Raises:
        ConfigError: It has more values than a config can have.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # one that is within itself is left to its reader
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    if root is not None and size(root) > _MOST_NODES:
        raise ConfigError(f"{where}: more than {_MOST_NODES:,} values; a config has fewer")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _scalars(root: yaml.Node | None) -> Iterator[str]:
    seen: set[int] = set()
    left = [] if root is None else [root]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield node.value
        left += _children(node)


def _resolver(text: str) -> str:
    """The first call of a resolver in a text, as OmegaConf's own grammar reads it."""
    if "${" not in text:
        return ""
    try:
        tree = grammar_parser.parse(text)
    except omegaconf_errors.OmegaConfBaseException:
        return ""  # composing it reports it
    left = [tree]
    while left:
        node = left.pop()
        if type(node).__name__ == "InterpolationResolverContext":
            return str(node.getText())
        if isinstance(node, ParserRuleContext):
            left += list(node.getChildren())
    return ""


def check_values(config: dict[str, Any]) -> None:
    """Check the values of a composed config, as plain data.

    Args:
        config: Nested dicts of the keys.

    Raises:
        ConfigError: One looks like a password or a token, is no line of Unicode or beyond 64 bits,
            or is no plain word where a command of a scheduler may hold it.
    """
    for key, value in _leaves(config, ""):
        if isinstance(value, int) and abs(value) >= values.BEYOND:
            digits = f"more than {values.MOST_DIGITS} digits"
            raise ConfigError(f"{key}: {str(value)[:20]}… has {digits}; give a smaller number")
        if not isinstance(value, str) or value in ("", "???"):
            continue
        if has_credential(value):
            raise ConfigError(
                f"{key}: holds what looks like a password or a token, and would be in every file "
                "of the run; leave it out, and log in (hf auth login) or set HF_TOKEN"
            )
        values.text(key, value)
        if key in _OF_COMMANDS and not re.fullmatch(_WORD, value):
            raise ConfigError(
                f"{key}: {value!r} goes into commands of a scheduler; use letters, digits, '_', "
                "'.', ':', ',', '+', '-', and a letter or digit first (Slurm's operators: in "
                "slurm_extra of workflow/profiles/slurm)"
            )


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of plain data, by the dotted key under which it is."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for child in value:
            yield from _leaves(child, key)
    else:
        yield key, value
