"""What a user typed for the configuration: the words of `set`, those of `theloom run`, a YAML file.

The type of a key in the schema says how its value is read. A text is taken as it is typed: no
grammar reads it. Numbers, choices and lists may be several, with commas between: a run for each.
"""

import base64
import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from theloom.config import schema
from theloom.errors import ConfigError

Value = str | None | tuple[str, ...]
_Chars = list[tuple[str, bool]]  # characters, and whether quotes or a backslash protect each

_TYPES = schema.types()
_BLANK = " \t\r\n"
_MOST_DIGITS = 18  # what 64 bits hold


@dataclass(frozen=True)
class Assignment:
    """The values that were typed for a key: several of them are a sweep."""

    key: str
    values: tuple[Value, ...]


def from_text(text: str) -> list[Assignment]:
    """Read the words of `set`, which are quoted as for a shell.

    Args:
        text: `key=value` words with blanks between. Quotes or a backslash protect blanks and
            commas; within the brackets of a list, blanks need none.

    Raises:
        ConfigError: A word is no assignment, or a value cannot be one of its key.

    Examples:
        >>> from_text("corpus.path='/my texts/a,b' verify.seed=1,2")[1].values
        ('1', '2')
    """
    words: list[_Chars] = [[]]
    depth = 0
    for char, quoted in _unquoted(text):
        if not quoted and char in _BLANK and not (depth and _opens_list(words[-1])):
            words.append([])
            depth = 0
        else:
            depth += 0 if quoted else (char == "[") - (char == "]")
            words[-1].append((char, quoted))
    return _each_once([_of_quoted(word) for word in words if word])


def from_words(words: Sequence[str]) -> list[Assignment]:
    """Read words that a shell has split: `key=value` each, whose text nothing protects any more.

    Args:
        words: The arguments of a command line.

    Raises:
        ConfigError: As `from_text`.

    Examples:
        >>> from_words(["corpus.path=/my texts/#1, 'new'"])[0].values
        ("/my texts/#1, 'new'",)
    """
    return _each_once([_of_word(word) for word in words])


def from_file(path: Path) -> list[Assignment]:
    """Read a YAML file of keys, nested or dotted; where a key takes one value, a list is a sweep.

    Args:
        path: The file. A value is what is written there: `2024_01_15` and `1e5` are no numbers
            for a key that takes text.

    Raises:
        ConfigError: The file is missing or no such YAML, or as `from_text`.
    """
    try:
        root = yaml.compose(path.expanduser().read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"overrides={str(path)!r}: cannot be read ({_line(error)})") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"overrides={str(path)!r}: not YAML ({_line(error)})") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"overrides={str(path)!r}: not a mapping; write 'key: value' lines")
    found = list(_of_mapping(root, ""))
    keys = [a.key for a in found]
    if twice := next((k for k in keys if keys.count(k) > 1), None):
        raise ConfigError(f"overrides={str(path)!r}: {twice} is there twice; keep one")
    return found


def merged(*sources: Sequence[Assignment]) -> list[Assignment]:
    """The assignments of several sources, of which a later one wins."""
    return list({a.key: a for source in sources for a in source}.values())


def encoded(assignments: Sequence[Assignment]) -> str:
    """Assignments as letters, digits, `-`, `_` and `=`, which no shell and no parser changes.

    Examples:
        >>> assignments = from_words(["report.title=$x # 'é'"])
        >>> decoded(encoded(assignments)) == assignments
        True
    """
    plain = [[a.key, a.values] for a in assignments]
    return base64.urlsafe_b64encode(json.dumps(plain).encode()).decode()


def decoded(text: str) -> list[Assignment]:
    """The inverse of `encoded`.

    Raises:
        ConfigError: The text is nothing that `encoded` made.
    """
    try:
        plain = json.loads(base64.urlsafe_b64decode(text.encode()))
        return [
            Assignment(key, tuple(tuple(v) if isinstance(v, list) else v for v in values))
            for key, values in plain
        ]
    except (ValueError, TypeError):
        raise ConfigError(
            f"typed={text!r}: only theloom run passes typed; give your keys with set"
        ) from None


def written(key: str, value: Value) -> str:
    """`key=value` for names and messages; two that differ are written differently."""
    if isinstance(value, tuple):
        plain = (v if re.fullmatch(r'[^,"\s]+', v) else json.dumps(v) for v in value)
        return f"{key}=[{','.join(plain)}]"
    return f"{key}={'null' if value is None else value}"


