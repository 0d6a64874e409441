"""The tables with a row for each token that a file may have beside its ids, documents and
positions.
"""

TYPES = {
    "special": "|u1",  # 1: a special token of the tokenizer
    "role": "|u1",  # its place in `rows.roles.ROLES`; only where the corpus is of conversations
    "message": "<i4",  # number of the message in its conversation; -1: of none
    "char_start": "<i4",  # first character in the document's text; -1: of none
    "char_end": "<i4",  # the character after its last one; -1: of none
}
"""NumPy's type of each, by name in the group `tokens`."""


def path(name: str) -> str:
    """The name of the dataset of a table."""
    return f"tokens/{name}"
