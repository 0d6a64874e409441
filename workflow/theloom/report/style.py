"""Style and output of the report's figures: a drawing as SVG, and its data as a table.

Colours are those of Okabe and Ito, which readers of every colour vision can distinguish; markers,
hatches and line styles distinguish series in grey print. Heat maps use cividis, whose lightness
alone encodes the value.
"""

import csv
import html
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from theloom.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
HEAT = "cividis"
ROWS_SHOWN = 500  # of a table in the report; its CSV holds all

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays searchable, and browsers have fonts for every script
    "svg.hashsalt": "theloom",  # reproducible files
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Table:
    """The data of a figure: columns, with units in their names, and rows of numbers and strings."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def as_csv(self) -> str:
        r"""Format as comma-separated values with a header.

        Returns:
            The text.

        Examples:
            >>> Table(("shard", "seconds"), [("a", 3)]).as_csv()
            'shard,seconds\na,3\n'
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_written(cell) for cell in row] for row in self.rows)
        return text.getvalue()


_CHARACTERS, _LINE = 8, 0.22  # characters of a title per inch; height of a line in inches


@dataclass(frozen=True)
class Drawn:
    """A finished figure: its drawing and its data."""

    drawing: "Figure"
    table: Table


def new(
    width: float, height: float, title: str, rows: int = 1, columns: int = 1, **options: Any
) -> tuple["Figure", list["Axes"]]:
    """Create an empty figure.

    Args:
        width: inches.
        height: inches; further lines of a long title are added to it.
        title: of the figure.
        rows: rows of panels.
        columns: columns of panels.
        options: further arguments of `Figure.subplots`.

    Returns:
        The figure, and its panels in reading order.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib; pip install 'theloom[report]'") from None

    mpl.rcParams.update(_STYLE)
    # matplotlib warns of each missing font and glyph
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    title = in_lines(title, int(_CHARACTERS * width))
    drawing = Figure(figsize=(width, height + _LINE * title.count("\n")))
    axes = drawing.subplots(rows, columns, squeeze=False, **options)
    drawing.suptitle(title, fontsize=13, x=0.01, ha="left")
    return drawing, list(axes.flat)


def in_lines(title: str, most: int) -> str:
    """Wrap a title at blanks, and at the plus signs in names of runs.

    Args:
        title: the title.
        most: characters of a line.

    Returns:
        The title with line breaks.

    Examples:
        >>> in_lines("tiny+memory.quantization=8bit+name=a", 30)
        'tiny+memory.quantization=8bit\\n+name=a'
    """
    wrapped = []
    for line in title.split("\n"):
        wrapped.append("")
        for word in re.split(r"(?<= )|(?=\+)", line):
            if wrapped[-1] and len(wrapped[-1]) + len(word) > most:
                wrapped.append("")
            wrapped[-1] += word
    return "\n".join(part.rstrip() for part in wrapped)


def bars(n: int) -> dict[str, Any]:
    """Style of the bars of the n-th series.

    Args:
        n: from 0.

    Returns:
        Arguments of Matplotlib's `bar`.
    """
    return {"color": COLOURS[n], "hatch": HATCHES[n], "edgecolor": "white"}


def line(n: int) -> dict[str, Any]:
    """Style of the line of the n-th series.

    Args:
        n: from 0.

    Returns:
        Arguments of Matplotlib's `plot`.
    """
    return {"color": COLOURS[n], "marker": MARKERS[n], "linestyle": LINES[n]}


def note(title: str, sentence: str) -> Drawn:
    """Create a placeholder for a figure whose data a run lacks.

    Args:
        title: of the figure.
        sentence: what to do to get the data.

    Returns:
        The placeholder.
    """
    drawing, (panel,) = new(8, 1.2, title)
    panel.axis("off")
    panel.text(0.0, 0.5, sentence, va="center", wrap=True)
    return Drawn(drawing, Table(("note",), [(sentence,)]))


def save(drawn: Drawn, stem: Path) -> None:
    """Write `<stem>.svg`, `<stem>.csv`, and `<stem>.html`: the table, with the CSV to download.

    Args:
        drawn: the figure.
        stem: path without extension.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn.drawing.savefig(
        f"{stem}.svg", format="svg", metadata={"Date": None, "Creator": "TheLoom"}
    )
    text = drawn.table.as_csv()
    Path(f"{stem}.csv").write_text(text, encoding="utf-8")
    Path(f"{stem}.html").write_text(_page(drawn.table, text, stem.name), encoding="utf-8")
    log.info("%s.svg, and its data in %s.csv", stem, stem.name)


def lengths(values: Sequence[float | None]) -> list[float]:
    """Lengths of bars.

    Args:
        values: of the bars; None: not known.

    Returns:
        The values, zero for None.

    Examples:
        >>> lengths([1, None])
        [1.0, 0.0]
    """
    return [0.0 if v is None else float(v) for v in values]


def _written(cell: Any) -> Any:
    return f"{cell:.6g}" if isinstance(cell, float) else "" if cell is None else cell


def _page(table: Table, text: str, name: str) -> str:
    """A self-contained page without scripts."""

    def cells(row: Sequence[Any], tag: str) -> str:
        kinds = ["n" if isinstance(cell, int | float) else "t" for cell in row]
        return "".join(
            f'<{tag} class="{kind}">{html.escape(str(_written(cell)))}</{tag}>'
            for kind, cell in zip(kinds, row, strict=True)
        )

    shown = table.rows[:ROWS_SHOWN]
    more = (
        f"<p>The first {len(shown)} of {len(table.rows)} rows.</p>"
        if len(table.rows) > len(shown)
        else ""
    )
    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in shown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{name}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1rem; color: #111; background: #fff; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; }}
th, td {{ text-align: left; white-space: pre; }}
th {{ border-bottom: 2px solid #111; }}
.n {{ text-align: right; }}
</style></head><body>
<p><a download="{name}.csv"
href="data:text/csv;charset=utf-8,{quote(text)}">{name}.csv</a></p>{more}
<div><table><thead><tr>{cells(table.columns, "th")}</tr></thead><tbody>
{body}
</tbody></table></div></body></html>
"""
