"""One document as an expression sees it: what is known of its tokens, and its columns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Document:
    """The tokens of one document, each array (tokens,); what is unknown is None.

    Attributes:
        id: Its name, for messages.
        tokens: How many it has.
        special: Whether a token is a special one of the tokenizer.
        role: Place in `rows.roles.ROLES`.
        message: Number of the message in its conversation, -1 for none.
        char_start: First character of a token in `text`, -1 for none.
        char_end: Character after its last.
        generated: Whether a token is of an answer that a model has written.
        text: The text that was tokenised.
        columns: Values of the corpus' columns, by name.
    """

    id: str
    tokens: int
    special: np.ndarray | None = None
    role: np.ndarray | None = None
    message: np.ndarray | None = None
    char_start: np.ndarray | None = None
    char_end: np.ndarray | None = None
    generated: np.ndarray | None = None
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
