"""Tables of the report in three forms: TSV for programs, Markdown for repositories, HTML for
readers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from workflow_scripts import files, pages
from workflow_scripts.handover.scores import Loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three files of a table."""
    parser.add_argument("--tsv", type=Path, required=True, help="to write: the table as TSV")
    parser.add_argument("--markdown", type=Path, required=True, help="to write: Markdown")
    parser.add_argument("--html", type=Path, required=True, help="to write: HTML")


class Plot(NamedTuple):
    """A drawing below a table."""

    heading: str
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, each cell as text; the first column names the row."""

    title: str
    note: str
    """Description of the measurement, and which direction is better."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    conclusions: Sequence[str] = ()
    """Paragraphs below the table."""

    def write(self, *, tsv: Path, markdown: Path, html: Path, plots: Sequence[Plot] = ()) -> None:
        """Write all three forms.

        Args:
            plots: drawings on the page, below the table.
        """
        lines = ["\t".join(cells) for cells in (self.header, *self.rows)]
        files.write_text(tsv, "\n".join(lines) + "\n")
        files.write_text(markdown, self.as_markdown() + "\n")
        files.write_text(html, pages.render("table.html.j2", table=self, plots=plots))

    def as_markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
            for cells in (self.header, ruler, *self.rows)
        ]
        table = "\n".join([f"### {self.title}", "", self.note, "", *rows])
        return "\n\n".join([table, *self.conclusions])


def mebibytes(n_bytes: float | None) -> str:
    """`12.3 MiB` or `4.12 GiB`; empty where nothing was measured."""
    if n_bytes is None:
        return ""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """`12.34 ± 0.05`; only the value if its error is unknown."""
    shown = f"{value:z.{digits}f}"  # z: no -0.00
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def signed(value: float, error: float | None = None, digits: int = 2) -> str:
    """`+1.23 ± 0.45`, `−1.23`. A difference that rounds to zero has no sign."""
    rounded = round(value, digits)
    sign = "−" if rounded < 0 else "+" if rounded else ""
    return sign + with_error(abs(value), error, digits)


def perplexity(loss: Loss) -> str:
    """Perplexity with its standard error, which is that of the loss times the derivative."""
    error, value = loss.loss_standard_error_nats_per_token, loss.perplexity
    return with_error(value, None if error is None else value * error)


def change_of_perplexity(mean: float, error: float | None) -> str:
    """A difference of losses as a change of perplexity in per cent: `+1.23 ± 0.45`.

    Args:
        mean: nats per token.
        error: standard error, or half of an interval; None if unknown.
    """
    ratio = math.exp(mean)
    error = None if error is None else 100 * ratio * error
    return signed(100 * (ratio - 1), error, digits_of(error))


def digits_of(error: float | None, least: int = 2) -> int:
    """Number of decimals that shows two digits of an error, and at least `least`."""
    return least if not error else max(least, 1 - math.floor(math.log10(error)))
