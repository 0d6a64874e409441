"""How the command line writes tables."""

import argparse
import os
import sys
from collections.abc import Collection
from textwrap import fill
from typing import Any, TextIO

GIB = 1 << 30
WIDTH = 80  # characters: what every terminal has


def table(
    rows: list[list[Any]], headers: list[str], numbers: Collection[int], fold: int | None = None
) -> str:
    """Make a table of aligned columns. The line of headers is bold on a terminal (`bold`), and
    nothing else is.

    Args:
        rows: cells, which are written as `str` does.
        headers: one for each column.
        numbers: columns that are aligned to the right, from 0.
        fold: the column whose words are put in several lines, so that 80 columns do; None: none.

    Returns:
        The lines of the table.
    """
    import tabulate

    tabulate.MIN_PADDING = (
        0  # beside what separates columns, headers of numbers would get two blanks more
    )
    align = ["right" if column in numbers else "left" for column in range(len(headers))]
    if fold is not None:
        cells = [headers, *([str(cell) for cell in row] for row in rows)]
        others = sum(
            2 + max(len(row[column]) for row in cells)
            for column in range(len(headers))
            if column != fold
        )
        rows = [
            [*row[:fold], fill(str(row[fold]), max(16, WIDTH - others)), *row[fold + 1 :]]
            for row in rows
        ]
    head, *lines = tabulate.tabulate(
        rows, headers, tablefmt="simple", colalign=align, disable_numparse=True
    ).split("\n")
    return "\n".join([bold(head), *(line.rstrip() for line in lines)])


def lines(text: str) -> str:
    """Fold a sentence to lines of at most 80 characters.

    Args:
        text: one line, which may be indented.

    Returns:
        The lines; all but the first are indented by two more.

    Examples:
        >>> print(lines("word " * 20))
        word word word word word word word word word word word word word word word word
          word word word word
    """
    indent = " " * (2 + len(text) - len(text.lstrip()))
    return fill(
        text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def positive(text: str) -> int:
    """Parse an integer from 1 on, for argparse.

    Args:
        text: of the command line.

    Returns:
        The integer.

    Raises:
        argparse.ArgumentTypeError: it is none.

    Examples:
        >>> positive("12")
        12
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1 on")
    return int(text)


def bold(text: str, stream: TextIO | None = None) -> str:
    """Make a text bold on a terminal; it is plain in a pipe, and wherever NO_COLOR is set
    (no-color.org).

    Args:
        text: any text.
        stream: that it is written to; None: stdout.

    Returns:
        The text, with escape sequences or without.
    """
    return _dressed(text, "1", stream or sys.stdout)


def red(text: str, stream: TextIO) -> str:
    """Make a text red and bold on a terminal, likewise.

    Args:
        text: any text.
        stream: that it is written to.

    Returns:
        The text, with escape sequences or without.
    """
    return _dressed(text, "1;31", stream)


def _dressed(text: str, code: str, stream: TextIO) -> str:
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{code}m{text}\033[0m"


def examples(*commands: str) -> dict[str, Any]:
    """Make what argparse is told to end a subcommand's help with.

    Args:
        *commands: the examples, a line each.

    Returns:
        Arguments for `add_parser`.
    """
    shown = "".join(f"  {command}\n" for command in commands)
    return {"epilog": f"examples:\n{shown}", "formatter_class": Help}


class Help(argparse.HelpFormatter):
    """Descriptions are filled to the terminal's width; examples, and what else has lines, stay as
    they are.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def capability(found: tuple[int, int] | None) -> str:
    """A compute capability as NVIDIA writes it.

    Args:
        found: major and minor; None for the CPU.

    Returns:
        Such as `8.0`; a dash for the CPU.

    Examples:
        >>> capability((8, 0)), capability(None)
        ('8.0', '–')
    """
    return "–" if found is None else ".".join(str(part) for part in found)


def size(nbytes: float) -> list[str]:
    """Two cells: GB and GiB.

    Args:
        nbytes: bytes.

    Returns:
        GB of 10⁹ bytes and GiB of 2³⁰, with two decimals.

    Examples:
        >>> size(2**31)
        ['2.15', '2.00']
    """
    return [f"{nbytes / 1e9:.2f}", f"{nbytes / GIB:.2f}"]


def format_bytes(size: float) -> str:
    """A size in GB (10⁹ bytes), or in MB where that is under 0.1 GB.

    Args:
        size: bytes.

    Returns:
        The number with its unit.

    Examples:
        >>> format_bytes(250e6), format_bytes(3.5e6)
        ('0.25 GB', '3.5 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
