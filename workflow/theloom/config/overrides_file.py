"""The keys of a YAML file: `--config overrides=FILE`, `theloom run … overrides=FILE`.

Every value is what is written in the file, and the schema's type reads it: YAML's own types would
make `2024_01_15` and `1e5` numbers, also where a key takes text.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from theloom.config import schema, untrusted, values
from theloom.config.values import Assignment, Value
from theloom.errors import ConfigError


def read(path: Path) -> list[Assignment]:
    """Read a YAML file of keys, nested or dotted; where a key takes one value, a list is a sweep.

    Args:
        path: The file. A value is what is written there: `2024_01_15` and `1e5` are no numbers
            for a key that takes text.

    Returns:
        The assignments in the order of the file; none for an empty file.

    Raises:
        ConfigError: The file is missing or no such YAML, or as `words.from_text`.
    """
    try:
        root = yaml.compose(path.expanduser().read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"overrides={str(path)!r}: cannot be read ({_line(error)})") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"overrides={str(path)!r}: not YAML ({_line(error)})") from None
    untrusted.check_nodes(root, f"overrides={str(path)!r}")
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"overrides={str(path)!r}: not a mapping; write 'key: value' lines")
    found = list(_of_mapping(root, ""))
    keys = [a.key for a in found]
    if twice := next((k for k in keys if keys.count(k) > 1), None):
        raise ConfigError(f"overrides={str(path)!r}: {twice} is there twice; keep one")
    return found


def check_texts(path: Path, prefix: str) -> None:
    """Check that YAML changes no text of a file that Hydra composes: `1_000` is 1000 there.

    Args:
        path: A file of the config folder.
        prefix: What goes before its keys, such as `corpus.`.

    Raises:
        ConfigError: A text stands without quotes and reads like a number or a truth value.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # Hydra reports it
    for key, node in _plain_scalars(root, prefix):
        read = OmegaConf.create(f"- {node.value}")[0] if values.is_text(key) else None
        if isinstance(read, int | float) and str(read) != node.value:
            raise ConfigError(f"{path}: {key}: YAML reads {node.value} as {read}; put it in quotes")


def _plain_scalars(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The scalars without quotes below a mapping, by dotted key."""
    for key_node, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}{key_node.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _plain_scalars(value, f"{key}.")
        elif isinstance(value, yaml.ScalarNode) and value.style is None:
            yield key, value


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def _of_mapping(node: yaml.MappingNode, prefix: str) -> Iterator[Assignment]:
    for key_node, value in node.value:
        key = prefix + str(key_node.value)
        if isinstance(value, yaml.MappingNode):
            if not any(known.startswith(f"{key}.") for known in schema.types()):
                raise ConfigError(values.unknown_key(key))
            yield from _of_mapping(value, f"{key}.")
        elif isinstance(value, yaml.SequenceNode):
            yield Assignment(key, _of_sequence(key, value))
        else:
            yield Assignment(key, (_of_scalar(key, value),))


def _of_sequence(key: str, node: yaml.SequenceNode) -> tuple[Value, ...]:
    scalars = all(isinstance(child, yaml.ScalarNode) for child in node.value)
    if values.is_list(key) and scalars:
        return (tuple(values.entry(key, child.value) for child in node.value),)
    if values.is_list(key) and all(isinstance(child, yaml.SequenceNode) for child in node.value):
        return tuple(v for child in node.value for v in _lists_of(key, child))
    if not scalars or not node.value:
        raise ConfigError(f"{key}: a list of {len(node.value)} that holds no plain values")
    return tuple(_of_scalar(key, child) for child in node.value)


def _lists_of(key: str, node: yaml.SequenceNode) -> tuple[Value, ...]:
    if not all(isinstance(child, yaml.ScalarNode) for child in node.value):
        raise ConfigError(f"{key}: lists within lists within lists; two levels make a sweep")
    return _of_sequence(key, node)


def _of_scalar(key: str, node: yaml.ScalarNode) -> Value:
    value = node.value
    if node.style is None and value in ("", "~", "Null", "NULL"):  # other spellings of YAML's null
        value = "null"
    if values.is_list(key):
        raise ConfigError(
            f"{key}: one value where a list is wanted; put brackets round it: {key}: […]"
        )
    return values.text(key, value) if values.is_text(key) else values.scalar(key, value, value)
