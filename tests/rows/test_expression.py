"""Expressions: what they keep of a document, and what is said of one that is wrong."""

import numpy as np
import pytest
from theloom.errors import ConfigError
from theloom.rows.document import Document
from theloom.rows.expression import ExpressionError, parse
from theloom.rows.roles import code

#        0      1       2       3           4           5       6       7            8
ROLES = "text   system  user    assistant   assistant   user    tool    assistant    template"
TEXT = "<s> Bé calm. One two  three four é5 six"
CHAT = Document(
    id="chat",
    tokens=9,
    special=np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], "u1"),
    role=np.array([code(role) for role in ROLES.split()], "u1"),
    message=np.array([-1, 0, 1, 2, 2, 3, 4, 5, -1], "i4"),
    char_start=np.array([-1, 4, 7, 13, 17, 22, 28, 33, 36], "i4"),
    char_end=np.array([-1, 6, 12, 16, 20, 27, 32, 35, 39], "i4"),
    text=TEXT,
    columns={"span": "5:8, 33:34", "pairs": [[22, 23]], "none": None, "bad": "5-8"},
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("all", range(9)),
        ("first", [0]),
        ("last", [8]),
        ("last & ~special", []),
        ("last(2)&~special", [7]),
        ("first(2)", [0, 1]),
        ("[2:4]", [2, 3]),
        ("[-3:-1]", [6, 7]),
        ("~special & ~[:4]", [4, 5, 6, 7]),
        ("assistant", [3, 4, 7]),
        ("assistant & message(-1)", [7]),
        ("message(2) | system", [1, 3, 4]),
        ("message(-9)", []),
        ("user|tool & ~all", [2, 5]),
        ("(user|tool) & ~[:5]", [5, 6]),
        ("~(assistant | special)", [1, 2, 5, 6]),
        ('match("One t")', [3, 4]),
        ('match("[Bé]+")', [1, 7]),
        (r'match("\d")', [7]),
        ('match("")', []),
        ("match('\"')", []),
        ('span("span")', [1, 2, 7]),
        ("span(pairs)", [5]),
        ("span(none)", []),
    ],
)
def test_an_expression_keeps_its_tokens(text, kept):
    expression = parse(text)
    assert expression.mask(CHAT).nonzero()[0].tolist() == [*kept]
    assert expression.most is None or expression.most >= len([*kept])


@pytest.mark.parametrize(
    ("text", "message", "at"),
    [
        ("last &", "ends where a set", 6),
        ("last special", "expected & or | before 'special'", 5),
        ("(last", r"expected '\)'", 5),
        ("asistant", "unknown word; there are all, first", 0),
        ("last & ~§", "'§' begins nothing", 8),
        ("last(0)", "at least 1", 5),
        ("[1:2:3]", "expected ']', found ':'", 4),
        ("[a:b]", "expected ':', found 'a'", 1),
        ("message", "needs an argument", 0),
        ("user(1)", "takes no argument", 0),
        ("first | match('(')", "no regular expression", 14),
        ("match('x", "no closing quote", 6),
        ("~" * 99 + "last", "nested too deeply", 50),
        ("", "ends where a set", 0),
    ],
)
def test_what_does_not_parse_is_refused_with_a_caret_under_it(text, message, at):
    with pytest.raises(ExpressionError, match=message) as refused:
        parse(text)
    said, shown, caret = str(refused.value).split("\n")
    assert said.startswith("rows.keep: ")
    assert shown == f"  {text}"
    assert caret == f"  {' ' * at}^"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("last & assistant", "assistant is of conversations, and the corpus has plain texts"),
        ("message(-1)", "set corpus.messages"),
        ("~special", "special tokens are not known"),
        ('match("a")', "match needs the texts"),
        ("span(span)", "no column 'span'; corpus.columns has none"),
    ],
)
def test_what_is_not_known_of_a_document_is_said(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text).mask(Document("plain", 4))


def test_a_range_that_is_none_is_named_with_its_document():
    with pytest.raises(ConfigError, match=r"document chat: '5-8' in column 'bad' is no range"):
        parse("span(bad)").mask(CHAT)
