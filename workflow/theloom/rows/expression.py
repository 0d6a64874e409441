"""Expressions that choose tokens of a document: `last & ~special`, `assistant & message(-1)`.

An expression is parsed once (`parse`), and evaluated over each document (`Expression.mask`). Words
are sets of tokens; `~` is all others, `&` what is in both, `|` what is in either, in this order.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from theloom.errors import ConfigError, printable
from theloom.rows import terms
from theloom.rows.document import Document
from theloom.rows.terms import Term

MOST_CHARACTERS = 2000
_MOST_NESTED = 50

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<word>[A-Za-z_][A-Za-z_0-9]*)
    |(?P<number>-?\d{1,12}(?!\d))
    |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<sign>[&|~()\[\]:])
    )""",
    re.VERBOSE | re.DOTALL,
)

_WORDS = (*terms.PLAIN, "message", "span", "match")


class ExpressionError(ConfigError):
    """An expression that does not parse, or that asks for what a document does not have.

    Its text ends with the expression, and a caret under what is wrong.
    """

    def __init__(self, message: str, text: str, at: int) -> None:
        super().__init__(message)
        self._text, self._at = text, at

    def __str__(self) -> str:
        before = printable(self._text[: self._at])
        shown = before + printable(self._text[self._at :])
        return f"{super().__str__()}\n  {shown}\n  {' ' * len(before)}^"


@dataclass(frozen=True)
class Expression:
    """A parsed expression.

    Attributes:
        text: As it was written.
    """

    text: str
    _root: Term
    _name: str

    @property
    def keeps_all(self) -> bool:
        """Whether it is `all`, and so needs no mask."""
        return isinstance(self._root, terms.All)

    @property
    def most(self) -> int | None:
        """The most tokens of a document that it can keep; None: any number.

        Examples:
            >>> parse("last(3) & ~special").most, parse("assistant").most
            (3, None)
        """
        return self._root.most

    @property
    def asks_for_generated(self) -> bool:
        """Whether it tells tokens of answers from others."""
        return any(isinstance(term, terms.Generated) for term in terms.parts(self._root))

    def mask(self, document: Document) -> np.ndarray:
        """Which tokens of a document the expression keeps.

        Args:
            document: What is known of it.

        Returns:
            (tokens,) bool.

        Raises:
            ExpressionError: The expression needs what is not known of the document.

        Examples:
            >>> parse("[1:-1]").mask(Document("a", 4)).tolist()
            [False, True, True, False]
        """
        try:
            return self._root.mask(document)
        except terms.UnknownError as error:
            raise ExpressionError(f"{self._name}: {error}", self.text, error.at) from None


def parse(
    text: str, name: str = "rows.keep", words: Collection[str] = _WORDS, others: str = ""
) -> Expression:
    """Parse an expression.

    Args:
        text: The expression.
        name: What the user gave it as, for messages.
        words: The words that it may have.
        others: What the message says of the other words.

    Returns:
        The expression, which knows its own text.

    Raises:
        ExpressionError: It does not parse.

    Examples:
        >>> parse("~special & ~[:4]").text
        '~special & ~[:4]'
    """
    return Expression(text, _Parser(text, name, words, others).parsed(), name)


