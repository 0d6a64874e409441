"""How the command line writes tables."""

from collections.abc import Collection
from typing import Any

GIB = 1 << 30


def table(rows: list[list[Any]], headers: list[str], numbers: Collection[int]) -> str:
    """Aligned columns; those in `numbers` to the right."""
    from tabulate import tabulate

    align = ["right" if column in numbers else "left" for column in range(len(headers))]
    return tabulate(rows, headers, tablefmt="simple", colalign=align, disable_numparse=True)


def capability(found: tuple[int, int] | None) -> str:
    """A compute capability as NVIDIA writes it; a dash for the CPU."""
    return "–" if found is None else ".".join(str(part) for part in found)


def size(nbytes: float) -> list[str]:
    """Two cells: GB and GiB."""
    return [f"{nbytes / 1e9:.2f}", f"{nbytes / GIB:.2f}"]