def unknown_key(requested: str) -> str:
    """One line for a key that the schema does not have: the nearest one, and those of the section.

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
    """The known name that a mistyped one is like, as words for a message; else nothing."""
    like = difflib.get_close_matches(requested, known, n=1, cutoff=0.6)
    return f" (did you mean {like[0]!r}?)" if like else ""


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def _unquoted(text: str) -> Iterator[tuple[str, bool]]:
    """Each character of a text that is quoted as for a shell; an empty one where quotes end."""
    quote, escaped = "", False
    for char in text:
        if escaped:
            if quote and char not in '"\\':
                yield "\\", True
            yield char, True
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif char == quote:
            yield "", True
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        else:
            yield char, bool(quote)
    if quote or escaped:
        raise ConfigError(
            f"{text!r}: {quote or 'a backslash'} at its end protects nothing; close each quote, "
            "and write \\' for an apostrophe"
        )


def _plain(chars: _Chars) -> str:
    return "".join(char for char, _ in chars)


def _opens_list(word: _Chars) -> bool:
    key, _, value = _plain(word).partition("=")
    return _is_list(key) and value.startswith("[")


def _of_quoted(word: _Chars) -> Assignment:
    at = next((i for i, (char, _) in enumerate(word) if char == "="), None)
    if at is None or word[at][1]:  # quotes round the whole word protect it from the shell alone
        return _of_word(_plain(word))
    key, value = _plain(word[:at]).lstrip("+"), word[at + 1 :]
    return Assignment(key, (_text(key, _plain(value)),) if _is_text(key) else _several(key, value))


def _of_word(word: str) -> Assignment:
    key, equals, value = word.partition("=")
    key = key.lstrip("+")
    if not key or not equals:
        raise ConfigError(
            f"{word!r}: write key=value, with a blank between two, and in set quotes round a value "
            "that holds blanks: set=\"corpus.path='my texts'\""
        )
    if _is_text(key):
        return Assignment(key, (_text(key, value),))
    return Assignment(key, _several(key, list(_unquoted(value))))


def _each_once(found: list[Assignment]) -> list[Assignment]:
    """The assignments by key: a text that is given several times is a sweep."""
    once: dict[str, Assignment] = {}
    for a in found:
        if a.key in once and not _is_text(a.key):
            raise ConfigError(f"{a.key}: given twice; for a run for each value, write {a.key}=A,B")
        before = once[a.key].values if a.key in once else ()
        once[a.key] = Assignment(a.key, before + a.values)
    return list(once.values())


def _members(key: str) -> tuple[Any, ...]:
    """The types that a key takes; none where it is no key of the schema, such as a group."""
    annotation = _TYPES.get(key)
    if annotation is None:
        return ()
    return (annotation,) if _is_list(key) else get_args(annotation) or (annotation,)


def _is_text(key: str) -> bool:
    return str in _members(key)


def _is_list(key: str) -> bool:
    return _TYPES.get(key) == list[str]


def _text(key: str, value: str) -> Value:
    if value == "null" and type(None) in _members(key):
        return None
    if not value:
        raise ConfigError(f"{key}: no value; give one, or leave the key out")
    if value == "???" or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        raise ConfigError(
            f"{key}: {value!r} has characters that no value may hold (control characters, line "
            "breaks, bytes that are not UTF-8; or it is ???); rename it"
        )
    return value


def _several(key: str, chars: _Chars) -> tuple[Value, ...]:
    """The values of a key that commas may sweep."""
    items = _split(chars)
    if _is_list(key):
        return tuple(_list(key, item) for item in items)
    return tuple(_one(key, _plain(item), _plain(chars)) for item in items)


def _split(chars: _Chars) -> list[_Chars]:
    """The parts between commas outside quotes and brackets, without the blanks round them."""
    parts: list[_Chars] = [[]]
    depth = 0
    for char, quoted in chars:
        if not quoted:
            depth += (char == "[") - (char == "]")
        if char == "," and not quoted and not depth:
            parts.append([])
        else:
            parts[-1].append((char, quoted))
    for part in parts:
        for end in (0, -1):
            while part and part[end][0] in _BLANK and part[end] != ("", True) and not part[end][1]:
                part.pop(end)
    return parts


def _list(key: str, chars: _Chars) -> tuple[str, ...]:
    if len(chars) < 2 or chars[0] != ("[", False) or chars[-1] != ("]", False):
        raise ConfigError(
            f"{key}: one value where a list is wanted; put brackets round it: {key}=[…]"
        )
    entries = [_plain(part) for part in _split(chars[1:-1])]
    return () if len(chars) == 2 else tuple(str(_entry(key, entry)) for entry in entries)


def _entry(key: str, entry: str) -> str:
    if not entry:
        raise ConfigError(f"{key}: an entry of the list is empty; take out a comma, or fill it")
    return str(_text(key, entry))


def _one(key: str, value: str, whole: str) -> Value:
    """The value of a number, a choice or a group, looked at as far as its type is known here."""
    types = _members(key)
    if value == "null" and (type(None) in types or not types):
        return None if types else value
    if not value:
        raise ConfigError(f"{key}: no value; give one, or leave the key out")
    if int in types and not re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", value):
        raise ConfigError(f"{key}: {whole!r} is not an integer{_as_integer(whole)}")
    if int in types and len(value) > _MOST_DIGITS:
        raise ConfigError(f"{key}: {value[:20]}… has more than {_MOST_DIGITS} digits")
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


def _of_mapping(node: yaml.MappingNode, prefix: str) -> Iterator[Assignment]:
    for key_node, value in node.value:
        key = prefix + str(key_node.value)
        if isinstance(value, yaml.MappingNode):
            if not any(known.startswith(f"{key}.") for known in _TYPES):
                raise ConfigError(unknown_key(key))
            yield from _of_mapping(value, f"{key}.")
        elif isinstance(value, yaml.SequenceNode):
            yield Assignment(key, _of_sequence(key, value))
        else:
            yield Assignment(key, (_of_scalar(key, value),))


def _of_sequence(key: str, node: yaml.SequenceNode) -> tuple[Value, ...]:
    scalars = all(isinstance(child, yaml.ScalarNode) for child in node.value)
    if _is_list(key) and scalars:
        return (tuple(_entry(key, child.value) for child in node.value),)
    if _is_list(key) and all(isinstance(child, yaml.SequenceNode) for child in node.value):
        return tuple(value for child in node.value for value in _lists_of(key, child))
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
    if _is_list(key):
        raise ConfigError(
            f"{key}: one value where a list is wanted; put brackets round it: {key}: […]"
        )
    return _text(key, value) if _is_text(key) else _one(key, value, value)
