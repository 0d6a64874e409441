"""What expressions are made of: sets of a document's tokens, each of which gives a mask."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from theloom.errors import printable
from theloom.rows import roles
from theloom.rows.document import Document


class UnknownError(Exception):
    """A term needs what is not known of a document; `at` is where the term stands."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


class Term(Protocol):
    """A set of tokens."""

    @property
    def most(self) -> int | None:
        """The most tokens of a document that it has; None: no limit is known."""
        ...

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens of a document.

        Args:
            document: Its tokens, and what is known of them.

        Returns:
            (tokens,) bool.

        Raises:
            UnknownError: The document does not tell what the term needs.
        """
        ...


@dataclass(frozen=True)
class All:
    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose all tokens.

        Args:
            document: Its tokens.

        Returns:
            (tokens,) bool.
        """
        return np.ones(document.tokens, bool)


@dataclass(frozen=True)
class Range:
    """Tokens by their place in the document, as a slice of Python takes them."""

    first: int | None
    stop: int | None

    @property
    def most(self) -> int | None:
        """The most tokens of a document that it has; None: no limit is known."""
        first, stop = self.first or 0, self.stop
        if stop is None:
            return -first if first < 0 else None
        if (first < 0) == (stop < 0):
            return max(0, stop - first)
        return min(-first, stop) if first < 0 else None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens of the range.

        Args:
            document: Its tokens.

        Returns:
            (tokens,) bool.
        """
        mask = np.zeros(document.tokens, bool)
        mask[self.first : self.stop] = True
        return mask


@dataclass(frozen=True)
class Special:
    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the special tokens.

        Args:
            document: Its tokens, and which are special.

        Returns:
            (tokens,) bool.

        Raises:
            UnknownError: The tokenizer does not tell.
        """
        if document.special is None:
            raise UnknownError("special tokens are not known: the tokenizer does not tell", self.at)
        return document.special.astype(bool)


@dataclass(frozen=True)
class Generated:
    """What a model has written: the tokens of answers."""

    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens of answers.

        Args:
            document: Its tokens, and which are generated.

        Returns:
            (tokens,) bool.

        Raises:
            UnknownError: There are no answers.
        """
        if document.generated is None:
            raise UnknownError(
                "generated is of answers, and there are none; set answers.source", self.at
            )
        return document.generated.astype(bool)


@dataclass(frozen=True)
class Role:
    """What a speaker of a conversation said, or the images in it."""

    role: str
    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens of the role.

        Args:
            document: Its tokens and their roles.

        Returns:
            (tokens,) bool.

        Raises:
            UnknownError: The document is no conversation.
        """
        if document.role is None:
            raise UnknownError(_no_conversation(self.role), self.at)
        return document.role == roles.code(self.role)


@dataclass(frozen=True)
class Message:
    """The message of a conversation with a number; negative ones count from the end."""

    number: int
    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens of the message.

        Args:
            document: Its tokens and their messages.

        Returns:
            (tokens,) bool; none where there are fewer messages.

        Raises:
            UnknownError: The document is no conversation.
        """
        if document.message is None:
            raise UnknownError(_no_conversation("message"), self.at)
        number = self.number
        if number < 0:
            number += int(document.message.max(initial=-1)) + 1
        return (document.message == number) & (document.message >= 0)


@dataclass(frozen=True)
class Span:
    """Tokens in the ranges of characters that a column has."""

    column: str
    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens that lie in the ranges.

        Args:
            document: Its tokens, their characters and its columns.

        Returns:
            (tokens,) bool.

        Raises:
            UnknownError: There is no such column, or it has no ranges of characters.
        """
        if self.column not in document.columns:
            there = ", ".join(document.columns) or "none"
            raise UnknownError(
                f"no column {self.column!r}; corpus.columns has {there}; add it there", self.at
            )
        value = document.columns[self.column]
        try:
            ranges = char_ranges(value)
        except ValueError:
            raise UnknownError(
                f"document {printable(document.id)}: {printable(repr(value))[:80]} in column "
                f"{self.column!r} is no range of characters; write 3:10, several as 3:10,20:25",
                self.at,
            ) from None
        return _in_ranges(document, ranges, self.at)


