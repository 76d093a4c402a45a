"""One table, three ways to read it: TSV for programs, Markdown for a repository, HTML for the
report."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts import files

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; margin: 1.5rem; }
h1 { font-size: 1.2rem; margin: 0 0 .2rem; }
p { max-width: 60rem; color: #51606f; margin: .4rem 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #dde3e9; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #51606f; }
tbody tr:hover { background: #f3f6f9; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells, each cell as text already; the first column names the row."""

    title: str
    note: str
    """One or two sentences: what is measured, which direction is better."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def write(self, *, tsv: Path, markdown: Path, page: Path) -> None:
        """Write all three forms."""
        lines = ["\t".join(cells) for cells in (self.header, *self.rows)]
        files.write_text(tsv, "\n".join(lines) + "\n")
        files.write_text(markdown, self.as_markdown() + "\n")
        files.write_text(page, self.as_html())

    def as_markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
            for cells in (self.header, ruler, *self.rows)
        ]
        return "\n".join([f"### {self.title}", "", self.note, "", *rows])

    def as_html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{STYLE}</style>\n"
            f"<h1>{html.escape(self.title)}</h1>\n<p>{html.escape(self.note)}</p>\n"
            f"<table>\n<thead>{row(self.header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n"
            "</table>\n</html>\n"
        )


def mebibytes(n_bytes: float | None) -> str:
    """`12.3 MiB` or `4.1 GiB`; empty where nothing was measured."""
    if n_bytes is None:
        return ""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """`12.34 ± 0.05`; the value alone where no error is known."""
    if error is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def perplexity(scores: dict) -> str:
    """Perplexity with its standard error, carried over from the loss by its derivative."""
    error = scores["loss_standard_error_nats_per_token"]
    value = scores["perplexity"]
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
