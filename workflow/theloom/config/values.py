"""How the type of a key in the schema reads a value that was typed for it.

A text is taken as it is: no grammar reads it. All else is looked at as far as its type is known
here; OmegaConf converts it.
"""

import difflib
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, get_args

from theloom.config import schema
from theloom.errors import ConfigError

Value = str | None | tuple[str, ...]
_TYPES = schema.types()
MOST_DIGITS = 18  # what 64 bits hold
BEYOND = 10**MOST_DIGITS


@dataclass(frozen=True)
class Assignment:
    """The values that were typed for a key: several of them are a sweep."""

    key: str
    values: tuple[Value, ...]


def written(key: str, value: Value) -> str:
    """`key=value` for names and messages; two that differ are written differently.

    Args:
        key: The dotted name of a key.
        value: What it is set to.

    Returns:
        One word; an entry of a list that has blanks, quotes or commas is written as JSON.

    Examples:
        >>> written("verify.seed", None), written("corpus.columns", ("a", "b, c"))
        ('verify.seed=null', 'corpus.columns=[a,"b, c"]')
    """
    if isinstance(value, tuple):
        plain = (v if re.fullmatch(r'[^,"\s]+', v) else json.dumps(v) for v in value)
        return f"{key}=[{','.join(plain)}]"
    return f"{key}={'null' if value is None else value}"


def unknown_key(requested: str) -> str:
    """One line for a key that the schema does not have: the nearest one, and those of the section.

    Args:
        requested: The dotted name as it was typed.

    Returns:
        The message.

    Examples:
        >>> unknown_key("store.type").partition(";")[0]
        "unknown key 'store.type' (did you mean 'store.dtype'?)"
    """
    known = [k.name for k in schema.leaf_keys()]
    section = requested.rpartition(".")[0]
    siblings = [k for k in known if section and k.rpartition(".")[0] == section]
    if not siblings:
        siblings = [k for k in known if k.startswith(f"{requested}.")]
    siblings = siblings or list(dict.fromkeys(k.split(".")[0] for k in known))
    return f"unknown key {requested!r}{near(requested, known)}; keys there: {', '.join(siblings)}"


def near(requested: str, known: list[str]) -> str:
    """The known name that a mistyped one is like.

    Args:
        requested: The name as it was typed.
        known: The names that there are.

    Returns:
        Words for the end of a message; empty where none is similar.

    Examples:
        >>> near("float23", ["float16", "float32"])
        " (did you mean 'float32'?)"
    """
    like = difflib.get_close_matches(requested, known, n=1, cutoff=0.6)
    return f" (did you mean {like[0]!r}?)" if like else ""


def members(key: str) -> tuple[Any, ...]:
    """The types that a key takes; none where it is no key of the schema, such as a group.

    Args:
        key: The dotted name of a key.

    Returns:
        Types, NoneType among them where `null` may be given; empty where the schema has no such
        key, such as a group.

    Examples:
        >>> members("model.source"), members("corpus")
        ((<class 'str'>,), ())
    """
    annotation = _TYPES.get(key)
    if annotation is None:
        return ()
    return (annotation,) if is_list(key) else get_args(annotation) or (annotation,)


def is_text(key: str) -> bool:
    """Whether a key takes any text.

    Args:
        key: The dotted name of a key.

    Returns:
        True where `str` is among its types.

    Examples:
        >>> is_text("model.source"), is_text("verify.seed")
        (True, False)
    """
    return str in members(key)


def is_list(key: str) -> bool:
    """Whether a key takes a list of texts.

    Args:
        key: The dotted name of a key.

    Returns:
        True for lists alone.

    Examples:
        >>> is_list("corpus.columns"), is_list("corpus.path")
        (True, False)
    """
    return _TYPES.get(key) == list[str]


def text(key: str, value: str) -> Value:
    """The value of a key that takes text.

    Args:
        key: The dotted name of the key.
        value: As it was typed.

    Returns:
        The text as it was typed; None for `null` where the key takes it.

    Raises:
        ConfigError: The value is empty, or no line of Unicode.

    Examples:
        >>> text("model.revision", "1e5")
        '1e5'
    """
    if value == "null" and type(None) in members(key):
        return None
    if not value:
        raise ConfigError(f"{key}: no value; give one, or leave the key out")
    if value == "???" or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        raise ConfigError(
            f"{key}: {value!r} has characters that no value may hold (control characters, line "
            "breaks, bytes that are not UTF-8; or it is ???); rename it"
        )
    return value


def entry(key: str, value: str) -> str:
    """An entry of a list of texts.

    Args:
        key: The dotted name of the key.
        value: One entry, as it was typed.

    Returns:
        The entry.

    Raises:
        ConfigError: As `text`.

    Examples:
        >>> entry("corpus.columns", "label")
        'label'
    """
    if not value:
        raise ConfigError(f"{key}: an entry of the list is empty; take out a comma, or fill it")
    return str(text(key, value))


def scalar(key: str, value: str, whole: str) -> Value:
    """The value of a number, a choice or a group.

    Args:
        key: The key.
        value: One value.
        whole: All that was typed for the key, for the message.

    Returns:
        The value as it was typed, which Hydra converts; None for `null` where the key takes it.

    Raises:
        ConfigError: The value is empty, or not written as a number of the key's type is.

    Examples:
        >>> scalar("verify.seed", "12", "12"), scalar("corpus.max_tokens", "null", "null")
        ('12', None)
    """
    types = members(key)
    if value == "null" and (type(None) in types or not types):
        return None if types else value
    if not value:
        raise ConfigError(f"{key}: no value; give one, or leave the key out")
    if int in types and not re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", value):
        raise ConfigError(f"{key}: {whole!r} is not an integer{_as_integer(whole)}")
    if int in types and len(value) > MOST_DIGITS:
        raise ConfigError(f"{key}: {value[:20]}… has more than {MOST_DIGITS} digits")
    if float in types and not _is_number(value):
        raise ConfigError(f"{key}: {whole!r} is not a number; write it as 0.5 or 5e-3")
    return value


def _as_integer(text: str) -> str:
    digits = re.sub(r"[_, ']", "", text)
    if not _is_number(digits) or not float(digits).is_integer() or abs(float(digits)) > 1e18:
        return "; write digits alone"
    return f"; write {int(digits) if digits.lstrip('+-').isdecimal() else int(float(digits))}"


def _is_number(text: str) -> bool:
    if not re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?", text):
        return False
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
