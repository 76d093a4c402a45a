"""One table, three ways to read it: TSV for programs, Markdown for a repository, HTML for the
report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts import files, pages
from workflow_scripts.handover.scores import Loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three files of a table."""
    parser.add_argument("--tsv", type=Path, required=True, help="to write")
    parser.add_argument("--markdown", type=Path, required=True, help="to write")
    parser.add_argument("--html", type=Path, required=True, help="to write")


@dataclass(frozen=True)
class Table:
    """Rows of cells, each cell as text already; the first column names the row."""

    title: str
    note: str
    """One or two sentences: what is measured, which direction is better."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    conclusions: Sequence[str] = ()
    """Below the table, a paragraph each."""

    def write(self, arguments: argparse.Namespace, *, below: str = "") -> None:
        """All three forms, as `add_arguments` names them.

        Args:
            below: HTML of what the page shows after the table.
        """
        lines = ["\t".join(cells) for cells in (self.header, *self.rows)]
        files.write_text(arguments.tsv, "\n".join(lines) + "\n")
        files.write_text(arguments.markdown, self.as_markdown() + "\n")
        files.write_text(arguments.html, pages.page(self.title, self.as_html() + below))

    def as_markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
            for cells in (self.header, ruler, *self.rows)
        ]
        table = "\n".join([f"### {self.title}", "", self.note, "", *rows])
        return "\n\n".join([table, *self.conclusions])

    def as_html(self) -> str:
        """Note, table and conclusions, without the title."""
        note, *conclusions = map(pages.paragraph, (self.note, *self.conclusions))
        return "\n".join([note, pages.table(self.header, self.rows), *conclusions])


def mebibytes(n_bytes: float | None) -> str:
    """`12.3 MiB` or `4.1 GiB`; empty where nothing was measured."""
    if n_bytes is None:
        return ""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """`12.34 ± 0.05`; the value alone where no error is known."""
    shown = f"{value:z.{digits}f}"  # no -0.00
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def perplexity(loss: Loss) -> str:
    """Perplexity with its standard error, carried over from the loss by its derivative."""
    error, value = loss.loss_standard_error_nats_per_token, loss.perplexity
    return with_error(value, None if error is None else value * error)


def change_of_perplexity(mean: float, error: float | None) -> str:
    """A difference of losses as one of perplexities, in per cent: `+1.23 ± 0.45`.

    Args:
        mean: nats per token.
        error: of it: a standard error, or half of an interval; None where none is known.
    """
    ratio = math.exp(mean)
    error = None if error is None else 100 * ratio * error
    shown = with_error(100 * abs(ratio - 1), error, digits_of(error))
    return ("−" if ratio < 1 else "+") + shown


def digits_of(error: float | None, least: int = 2) -> int:
    """Decimals that show two digits of an error, where that takes more than `least`."""
    return least if not error else max(least, 1 - math.floor(math.log10(error)))