@dataclass(frozen=True)
class Match:
    """Tokens in the matches of a regular expression."""

    pattern: re.Pattern[str]
    at: int
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens that lie in a match.

        Args:
            document: Its tokens, their characters and its text.

        Returns:
            (tokens,) bool.

        Raises:
            UnknownError: The text is not there.
        """
        if document.text is None:
            raise UnknownError(
                "match needs the texts, which are there when the corpus is tokenised alone: set "
                "rows.keep",
                self.at,
            )
        found = (m.span() for m in self.pattern.finditer(document.text))
        return _in_ranges(document, found, self.at)


@dataclass(frozen=True)
class Not:
    term: Term
    most: int | None = None

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens that the term has not.

        Args:
            document: As of the term.

        Returns:
            (tokens,) bool.
        """
        return ~self.term.mask(document)


@dataclass(frozen=True)
class Both:
    left: Term
    right: Term

    @property
    def most(self) -> int | None:
        """The smaller limit of both terms; None: no limit is known."""
        known = [term.most for term in (self.left, self.right) if term.most is not None]
        return min(known, default=None)

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens that both terms have.

        Args:
            document: As of the terms.

        Returns:
            (tokens,) bool.
        """
        return self.left.mask(document) & self.right.mask(document)


@dataclass(frozen=True)
class Either:
    left: Term
    right: Term

    @property
    def most(self) -> int | None:
        """The sum of both limits; None: no limit is known."""
        left, right = self.left.most, self.right.most
        return None if left is None or right is None else left + right

    def mask(self, document: Document) -> np.ndarray:
        """Choose the tokens that one of the terms has.

        Args:
            document: As of the terms.

        Returns:
            (tokens,) bool.
        """
        return self.left.mask(document) | self.right.mask(document)


def parts(term: Term) -> Iterator[Term]:
    """A term and all that it is made of.

    Args:
        term: The whole.

    Yields:
        The term itself, then its parts, depth first.
    """
    yield term
    for name in ("term", "left", "right"):
        if (part := getattr(term, name, None)) is not None:
            yield from parts(part)


def _role(role: str) -> Callable[[int], Term]:
    return lambda at: Role(role, at)


# The words without an argument
PLAIN: dict[str, Callable[[int], Term]] = {
    "all": All,
    "first": lambda at: Range(None, 1),
    "last": lambda at: Range(-1, None),
    "special": Special,
    "generated": Generated,
    **{name: _role(name) for name in ("assistant", "user", "system", "tool", "image")},
}


def _no_conversation(word: str) -> str:
    return (
        f"{word} is of conversations, and the corpus has plain texts; set corpus.messages to the "
        "column that holds them"
    )


def char_ranges(value: Any) -> list[tuple[int, int]]:
    """Ranges of characters as a column has them.

    Args:
        value: A text such as `3:10` or `3:10,20:25`, or pairs of numbers as JSON; empty: none.

    Returns:
        First character and end of each.

    Raises:
        ValueError: It is none of these.

    Examples:
        >>> char_ranges("3:10, 20:25"), char_ranges("[[3, 10]]"), char_ranges("")
        ([(3, 10), (20, 25)], [(3, 10)], [])
    """
    if isinstance(value, bytes):
        value = value.decode()
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str) and not value.lstrip().startswith("["):
        pairs: Any = [part.split(":") for part in value.split(",")]
        pairs = [(int(a), int(b)) for a, b in pairs]
    else:
        pairs = json.loads(value) if isinstance(value, str) else value
        if isinstance(pairs, list) and pairs and not isinstance(pairs[0], list | tuple):
            pairs = [pairs]
    try:
        found = [(a, b) for a, b in pairs]
    except TypeError:
        raise ValueError("no pairs") from None
    if not all(type(n) is int for pair in found for n in pair):
        raise ValueError("no numbers")
    if not all(0 <= a <= b for a, b in found):
        raise ValueError("a range that ends before it begins")
    return found


def _in_ranges(document: Document, ranges: Iterable[tuple[int, int]], at: int) -> np.ndarray:
    """Tokens that share a character with a range."""
    start, end = document.char_start, document.char_end
    if start is None or end is None:
        raise UnknownError(
            "the characters of the tokens are not known: this tokenizer does not give them", at
        )
    length = int(end.max(initial=0))
    pairs = np.array([*ranges], "<i8").reshape(-1, 2).clip(0, length)
    steps = np.bincount(pairs[:, 0], minlength=length + 1)
    steps -= np.bincount(pairs[:, 1], minlength=length + 1)
    covered = np.concatenate([[0], np.cumsum(np.cumsum(steps)[:length] > 0)])  # characters before
    there = (start >= 0) & (end > start)
    return there & (covered[end.clip(0)] > covered[start.clip(0)])
