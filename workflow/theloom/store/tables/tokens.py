"""The tables with a row for each token that a file may have beside its ids, documents and
positions.
"""

from collections.abc import Iterable

import numpy as np

TYPES = {
    "special": "|u1",  # 1: a special token of the tokenizer
    "role": "|u1",  # its place in `rows.roles.ROLES`; only where the corpus is of conversations
    "message": "<i4",  # number of the message in its conversation; -1: of none
    "char_start": "<i4",  # first character in the document's text; -1: of none
    "char_end": "<i4",  # the character after its last one; -1: of none
    "generated": "|u1",  # 1: of an answer that a model wrote; only where the run has answers
    "kept": "|u1",  # 1: part of a stored row; only where not every token has a row of its own
}
"""NumPy's type of each, by name in the group `tokens`."""

CHUNK = 1 << 18  # tokens of a chunk of `tokens.h5` and `answers.h5`, which are whole on the disk


def path(name: str) -> str:
    """The name of the dataset of a table.

    Args:
        name: of the table.

    Returns:
        Its path in the file.

    Examples:
        >>> path("role")
        'tokens/role'
    """
    return f"tokens/{name}"


ROW_TOKEN = "rows/token"
"""The token of each stored row, where not every token has one: of a pooled row the last one."""


def bytes_of_token(names: Iterable[str], codebooks: int = 0) -> int:
    """Bytes of the tables for one token: its id, document and position, and tables by name.

    Args:
        names: of the tables that the file has beside ids, documents and positions.
        codebooks: codes of a token; 0: it has one id.

    Returns:
        Bytes.

    Examples:
        >>> bytes_of_token(["special", "char_start", "char_end"])
        21
    """
    return (2 + max(1, codebooks)) * 4 + sum(np.dtype(TYPES[name]).itemsize for name in names)
