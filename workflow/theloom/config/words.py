"""What a user typed for the configuration: the words of `set`, those of `theloom run`.

The type of a key in the schema says how its value is read. Commas make a run for each value. In
`set`, quotes or a backslash protect them. In a text that a shell has handed over nothing can, so
there a text is taken as it is, and its key may be given several times.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from theloom.config import schema, values
from theloom.config.values import Assignment, Value
from theloom.errors import ConfigError

_Chars = list[tuple[str, bool]]  # characters, and whether quotes or a backslash protect each

_BLANK = " \t\r\n"


def from_text(text: str) -> list[Assignment]:
    """Read the words of `set`, which are quoted as for a shell.

    Args:
        text: `key=value` words with blanks between. Quotes or a backslash protect blanks and
            commas; within the brackets of a list, blanks need none.

    Returns:
        The assignments in the order of the text; a swept key has several values.

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

    Returns:
        The assignments in the order of the words; a swept key has several values.

    Raises:
        ConfigError: As `from_text`.

    Examples:
        >>> from_words(["corpus.path=/my texts/#1, 'new'"])[0].values
        ("/my texts/#1, 'new'",)
    """
    return _each_once([_of_word(word) for word in words])


def merged(*sources: Sequence[Assignment]) -> list[Assignment]:
    """The assignments of several sources, of which a later one wins.

    Args:
        *sources: Assignments, the weakest first.

    Returns:
        One assignment for each key.

    Examples:
        >>> [a.values for a in merged(from_text("name=a"), from_text("name=b"))]
        [('b',)]
    """
    return list({a.key: a for source in sources for a in source}.values())


def encoded(assignments: Sequence[Assignment]) -> str:
    """Assignments as letters, digits, `-`, `_` and `=`, which no shell and no parser changes.

    Args:
        assignments: Keys and their values.

    Returns:
        URL-safe Base64 of their JSON.

    Examples:
        >>> assignments = from_words(["report.title=$x # 'é'"])
        >>> decoded(encoded(assignments)) == assignments
        True
    """
    plain = [[a.key, a.values] for a in assignments]
    return base64.urlsafe_b64encode(json.dumps(plain).encode()).decode()


def decoded(text: str) -> list[Assignment]:
    """The inverse of `encoded`.

    Args:
        text: What `encoded` returned.

    Returns:
        The assignments.

    Raises:
        ConfigError: The text is nothing that `encoded` made.

    Examples:
        >>> decoded(encoded(from_text("verify.seed=1")))[0].key
        'verify.seed'
    """
    try:
        plain = json.loads(base64.urlsafe_b64decode(text.encode()))
        return [
            Assignment(key, tuple(tuple(v) if isinstance(v, list) else v for v in several))
            for key, several in plain
        ]
    except (ValueError, TypeError):
        raise ConfigError(
            f"typed={text!r}: only theloom run passes typed; give your keys with set"
        ) from None


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
    return values.is_list(key) and value.startswith("[")


def _of_quoted(word: _Chars) -> Assignment:
    at = next((i for i, (char, _) in enumerate(word) if char == "="), None)
    if at is None or word[at][1]:  # quotes round the whole word protect it from the shell alone
        return _of_word(_plain(word))
    key, value = _plain(word[:at]).lstrip("+"), word[at + 1 :]
    return Assignment(key, _texts(key, value) if values.is_text(key) else _several(key, value))


def _texts(key: str, value: _Chars) -> tuple[Value, ...]:
    """The texts between commas outside quotes; one text where it is a path that exists."""
    whole = _plain(value)
    if key in schema.PATHS and _exists(whole):
        return (values.text(key, whole),)
    return tuple(values.text(key, _plain(part)) for part in _split(value))


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
        return False


def _of_word(word: str) -> Assignment:
    key, equals, value = word.partition("=")
    key = key.lstrip("+")
    if not key or not equals:
        raise ConfigError(
            f"{word!r}: write key=value, with a blank between two, and in set quotes round a value "
            "that holds blanks: set=\"corpus.path='my texts'\""
        )
    if values.is_text(key):
        return Assignment(key, (values.text(key, value),))
    return Assignment(key, _several(key, list(_unquoted(value))))


def _each_once(found: list[Assignment]) -> list[Assignment]:
    """The assignments by key: a text that is given several times is a sweep."""
    once: dict[str, Assignment] = {}
    for a in found:
        if a.key in once and not values.is_text(a.key):
            raise ConfigError(f"{a.key}: given twice; for a run for each value, write {a.key}=A,B")
        before = once[a.key].values if a.key in once else ()
        once[a.key] = Assignment(a.key, before + a.values)
    return list(once.values())


def _several(key: str, chars: _Chars) -> tuple[Value, ...]:
    """The values of a key that commas may sweep."""
    items = _split(chars)
    if values.is_list(key):
        return tuple(_list(key, item) for item in items)
    return tuple(values.scalar(key, _plain(item), _plain(chars)) for item in items)


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
        if key in schema.ONE_OR_MORE:
            text = values.text(key, _plain(chars))
            return () if text in (None, "null") else (str(text),)
        raise ConfigError(
            f"{key}: one value where a list is wanted; put brackets round it: {key}=[…]"
        )
    entries = [_plain(part) for part in _split(chars[1:-1])]
    return () if len(chars) == 2 else tuple(str(values.entry(key, entry)) for entry in entries)
