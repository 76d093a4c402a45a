from __future__ import annotations

import re

import pytest

from tests import browser
from tests.reports import answers_of
from workflow_scripts import files
from workflow_scripts.report import report_overview


@pytest.fixture
def write(results, tmp_path):
    def run(results=results, sampled=()):
        page, headline = tmp_path / "overview.html", tmp_path / "headline.md"
        report_overview.main(
            [*results.arguments, "--page", str(page)]
            + ["--headline", str(headline)]
            + (["--sampled", *sampled] if sampled else [])
            + ["--samples", "base", "F16", "Q4_K_M"]
        )
        return page, headline

    return run


def row(headline, name):
    lines = [line for line in headline.read_text().splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_the_overview_describes_differences_and_shows_the_runs_side_by_side(write):
    page, headline = write()
    text = headline.read_text()
    assert "- The perplexity of mistral (merged) is 19.8% higher than that of generic" in text
    assert row(headline, "Perplexity, merged") == [
        "Perplexity, merged",
        "5.05 ± 0.05",
        "6.05 ± 0.06",
    ]
    html = page.read_text()
    for part in ("19.8% higher", "1.2e-07", "5.5e-09", "−0.25%", "<svg", "0.012"):
        assert part in html


@pytest.fixture
def answered(results):
    """Answers of both runs to five questions. None of the texts may become markup."""

    def write_answers(path, link):
        answers_of(
            link,
            n=5,
            prompt="def f{number}(): ...\n\nWhat is <b>it</b> {number}?",
            reference="It is <i> {number}.",
            answer="{link} says <script>{number}",
            n_ended=0 if link == "base" else 5,
        ).write(path)

    base = results.folder / "evaluation" / "tiny" / "chats"
    for run in results.settings:
        write_answers(base / "base.answers.json", "base")
        for link in ("F16", "Q4_K_M"):
            folder = results.folder / "runs" / run / "evaluation"
            write_answers(folder / f"{link}.answers.json", f"{run} {link}")
    return list(results.settings)


def test_answers_of_base_and_files_are_side_by_side(write, answered):
    html = write(sampled=answered)[0].read_text()
    assert "<summary>def f0(): ... … What is &lt;b&gt;it&lt;/b&gt; 0?</summary>" in html
    table = html.partition("<summary>def f0()")[2].partition("</table>")[0]
    names = re.findall(r'<th scope="row">([^<]*)</th>', table)
    runs = [f"{run}, {link}" for run in answered for link in ("F16", "Q4_K_M")]
    assert names == ["reference", "base", *runs]
    assert "base says &lt;script&gt;0 … (not ended)</td>" in table
    assert "mistral Q4_K_M says &lt;script&gt;0</td>" in table
    assert "<script" not in html and "<b>it" not in html and "It is <i>" not in html
    assert html.count("<summary>def f") == report_overview.MOST_SAMPLES < 5


def test_a_run_without_answers_shows_none(write, answered):
    first, *others = answered
    html = write(sampled=[first])[0].read_text()
    assert html.count(f"{first}, Q4_K_M</th>") == report_overview.MOST_SAMPLES
    assert others and not [run for run in others if f"{run}, Q4_K_M</th>" in html]
    assert "The same questions" not in write()[0].read_text()


@pytest.mark.parametrize("run", ["generic", "mistral"])
def test_the_links_and_gates_of_every_run_change_the_page(write, results, run):
    folder = results.folder / "runs" / run
    plot = write()[0].read_text().partition('<figure class="plot">')[2]
    changed = {"evaluation/F16": {"perplexity": 7.5}}  # in no table of the page
    changed |= {"merged_check": {"kl_divergence_nats": 0.5}}
    changed |= {"gguf_check": {"kl_divergence_nats": 0.25}}
    for name, content in changed.items():
        path = folder / f"{name}.json"
        files.write_json(path, files.read_json(path) | content)
    page = write()[0].read_text()
    assert page.partition('<figure class="plot">')[2] != plot
    assert page.count("<td>0.5</td>") == page.count("<td>0.25</td>") == 1


@pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_any_request(write, tmp_path):
    page, _ = write()
    seen = browser.see(page, tmp_path)
    assert seen.requests == seen.console == []
    assert seen.screenshot.stat().st_size > 50_000


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_overview")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
