"""Figures of the report: one style, readable without color, the same bytes for the same data.

The colors are those of Okabe and Ito (2008), which people of every color vision can tell apart.
Lines also differ in their markers.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import matplotlib
from markupsafe import Markup
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from workflow_scripts import files

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
    "axes.prop_cycle": pyplot.cycler(color=COLORS),
    "grid.color": "#d9dfe5",
    "grid.linewidth": 0.7,
    "errorbar.capsize": 3,
    # Without a fixed salt, the same data would give a different file each time.
    "svg.hashsalt": "tramontane",
}
matplotlib.use("Agg")
matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its stubs want literal keys


def panels(n: int = 1, *, width: float = 8, height: float = 4) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels side by side.

    Args:
        width, height: of the whole figure, inches.
    """
    figure, axes = pyplot.subplots(
        1, n, figsize=(width, height), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def stacked_panels(heights: Sequence[float], *, width: float = 8) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels one below the other.

    Args:
        heights: of each panel, inches.
    """
    figure, axes = pyplot.subplots(
        *(len(heights), 1),
        figsize=(width, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    return figure, list(axes[:, 0])


class Style(TypedDict):
    """Properties that distinguish a line from the others."""

    color: str
    marker: str


def styles() -> Iterator[Style]:
    """Color and marker of each line in turn."""
    for color, marker in itertools.cycle(zip(COLORS, MARKERS, strict=True)):
        yield {"color": color, "marker": marker}


def save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG and close it."""
    with files.atomic_file(path) as temporary:
        temporary.write_bytes(_svg(figure))


def inline(figure: Figure) -> Markup:
    """The figure as an SVG element of a page. The figure is closed."""
    return Markup(re.sub(r"(?s)^.*?(?=<svg)", "", _svg(figure).decode("utf-8")))


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def log_ticks(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, where matplotlib would write powers."""
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(ScalarFormatter())
