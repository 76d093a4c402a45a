"""Figures of the report: one style, readable without color, the same bytes for the same data.

Colors are those of Okabe and Ito (2008), told apart by people of every color vision; lines differ
in their markers too.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from workflow_scripts import files, pages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvp*"
QUIET = "#6b7785"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9dfe5",
    "grid.linewidth": 0.7,
    "errorbar.capsize": 3,
    # Without a fixed salt the same data would give another file each time.
    "svg.hashsalt": "tramontane",
}


def panels(n: int = 1, *, width: float = 8, height: float = 4) -> tuple[Figure, list[Axes]]:
    """An empty figure with axes side by side.

    Args:
        width, height: of the whole, inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Of this figure alone: its parts take the style when they are made.
    matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its stubs want literal keys
    matplotlib.rcParams["axes.prop_cycle"] = pyplot.cycler(color=COLORS)
    figure, axes = pyplot.subplots(
        1, n, figsize=(width, height), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


class Style(TypedDict):
    """What tells a line from the others."""

    color: str
    marker: str


def styles() -> Iterator[Style]:
    """Color and marker of one line after the other."""
    for color, marker in itertools.cycle(zip(COLORS, MARKERS, strict=True)):
        yield {"color": color, "marker": marker}


def save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG, and let go of it."""
    with files.atomic_file(path) as temporary:
        temporary.write_bytes(_svg(figure))


def inline(figure: Figure, caption: str) -> str:
    """HTML of the figure with its caption, for a page; the figure is let go of."""
    drawing = re.sub(r"(?s)^.*?(?=<svg)", "", _svg(figure).decode("utf-8"))
    label = pages.visible(caption)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure class="plot">{drawing}<figcaption>{label}</figcaption></figure>'


def _svg(figure: Figure) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def log_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, where matplotlib would write powers."""
    from matplotlib.ticker import ScalarFormatter

    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(ScalarFormatter())
