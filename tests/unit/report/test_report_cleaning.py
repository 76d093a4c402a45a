from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.chats.tables import rejected_schema
from workflow_scripts.handover.cleaning import CleaningReport, Histogram, SourceCounts
from workflow_scripts.report import cleaning_page, report_cleaning

HOSTILE = "<script>alert('1')</script> \"x\" \u202egpj.exe\x07"
REPORT = CleaningReport(
    n_read=1000,
    n_corrected=120,
    n_train=800,
    n_validation=40,
    n_test=60,
    n_train_weighted=1600,
    n_with_reference=0,
    n_rejected=100,
    rejected_by_reason={"duplicate": 70, "not JSON": 29, HOSTILE: 1},
    corrections={"Unicode repaired": 100, "empty turn dropped": 30},
    by_source={
        "mine": SourceCounts(n_read=400, n_kept=390, n_rejected=10, weight=2.0),
        "theirs": SourceCounts(n_read=600, n_kept=510, n_rejected=90, weight=0.3),
    },
    roles={"user": 1000, "assistant": 1000},
    n_messages={2 * n: 30 for n in range(1, 31)},
    characters_histogram=Histogram(edges=(0, 16, 32, 64), counts=(0, 500, 0, 400)),
    languages={"en": 90, "fr": 10},
    n_language_sample=100,
    personal_data={"EMAIL": 12},
)
NOTHING = REPORT.changed(
    **{name: 0 for name, value in REPORT if isinstance(value, int)},
    **{name: {} for name, value in REPORT if isinstance(value, dict)}
    | {"by_source": {"all": SourceCounts(n_read=0, n_kept=0, n_rejected=0, weight=1.0)}},
    characters_histogram=Histogram(edges=(0, 16), counts=(0, 0)),
)


def rejected_rows(n_duplicates: int = 70) -> list[dict]:
    origin = {"source": "mine", "source_file": "data/<i>.jsonl"}
    rows = [
        {"reason": "duplicate", "detail": "of data/a.jsonl:3", "raw": f"row {number} "}
        for number in range(n_duplicates)
    ]
    rows += [{"reason": "not JSON", "detail": "", "raw": "x" * 700} for _ in range(29)]
    rows.append({"reason": HOSTILE, "detail": HOSTILE, "raw": HOSTILE})
    return [{**origin, "source_line": line, **row} for line, row in enumerate(rows, start=1)]


