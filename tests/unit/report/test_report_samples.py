from __future__ import annotations

from pathlib import Path

import pytest

from tests import browser
from tests.reports import answers_of
from tests.unit.report.conftest import chain_settings
from workflow_scripts.handover.answers import Answers
from workflow_scripts.handover.chain import chain_of
from workflow_scripts.report import report_samples, samples


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    folder = results / "runs" / "r" / "evaluation"
    paths = {"base": results / "evaluation" / "tiny" / "chats" / "base.answers.json"}
    paths |= {link: folder / f"{link}.answers.json" for link in ("merged", "F16", "Q4_K_M")}
    for link, path in paths.items():
        answers_of(
            link,
            n=2,
            prompt="Prompt {number} <b>",
            reference="Reference {number} <i>",
            answer="{link} says {number}",
            n_ended=1,
        ).write(path)

    def run():
        page = tmp_path / "samples.html"
        chain = results / "chain.json"
        chain_of("r", chain_settings("mistral")).write(chain)
        report_samples.main(["--chains", str(chain), "--page", str(page)])
        return page

    run.paths = paths
    return run


def test_every_link_answers_every_prompt_on_one_page(write):
    page = write().read_text()
    for part in (
        "<h2>r<",
        "<summary>Prompt 1 &lt;b&gt;<",
        "Reference 0",
        "base says 1",
        "Q4_K_M says 1",
    ):
        assert part in page
    assert "merged says 0</td>" in page and "merged says 1 … (not ended)</td>" in page
    assert "Prompt 0 &lt;b&gt;" in page and "<b>" not in page
    assert "Reference 1 &lt;i&gt;" in page and "<i>" not in page


def test_a_prompt_is_named_by_its_first_and_last_line():
    assert samples.in_short("def f():\n    pass\n\nWhat does it do?\n") == (
        "def f(): … What does it do?"
    )
    assert samples.in_short("One line.") == "One line."
    assert samples.in_short("") == ""
    long = samples.in_short(" ".join(["word"] * 100) + "\nlast")
    assert len(long) < 120 and long.startswith("word word") and long.endswith(" … … last")


def test_links_that_answered_other_prompts_are_not_shown_together(write, ends_with_message):
    path = write.paths["Q4_K_M"]
    answers = Answers.read(path)
    answers.changed(answers=answers.answers[:1]).write(path)
    message = ends_with_message(lambda _: write(), [])
    assert "two links answered different prompts" in message and str(path) in message


@pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_any_request(write, tmp_path):
    seen = browser.see(write(), tmp_path, height=900)
    assert seen.requests == seen.console == []


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_samples")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
