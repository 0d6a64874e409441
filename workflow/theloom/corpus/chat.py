"""Conversations to texts by a chat template, and whose each character is.

The assistant's characters are those that the template marks with `{% generation %}`. Of a template
without marks they are what each of its turns adds to the rendering of what came before, with the
prompt to answer; that is true only where a rendering stays as it was when more turns follow, which
is checked. The characters of the other roles are found by rendering the conversation once more,
with marks in place of their contents.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.corpus import rows
from theloom.corpus.rows import Document
from theloom.errors import CorpusError, printable
from theloom.rows import roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MARKS, DIFFERENCES = "generation marks", "differences of rendered prefixes"
_MOST_BYTES = 1 << 20  # of a template in a file
_MARK = "\ue000"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Span:
    """Characters that are a message's own."""

    start: int
    end: int
    role: str
    message: int


@dataclass
class Rendered:
    """A conversation as one text; what no span covers is the template's."""

    text: str = ""
    spans: list[Span] = field(default_factory=list)

    def tables(self, start: np.ndarray, end: np.ndarray) -> dict[str, np.ndarray]:
        """Role and message of tokens by their characters: whose any of them is; the assistant's,
        where a token is of two.

        Args:
            start: the first character of each token, (tokens,); -1: it has none.
            end: the character after its last one, (tokens,).

        Returns:
            `role`: codes of `roles`, (tokens,) of uint8. `message`: numbers of messages, (tokens,)
            of int32; -1 where the token is the template's.
        """
        role = np.full(len(start), roles.code("template"), "u1")
        message = np.full(len(start), -1, "<i4")
        for span in sorted(self.spans, key=lambda s: s.role == "assistant"):
            within = (start < span.end) & (end > span.start) & (start >= 0)
            role[within], message[within] = roles.code(span.role), span.message
        return {"role": role, "message": message}