class _Parser:
    """A parser by recursive descent."""

    def __init__(self, text: str, name: str, words: Collection[str], others: str) -> None:
        self._text, self._name, self._words, self._others = text, name, words, others
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(
                f"{name}: an expression of {len(text):,} characters; give at most "
                f"{MOST_CHARACTERS:,}"
            )
        self._depth = 0
        self._tokens: list[tuple[str, str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                quoted = text[at] in "\"'"
                what = "has no closing quote" if quoted else "begins nothing that an expression has"
                self._fail(f"{text[at]!r} {what}", at)
            kind = str(found.lastgroup)
            self._tokens.append((kind, found[kind], found.start(kind)))
            at = found.end()
        self._tokens.append(("end", "", end))
        self._next = 0

    def parsed(self) -> Term:
        term = self._either()
        kind, found, at = self._tokens[self._next]
        if kind != "end":
            self._fail(f"expected & or | before {found!r}", at)
        return term

    def _either(self) -> Term:
        term = self._both()
        while self._take("|"):
            term = terms.Either(term, self._both())
        return term

    def _both(self) -> Term:
        term = self._single()
        while self._take("&"):
            term = terms.Both(term, self._single())
        return term

    def _single(self) -> Term:
        kind, found, at = self._tokens[self._next]
        self._depth += 1
        if self._depth > _MOST_NESTED:
            self._fail("nested too deeply", at)
        self._next += 1
        if found == "~":
            term: Term = terms.Not(self._single())
        elif found == "(":
            term = self._either()
            self._expect(")")
        elif found == "[":
            first = self._number(optional=True)
            self._expect(":")
            term = terms.Range(first, self._number(optional=True))
            self._expect("]")
        elif kind == "word":
            term = self._word(found, at)
        else:
            what = "the expression ends" if kind == "end" else f"found {found!r}"
            self._fail(f"{what} where a set of tokens is expected, such as last", at)
        self._depth -= 1
        return term

    def _word(self, word: str, at: int) -> Term:
        if word in _WORDS and word not in self._words:
            self._fail(f"{word} {self._others}", at)
        called = self._take("(")
        if called and word in ("first", "last"):
            count_at = self._tokens[self._next][2]
            count = self._number()
            if count is None or count < 1:
                self._fail(f"{word} takes a number of tokens, at least 1", count_at)
            term: Term = terms.Range(None, count) if word == "first" else terms.Range(-count, None)
        elif called and word == "message":
            number = self._number()
            assert number is not None
            term = terms.Message(number, at)
        elif called and word in ("span", "match"):
            term = self._of_text(word, at)
        elif called:
            self._fail(f"{word} takes no argument" if word in terms.PLAIN else self._unknown(), at)
        elif word in terms.PLAIN:
            return terms.PLAIN[word](at)
        elif word in ("message", "span", "match"):
            example = {"message": "message(-1)", "span": 'span("column")'}.get(word, 'match("…")')
            self._fail(f"{word} needs an argument: {example}", at)
        else:
            self._fail(self._unknown(), at)
        self._expect(")")
        return term

    def _of_text(self, word: str, at: int) -> Term:
        kind, found, string_at = self._tokens[self._next]
        if kind == "word" and word == "span":
            self._next += 1
            return terms.Span(found, at)
        if kind != "string":
            self._fail(f'{word} takes a text in quotes: {word}("…")', string_at)
        self._next += 1
        quote = found[0]
        inner = found[1:-1].replace("\\" + quote, quote)
        if word == "span":
            return terms.Span(inner, at)
        try:
            return terms.Match(re.compile(inner), at)
        except (re.error, OverflowError, RecursionError) as error:
            self._fail(f"the pattern is no regular expression ({error})", string_at)

    def _number(self, optional: bool = False) -> int | None:
        kind, found, at = self._tokens[self._next]
        if kind == "number":
            self._next += 1
            return int(found)
        if not optional:
            self._fail("expected an integer", at)
        return None

    def _take(self, sign: str) -> bool:
        kind, found, _ = self._tokens[self._next]
        taken = kind == "sign" and found == sign
        self._next += taken
        return taken

    def _expect(self, sign: str) -> None:
        if not self._take(sign):
            _, found, at = self._tokens[self._next]
            self._fail(f"expected {sign!r}" + (f", found {found!r}" if found else ""), at)

    def _unknown(self) -> str:
        words = ", ".join([*terms.PLAIN, "last(n)", "message(n)", 'span("…")', 'match("…")'])
        return f"unknown word; there are {words} and [a:b]"

    def _fail(self, message: str, at: int) -> NoReturn:
        raise ExpressionError(f"{self._name}: {message}", self._text, at)
