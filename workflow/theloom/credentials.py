"""Texts that give access to something: they belong into no config, file, name, log or message."""

import re
from urllib.parse import unquote

_MIXED = r"(?=[A-Za-z0-9]*[A-Z0-9])"  # no word: a folder may be called hf_something
_TOKENS = (  # by who gives them out
    rf"hf_(?:{_MIXED}[A-Za-z0-9]{{8,}}|[a-z]{{16,}})|api_org_[A-Za-z0-9]{{8,}}"  # Hugging Face
    r"|gh[opusr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|gl(?:pat|dt|rt|cbt|ptt|ft|soat)-[\w-]{8,}"
    rf"|sk-{_MIXED}[A-Za-z0-9]{{16,}}|sk-(?:proj|ant|or|svcacct|admin)-[\w-]{{8,}}"
    r"|[rs]k_(?:live|test)_\w{8,}|gsk_\w{16,}|r8_\w{16,}|nvapi-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|dop_v1_\w{16,}"  # clouds
    r"|xox[a-z]-[\w-]{8,}|npm_[A-Za-z0-9]{16,}|pypi-AgE[\w-]{8,}|dckr_pat_[\w-]{8,}"
    r"|eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*"  # a JSON web token
)
_TOKEN = re.compile(rf"(?<![A-Za-z0-9])(?:{_TOKENS})|-----BEGIN [A-Z ]*PRIVATE KEY-----")

# user:password@host, a URL's user alone (a token stands there), a key in a URL's query
_LOGIN = re.compile(r"(?<=//)[^/\s?#'\"]+(?=@)|(?<![^\s='\"\[(,])[^\s/:@='\"]+:[^\s/@]+(?=@[\w.-])")
_QUERY = re.compile(
    r"(?<=[?&;])(?:[\w.-]*(?:token|password|passwd|secret|signature|credential|api[_-]?key)[\w.-]*"
    r"|auth|key|pwd|sig)=[^&;\s'\"]+",
    re.IGNORECASE,
)
_PATTERNS = (_TOKEN, _LOGIN, _QUERY)


def has_credential(text: str) -> bool:
    """Whether a text looks as if it held a token, or a user's password.

    Args:
        text: any text; percent encoding is also looked through.

    Returns:
        True where one of the known forms of tokens, or `user:password@`, is in it.

    Examples:
        >>> has_credential("https://me:secret@example.com/data"), has_credential("org/data")
        (True, False)
    """
    return any(p.search(t) for p in _PATTERNS for t in {text, unquote(text)})


def hidden(text: str) -> str:
    """A text for people to read, without its tokens and passwords.

    Args:
        text: any text.

    Returns:
        The text with `***` for each of them.

    Examples:
        >>> hidden("https://me:secret@example.com/data: not found")
        'https://***@example.com/data: not found'
    """
    if has_credential(text) and not any(p.search(text) for p in _PATTERNS):
        text = unquote(text)
    for pattern in _PATTERNS:
        text = pattern.sub("***", text)
    return text