class ChatTemplate:
    """The chat template of a run.

    Args:
        tokenizer: whose template it is, and whose special tokens the template names.
        name: of the tokenizer, in messages.
        file: with another template; None: the tokenizer's own.

    Raises:
        CorpusError: there is none.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", name: str, file: str | None = None
    ) -> None:
        self._tokenizer, self._name, self._file = tokenizer, name, file
        self._given = None if file is None else read_template(file)
        self._left_out: set[str] = set()  # roles
        self.assistant = MARKS if _GENERATION.search(self._template(None)) else DIFFERENCES
        log.info("corpus.messages: the assistant's tokens are told by %s", self.assistant)
        if "strftime_now" in self._template(None):
            log.warning(
                "corpus.messages: the chat template writes the date, so another day's run has "
                "other tokens; set corpus.chat_template to one without it"
            )

    def render(self, document: Document, prompt: bool = False) -> Rendered:
        """A conversation as the model reads it.

        Args:
            document: the conversation, with its messages and tools.
            prompt: whether the text ends with what makes the assistant answer.

        Returns:
            The text and its spans; empty where the document has no messages.

        Raises:
            CorpusError: a message is wrong, or the template does not take the conversation or gives
                the assistant no token.
        """
        if not document.messages:
            return Rendered()
        messages = [_message(m, n, document) for n, m in enumerate(document.messages)]
        whose = [_ROLES[m["role"]] for m in messages]
        text, marks = self._text(document, messages)
        rows.check_text(text, document.place)
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list) and str(content) in text:
                raise self._refusal(
                    document,
                    number,
                    "prints the list of the message's parts as Python does; give it one text as "
                    "content, or a template that takes parts",
                )
        spans = [*self._others(document, messages, text)]
        answers = [n for n, role in enumerate(whose) if role == "assistant"]
        if self.assistant == MARKS:
            found = self._marked(document, messages, answers, marks)
        else:
            found = [self._difference(document, messages, n, text) for n in answers]
        found = [span for span in found if span.start < span.end]
        if answers and not found:
            raise self._refusal(document, answers[0], "gives the assistant no token" + _CURE)
        return Rendered(self._prompt(document, messages, text) if prompt else text, spans + found)

    def _prompt(self, document: Document, messages: list[dict[str, Any]], text: str) -> str:
        """The text of a conversation, with the prompt to answer it."""
        last = len(messages) - 1
        if _ROLES[messages[last]["role"]] == "assistant":
            raise CorpusError(
                f"{document.place}: document {printable(document.id)!r} ends with a message of the "
                "assistant, so there is nothing to answer; leave that message out"
            )
        prompted = self._text(document, messages, prompt=True)[0]
        self._check_kept(document, last, text, prompted)
        return prompted

    def _template(self, tools: list[Any] | None) -> str:
        if self._given is not None:
            return self._given
        try:
            return str(self._tokenizer.get_chat_template(None, tools))
        except ValueError:
            raise CorpusError(
                f"corpus.messages: the tokenizer {self._name} has no chat template; set "
                "corpus.chat_template to a file with one, or model.tokenizer to one that has it"
            ) from None

    def _text(
        self, document: Document, messages: list[dict[str, Any]], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and where its `{% generation %}` marks are."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template(document.tools)
        marked = bool(_GENERATION.search(template))
        try:
            render: Any = render_jinja_template
            texts, marks = render(
                [messages],
                tools=document.tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template may raise what it likes
            reason = printable(" ".join(str(error).split()))[:300] or type(error).__name__
            raise CorpusError(
                f"{document.place}: document {printable(document.id)!r}: the chat template of "
                f"{self._shown} fails on messages 1 to {len(messages)} of "
                f"{len(document.messages or [])} ({reason}); correct the conversation, or set "
                "corpus.chat_template to a template that takes it"
            ) from None
        return texts[0], [(a, b) for a, b in marks[0] if a < b] if marked else []

    @property
    def _shown(self) -> str:
        return printable(self._file or self._name)

    def _refusal(self, document: Document, number: int, why: str) -> CorpusError:
        count = len(document.messages or [])
        return CorpusError(
            f"{document.place}: document {printable(document.id)!r}, message {number + 1} of "
            f"{count}: the chat template of {self._shown} {why}"
        )

    def _marked(
        self,
        document: Document,
        messages: list[dict[str, Any]],
        answers: list[int],
        marks: list[tuple[int, int]],
    ) -> list[Span]:
        """The spans that the template marks, each with its message."""
        numbers = answers
        if len(marks) != len(answers):  # several in one turn, or turns without any
            counts = [len(self._text(document, messages[: n + 1])[1]) for n in answers]
            added = np.diff([0, *counts])
            if (added < 0).any() or counts[-1:] != [len(marks)] * bool(counts):
                raise self._refusal(
                    document, answers[0] if answers else 0, "moves its marks" + _CURE
                )
            numbers = np.repeat(answers, added).tolist()
        return [
            Span(start, end, "assistant", number)
            for (start, end), number in zip(marks, numbers, strict=True)
        ]

    def _difference(
        self, document: Document, messages: list[dict[str, Any]], number: int, text: str
    ) -> Span:
        """What one turn of the assistant adds to the text of those before it."""
        until = text
        if number + 1 < len(messages):
            until = self._text(document, messages[: number + 1])[0]
        self._check_kept(document, number, until, text)
        before = self._before(document, messages[:number], prompt=True)
        if before is not None and until.startswith(before):
            return Span(len(before), len(until), "assistant", number)
        least = self._before(document, messages[:number], prompt=False)
        self._check_kept(document, number, least or "", until)
        # the prompt has more than the turn then begins with, such as the begin of a thought
        words = messages[number].get("content")
        if before is not None and isinstance(words, str) and words.strip():
            marked = messages[number] | {"content": _MARK}
            start = self._text(document, [*messages[:number], marked])[0].find(_MARK)
            if len(least or "") <= start and before.startswith(until[:start]):
                return Span(start, len(until), "assistant", number)
        raise self._refusal(
            document, number, f"does not begin the turn as it prompts for it{_CURE}"
        )

    def _check_kept(self, document: Document, number: int, part: str, whole: str) -> None:
        """Check that a text begins as one with fewer turns. Raises CorpusError."""
        if not whole.startswith(part):
            same = len(os.path.commonprefix([part, whole]))  # noqa: RUF071 - of texts
            changed = printable(part[max(0, same - 20) : same + 20])
            raise self._refusal(
                document, number, f"rewrites earlier turns (at {changed!r}) as more follow{_CURE}"
            )

    def _before(
        self, document: Document, messages: list[dict[str, Any]], prompt: bool
    ) -> str | None:
        """The text of the messages before a turn; None where the template takes none."""
        try:
            return self._text(document, messages, prompt)[0]
        except CorpusError:
            if messages:
                raise
            return None if prompt else ""

    def _others(
        self, document: Document, messages: list[dict[str, Any]], text: str
    ) -> Iterator[Span]:
        """The spans of all messages but the assistant's, by a rendering with marks in place of
        their contents: what is between two marks is the template's.
        """
        begin = _MARK
        while begin in text:
            begin += _MARK
        contents: list[tuple[int, str]] = []

        def mark(content: str, number: int) -> str:
            if not content.strip():
                return content
            contents.append((number, content))
            return f"{begin}{len(contents) - 1}\ue001"

        replaced = []
        for number, message in enumerate(messages):
            content = message.get("content")
            if _ROLES[message["role"]] == "assistant":
                replaced.append(message)
            elif isinstance(content, list):
                parts = [
                    part | {"text": mark(part["text"], number)}
                    if isinstance(part, dict) and isinstance(part.get("text"), str)
                    else part
                    for part in content
                ]
                replaced.append(message | {"content": parts})
            else:
                replaced.append(message | {"content": mark(content or "", number)})
        if not contents:
            return
        marked = self._text(document, replaced)[0]
        pieces = re.split(f"{begin}([0-9]+)\ue001", marked)
        at = len(pieces[0])
        if not text.startswith(pieces[0]):
            raise self._refusal(document, contents[0][0], _UNSTEADY)
        seen = set()
        for n, (place, follows) in enumerate(zip(pieces[1::2], pieces[2::2], strict=True), start=1):
            number, content = contents[int(place)]
            rest = None if 2 * n < len(pieces) - 1 else len(follows)  # the last piece ends the text
            for words in _as_written(content):
                end = at + len(words)
                ends = rest is None or end + rest == len(text)
                if ends and text.startswith(words, at) and text.startswith(follows, end):
                    break
            else:
                raise self._refusal(document, number, _UNSTEADY)
            seen.add(int(place))
            yield Span(at, end, _ROLES[messages[number]["role"]], number)
            at = end + len(follows)
        for number in {contents[n][0] for n in range(len(contents)) if n not in seen}:
            if (role := messages[number]["role"]) not in self._left_out:
                self._left_out.add(role)
                log.warning(
                    "%s: the chat template leaves out what message %d (%s) says; others of this "
                    "role may be left out, too",
                    *(document.place, number + 1, role),
                )


_CURE = (
    "; set corpus.chat_template to a template that marks the assistant's words with "
    "{% generation %}, or give each answer as a conversation of its own"
)
_UNSTEADY = (
    "writes the message in another way for what it says, so its tokens cannot be told; set "
    "corpus.chat_template to a template that writes messages as they are"
)


def _as_written(content: str) -> Iterator[str]:
    """How a template may write a text."""
    yield from dict.fromkeys(
        (
            content,
            content.strip(),
            content.lstrip(),
            content.rstrip(),
            json.dumps(content, ensure_ascii=False)[1:-1],
            json.dumps(content)[1:-1],
        )
    )


def _message(message: Any, number: int, document: Document) -> dict[str, Any]:
    """A message with the keys that templates know, without those that are null.

    Raises CorpusError where it is none.
    """
    where = f"{document.place}: document {printable(document.id)!r}, message {number + 1}"
    if not isinstance(message, dict):
        raise CorpusError(f"{where}: is {rows.kind(message)}, not an object with role and content")
    made = {str(key): value for key, value in message.items() if value is not None}
    for key, other in (("role", "from"), ("content", "value")):
        if key not in made and other in made:
            made[key] = made.pop(other)
            if key == "role":
                made[key] = _ROLES.get(str(made[key]), made[key])
    if not isinstance(made.get("role"), str) or made["role"] not in _ROLES:
        found = printable(repr(made.get("role")))[:80] if "role" in made else "missing"
        raise CorpusError(
            f"{where}: its role is {found}; give one of {', '.join(dict.fromkeys(_ROLES.values()))}"
        )
    if not isinstance(made.get("content", ""), str | list):
        raise CorpusError(
            f"{where}: its content is {rows.kind(made['content'])}, not a text or a list of parts"
        )
    return made


def read_template(file: str) -> str:
    """The chat template in a file.

    Args:
        file: its path; `~` is the home folder.

    Returns:
        The template in Jinja.

    Raises:
        CorpusError: the file cannot be read, is too long, or is not UTF-8.
    """
    path = Path(file).expanduser()
    try:
        with path.open("rb") as f:
            raw = f.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise CorpusError(
                f"corpus.chat_template: {printable(file)} has more than {_MOST_BYTES:,} bytes; "
                "give a file of a chat template"
            )
        return raw.decode()
    except OSError as error:
        raise CorpusError(
            f"corpus.chat_template: {printable(file)} cannot be read: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise CorpusError(
            f"corpus.chat_template: {printable(file)} is not UTF-8; give a Jinja file"
        ) from None
