from __future__ import annotations

import csv
import math
from html.parser import HTMLParser

import pytest

from tests.scores import loss_of
from workflow_scripts.report.tables import Table, mebibytes, perplexity, with_error

TABLE = Table(
    title="A <b> & C",
    note="Lower is “better” <script>",
    header=["", "a|b", "x<y"],
    rows=[["one & two", "1.0", "|"], ["<i>", "2.0", '"q"']],
)


class Cells(HTMLParser):
    """Cells of the page's only table by row, and all tags of the page."""

    def __init__(self):
        super().__init__()
        self.rows, self.tags, self._open = [], set(), None

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._open = tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open in ("td", "th"):
            self.rows[-1][-1] += data


def written(tmp_path):
    paths = {key: tmp_path / f"table.{key}" for key in ("tsv", "md", "html")}
    TABLE.write(tsv=paths["tsv"], markdown=paths["md"], html=paths["html"])
    return {key: path.read_text(encoding="utf-8") for key, path in paths.items()}


def test_the_tsv_has_every_cell(tmp_path):
    lines = written(tmp_path)["tsv"].splitlines()
    cells = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert cells == [TABLE.header, *TABLE.rows]


def test_the_markdown_table_escapes_vertical_bars(tmp_path):
    lines = written(tmp_path)["md"].splitlines()
    assert lines[0] == "### A <b> & C"
    assert lines[-4:] == [
        r"|  | a\|b | x<y |",
        "| --- | ---: | ---: |",
        r"| one & two | 1.0 | \| |",
        '| <i> | 2.0 | "q" |',
    ]


def test_the_page_shows_every_cell_and_no_cell_becomes_a_tag(tmp_path):
    page = Cells()
    page.feed(written(tmp_path)["html"])
    assert page.rows == [TABLE.header, *TABLE.rows]
    assert not page.tags & {"b", "i", "script"}


def test_the_page_loads_nothing_from_outside(tmp_path):
    text = written(tmp_path)["html"]
    assert not any(part in text for part in ("http:", "https:", "src=", "href=", "@import"))


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0.0 MiB"),
        (2**20, "1.0 MiB"),
        (2**30 - 2**20, "1023.0 MiB"),
        (2**30, "1.00 GiB"),
        (4.125 * 2**30, "4.12 GiB"),
    ],
)
def test_sizes_have_binary_units(n_bytes, expected):
    assert mebibytes(n_bytes) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((12.345, 0.054), "12.35 ± 0.05"),
        ((12.345, None), "12.35"),
        ((0.1, 0.02, 3), "0.100 ± 0.020"),
        ((-0.001, None), "0.00"),
    ],
)
def test_an_error_is_shown_where_one_is_known(arguments, expected):
    # In binary, 12.345 is slightly above its decimal form.
    assert with_error(*arguments) == expected


def test_the_error_of_a_perplexity_is_that_of_the_loss_times_the_derivative():
    loss, error = 2.0, 0.01
    shown = perplexity(loss_of(math.exp(loss)).changed(loss_standard_error_nats_per_token=error))
    slope = (math.exp(loss + 1e-6) - math.exp(loss - 1e-6)) / 2e-6
    assert shown == f"{math.exp(loss):.2f} ± {slope * error:.2f}" == "7.39 ± 0.07"
    assert perplexity(loss_of(7.0).changed(loss_standard_error_nats_per_token=None)) == "7.00"
