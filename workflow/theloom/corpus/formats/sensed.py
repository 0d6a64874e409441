"""Endings of the files that are no texts: images and audio, and tables with a column of them."""

TABLE = ".parquet"

FILES = {
    "images": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"),
}


def suffixes(kind: str) -> tuple[str, ...]:
    """The endings of the files that a corpus is made of.

    Args:
        kind: `images` or `audio`.

    Returns:
        In lower case, with their dots.

    Examples:
        >>> ".parquet" in suffixes("images"), ".wav" in suffixes("images")
        (True, False)
    """
    return (*FILES[kind], TABLE)
