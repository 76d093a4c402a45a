"""What a person opens in the end: Snakemake's report, and the pages in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import browser
from tests.workflow.conftest import DEMO, TINY, snakemake_in
from workflow_scripts import files


@pytest.fixture(scope="module")
def report(tiny: Path, tmp_path_factory) -> Path:
    """Snakemake's report as one page."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = snakemake_in(tiny)("--report", path, "--configfile", DEMO, TINY)
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")
def test_a_browser_opens_it_without_the_network_and_without_an_error(report, tmp_path):
    seen = browser.see(report, tmp_path, height=900)
    assert seen.requests == []
    wrong = ("error", "refused", "failed", "uncaught")
    assert not [line for line in seen.console if any(word in line.lower() for word in wrong)]
    assert seen.screenshot.stat().st_size > 50_000


def test_it_holds_every_page_under_its_category(tiny: Path, tmp_path) -> None:
    path = tmp_path / "report.zip"
    result = snakemake_in(tiny)("--report", path, "--configfile", DEMO, TINY)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(path) as archive:
        names = [Path(name).name for name in archive.namelist()]
        text = "".join(
            archive.read(name).decode(errors="ignore")
            for name in archive.namelist()
            if name.endswith((".html", ".js"))
        )
    assert names.count("overview.html") == 1
    for name in ("comparison.html", "chain.html", "chain.svg", "loss.svg", "cleaning_report.html"):
        assert name in names
    for category in ("Overview", "Runs", "Comparison", "Training", "Data"):
        assert f'"{category}"' in text


def test_every_figure_of_the_build_is_traced_to_its_file(tiny: Path) -> None:
    results = tiny / "results"
    rows = pq.read_table(results / "report" / "all_metrics.parquet").to_pylist()
    assert {row["run"] for row in rows} == {"generic", "mistral"}
    assert len(rows) > 100
    for row in rows:
        content = files.read_json(tiny / row["file"])
        # Of a task: scores, a place among them, and then as of any other.
        *above, key = row["key"].split(".")
        for name in above:
            content = content[int(name) if isinstance(content, list) else name]
        assert content[key] == row["value"], row
        assert row["error"] is None or row["error"] in content.values(), row
