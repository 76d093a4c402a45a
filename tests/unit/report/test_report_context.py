from __future__ import annotations

from pathlib import Path

import pytest

from tests import browser
from tests.context import context_scores
from tests.unit.report.conftest import ASKED, GAIN, chain_settings
from workflow_scripts.handover.chain import chain_of
from workflow_scripts.report import report_context


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    for path, report in {
        "evaluation/tiny/chats/base.context.json": context_scores([0, 0, 0]),
        "runs/r/evaluation/merged.context.json": context_scores([100, 90, 80], **GAIN),
        "runs/r/evaluation/Q4_K_M.context.json": context_scores([90, 70]),
    }.items():
        report.write(results / path)
    chain = results / "chain.json"
    chain_of("r", chain_settings("mistral")).write(chain)
    paths = [tmp_path / f"context.{form}" for form in ("tsv", "md", "html")]
    report_context.main(
        ["--chains", str(chain), "--context", *ASKED.context]
        + ["--tsv", str(paths[0]), "--markdown", str(paths[1]), "--html", str(paths[2])]
    )
    return paths


def test_each_link_has_a_row_with_both_effective_lengths_and_its_scores(write, read_tsv):
    effective = ["1,024 / 4,096 (512–2,048)", "2,048 / 4,096 (1,024–2,048)"]
    assert read_tsv(write[0]) == [
        ["Link", "Effective (RULER)", "Effective (NoLiMa)", "Gain of long context"]
        + ["512", "1,024", "2,048"],
        ["r: base", "not measurable", "not measurable", "–", "0", "0", "0"],
        ["r: merged", *effective, "0.0123 ± 0.0045", "100", "90", "80"],
        ["r: Q4_K_M", *effective, "–", "90", "70", ""],
    ]


@pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_heat_maps_without_any_request(write, tmp_path):
    page = write[2].read_text()
    # The page's policy refuses images, so the drawing must not contain one.
    assert "<image" not in page and page.count("<svg") == 1
    seen = browser.see(write[2], tmp_path, height=1000)
    assert seen.requests == seen.console == []
    assert seen.screenshot.stat().st_size > 30_000


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_context")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
