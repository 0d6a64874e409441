"""What a `tokenizer.json` does to a text before it is cut into tokens: rules that make a letter a
book would fill the memory, and native code that runs out of it ends the process without a word.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from theloom.errors import ModelError
from theloom.model.checkpoint.folder import read_json, until_changed

MOST_GROWTH = 64  # characters for one; Unicode's own forms have up to 18
MOST_ADDED = 1_000  # tokens that a template puts round a text


def check(folder: Path, where: str) -> None:
    """Check the rules of a folder's tokenizer.json; none is there where the file is missing.

    Args:
        folder: the tokenizer's.
        where: which tokenizer, for the message.

    Raises:
        ModelError: the file is broken, or a rule blows texts up.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        _check(file, where)


@until_changed
def _check(file: Path, where: str) -> None:
    described = read_json(file, where)
    growth = 1.0
    for rule in (*_rules(described.get("normalizer")), *_rules(described.get("pre_tokenizer"))):
        growth *= max(1.0, _growth(rule))
    if growth > MOST_GROWTH:
        raise ModelError(
            f"{where}: the normalizer of tokenizer.json can make a character {growth:.3g} "
            f"characters, and may {MOST_GROWTH}; take the tokenizer from its maker"
        )
    added = sum(
        isinstance(piece, dict) and "SpecialToken" in piece
        for rule in _rules(described.get("post_processor"))
        for piece in _list(rule.get("single"))
    )
    if added > MOST_ADDED:
        raise ModelError(
            f"{where}: the post-processor of tokenizer.json adds {added:,} tokens to each text, "
            f"and may add {MOST_ADDED:,}; take the tokenizer from its maker"
        )


def _rules(rule: Any) -> Iterator[dict[str, Any]]:
    """A rule, or those of a sequence, within sequences too."""
    left = [rule]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            for several in ("normalizers", "pretokenizers", "processors"):
                left += _list(one.get(several))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _growth(rule: dict[str, Any]) -> float:
    """The most characters that a rule makes of one, or bytes where those are counted."""
    kind = rule.get("type")
    if kind == "Replace":
        content, pattern = str(rule.get("content", "")), rule.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else pattern
        if isinstance(plain, str) and plain:
            return len(content) / len(plain)
        return 1.0 + len(content)  # a regex may match nothing, between any two characters
    if kind == "Prepend":
        return 1.0 + len(str(rule.get("prepend", "")))
    if kind == "Metaspace":
        return float(len(str(rule.get("replacement", ""))))
    if kind == "Precompiled":
        return _longest_replacement(str(rule.get("precompiled_charsmap") or ""))
    return 1.0


def _longest_replacement(charsmap: str) -> float:
    """Of SentencePiece's table: its size in bytes, a trie, and texts that end with NUL."""
    try:
        data = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max(map(len, texts.split(b"\0")), default=1))
