"""Who wrote a token: the roles of a conversation, as they stand in files.

A file keeps one byte a token, its place in `ROLES`. Tokens of plain text are `text`; what a chat
template adds around and between the messages is `template`. What stands for an image in a message
is `image`, whoever shows it.
"""

ROLES = ("text", "system", "user", "assistant", "tool", "template", "image")


def code(role: str) -> int:
    """The byte that files keep for a role.

    Args:
        role: one of `ROLES`.

    Returns:
        Its place there.

    Examples:
        >>> code("assistant")
        3
    """
    return ROLES.index(role)