class Page(HTMLParser):
    """Rows of tables and bars by heading, and samples by reason."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.bars: dict[str, list[tuple[float, float] | None]] = {}
        """Left edge and width of the bar in each row, in per cent."""
        self.samples: dict[str, list[str]] = {}
        self.text = ""
        self.tags: set[str] = set()
        self._title = self._reason = ""
        self._target = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        if tag in ("h2", "td", "th", "pre", "summary"):
            self._target = tag
        if tag == "h2":
            self._title = ""
        elif tag == "summary":
            self._reason = ""
        elif tag == "tr":
            self.rows.setdefault(self._title, []).append([])
            self.bars.setdefault(self._title, []).append(None)
        elif tag in ("td", "th"):
            self.rows[self._title][-1].append("")
        elif tag == "pre":
            self.samples.setdefault(self._reason, []).append("")
        elif tag == "span" and "style" in attributes:
            left, width = re.findall(r"([\d.]+)%", attributes["style"])
            self.bars[self._title][-1] = (float(left), float(width))
        elif tag == "span" and self._target == "summary":
            self._target = ""

    def handle_endtag(self, tag):
        if tag != "s":
            self._target = ""

    def handle_data(self, data):
        self.text += data
        match self._target:
            case "h2":
                self._title += data
            case "td" | "th":
                self.rows[self._title][-1][-1] += data
            case "summary":
                self._reason += data
            case "pre":
                self.samples[self._reason.strip()] = self.samples.pop(self._reason)
                self._reason = self._reason.strip()
                self.samples[self._reason][-1] += data


@pytest.fixture
def make_page(tmp_path):
    def make(report=REPORT, rejected=None) -> Page:
        report.write(tmp_path / "report.json")
        rows = rejected_rows() if rejected is None else rejected
        table = pa.Table.from_pylist(rows, schema=rejected_schema())
        # Several row groups, as in files of many rejected conversations.
        with files.parquet_stream(
            tmp_path / "rejected.parquet", table.schema, rows_per_group=32
        ) as write:
            write(table)
        report_cleaning.main(
            ["--report", str(tmp_path / "report.json")]
            + ["--rejected", str(tmp_path / "rejected.parquet")]
            + ["--page", str(tmp_path / "page.html")]
        )
        return Page(tmp_path / "page.html")

    return make


def test_help_works_without_torch_or_arrow(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_cleaning")
    assert done.returncode == 0 and "--rejected" in done.stdout
    assert imported.isdisjoint({"torch", "transformers", "pyarrow", "matplotlib"})


def test_the_funnel_names_every_loss_with_its_count_and_share(make_page):
    rows = make_page().rows["From read to kept"]
    assert [(label, n, share) for label, _, n, share in rows] == [
        ("read", "1,000", "100.0%"),
        ("duplicate", "70", "7.0%"),
        ("not JSON", "29", "2.9%"),
        ("<script>alert('1')</script> \"x\" U+202Egpj.exeU+0007", "1", "0.1%"),
        ("kept", "900", "90.0%"),
        ("of these corrected", "120", "12.0%"),
        ("train", "800", "80.0%"),
        ("validation", "40", "4.0%"),
        ("test", "60", "6.0%"),
    ]


def test_each_bar_of_the_funnel_begins_where_the_previous_one_ends(make_page):
    read, *losses, kept, corrected, train, validation, test = make_page().bars["From read to kept"]
    assert read == (0, 100)
    end = 100.0
    for left, width in losses:
        assert left + width == pytest.approx(end, abs=0.02)
        end = left
    assert kept == (0, pytest.approx(end, abs=0.02)) and corrected == (0, 12)
    assert train[0] == 0
    assert sum(train) == pytest.approx(validation[0], abs=0.02)
    assert sum(validation) == pytest.approx(test[0], abs=0.02)
    assert sum(test) == pytest.approx(end, abs=0.02)


def test_kept_conversations_are_counted_by_length_messages_role_and_language(make_page):
    rows = [(label, n) for label, _, n, _ in make_page().rows["Kept conversations"]]
    lengths, messages, rest = rows[:3], rows[3:23], rows[23:]
    assert lengths == [("16 – 31", "500"), ("32 – 63", "0"), ("64 or more", "400")]
    assert messages[0] == ("2", "30") and messages[18:] == [("38", "30"), ("more", "330")]
    assert rest == [("user", "1,000"), ("assistant", "1,000"), ("en", "90"), ("fr", "10")]


def test_sources_are_listed_with_their_weights(make_page):
    assert make_page().rows["Sources"] == [
        ["Source", "Read", "Kept", "Rejected", "Weight"],
        ["mine", "400", "390", "10 (2.5%)", "2"],
        ["theirs", "600", "510", "90 (15.0%)", "0.3"],
    ]


def test_the_page_names_samples_and_weights(make_page):
    text = make_page().text
    assert "identified on a sample of 100 conversations" in text
    assert "an epoch contains 1,600 training conversations" in text
    assert "120 kept conversations (13.3% of them) corrected" in text
    assert "EMAIL" in text


def test_hostile_text_is_shown_and_is_no_markup(make_page, tmp_path):
    page = make_page()
    assert page.tags.isdisjoint({"script", "i", "a", "img"})
    shown = "<script>alert('1')</script> \"x\" U+202Egpj.exeU+0007"
    assert page.samples[shown] == [shown]
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not {"\u202e", "\x07"} & set(written)


def test_samples_have_their_place_and_long_ones_are_cut(make_page):
    page = make_page()
    assert page.samples["not JSON"] == ["x" * 600] * 10
    assert page.text.count("100 more characters") == 10
    assert "data/<i>.jsonl:1 of data/a.jsonl:3" in page.text
    assert "29 (2.9%), 10 samples" in page.text


@given(n_rows=st.lists(st.integers(0, 70), min_size=3, max_size=3))
def test_samples_are_spread_evenly_over_the_rows_of_a_reason(n_rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "rejected.parquet"
    reasons = [f"reason {number % 3}" for number in range(210) if number // 3 < n_rows[number % 3]]
    rows = [{"reason": reason, "source_line": line} for line, reason in enumerate(reasons)]
    table = pa.Table.from_pylist(rows, schema=rejected_schema())
    with files.parquet_stream(path, table.schema, rows_per_group=16) as write:
        write(table)
    samples = cleaning_page.read_samples(path)
    assert samples.keys() == set(reasons)
    for reason, n in Counter(reasons).items():
        lines = [line for line, other in enumerate(reasons) if other == reason]
        found = [lines.index(row.source_line) for row in samples[reason]]
        assert len(found) == min(10, n)
        gaps = [after - before for before, after in zip(found, [*found[1:], n], strict=True)]
        assert found[0] == 0 and max(gaps) - min(gaps) <= 1


def test_an_empty_dataset_has_a_page(make_page):
    page = make_page(NOTHING, rejected=[])
    assert "Nothing was rejected." in page.text
    assert "No kept conversation had to be corrected." in page.text
    assert page.rows["From read to kept"][0] == ["read", "", "0", "–"]


def test_the_same_counts_give_the_same_page(make_page, tmp_path):
    pages = []
    for _ in range(2):
        make_page()
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_missing_report_is_named(tmp_path, ends_with_message):
    arguments = ["--report", tmp_path / "none.json", "--rejected", tmp_path / "r.parquet"]
    message = ends_with_message(report_cleaning.main, [*arguments, "--page", tmp_path / "p.html"])
    assert "a file is missing" in message and str(tmp_path / "none.json") in message
