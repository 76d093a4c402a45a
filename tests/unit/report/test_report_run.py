from __future__ import annotations

import pytest

from tests import browser
from tests.scores import loss_of
from workflow_scripts import files
from workflow_scripts.handover.scores import LossOfSource
from workflow_scripts.report import report_run


@pytest.fixture
def write(results, tmp_path):
    benchmarks = tmp_path / "benchmarks"
    (benchmarks / "quantize_gguf").mkdir(parents=True)
    for step, seconds in (("train_adapter", 61.5), ("quantize_gguf/Q4_K_M", 3)):
        (benchmarks / f"{step}.tsv").write_text(f"s\th:m:s\n{seconds}\t-\n")

    def run(name="mistral", results=results):
        page = tmp_path / f"{name}.html"
        report_run.main(
            [*results.by_run[name]] + ["--benchmarks", str(benchmarks), "--page", str(page)]
        )
        return page

    return run


def test_the_page_has_only_the_figures_of_its_run(write):
    page = write().read_text()
    for part in (
        "6.05 ± 0.06",
        "1.2e-07 nats KL",
        "5.5e-09 nats KL",
        "0.01234",
        "forum",
        "1,234,567",
        "8103.7 ± 12.5",
        "63.2 ± 2.9",
        # Two layers, two heads of 32, keys and values of two bytes: 512 bytes per token.
        "1.0 MiB",
    ):
        assert part in page
    assert "5.05 ± 0.05" not in page  # of the other run
    assert page.count("<svg") == 6
    assert "1.1 minutes" in page


def test_the_page_says_what_was_kept_and_packed(write):
    page = write().read_text()
    section = page.partition("<h2>Data</h2>")[2].partition("<h2>")[0]
    for part in ("too short", "60", "96.875%", "documents longer than the window of 64"):
        assert part in section


def test_usable_context_has_a_section_if_it_was_measured(write, all_measured):
    assert "<h2>Usable context</h2>" not in write().read_text()
    page = write(results=all_measured).read_text()
    section = page.partition("<h2>Usable context</h2>")[2].partition("<h2>")[0]
    assert section.count("<svg") == 1
    assert "1,024 / 4,096 (512–2,048)" in section and "not measurable" in section
    assert "Perplexity, wiki" in page and "AWQ" in page


def test_tasks_have_a_section_if_they_were_evaluated(write, all_measured):
    assert "<h2>Tasks</h2>" not in write().read_text()
    page = write(results=all_measured).read_text()
    section = page.partition("<h2>Tasks</h2>")[2].partition("<h2>")[0]
    # Base and merged model differ in two of four documents: sd 0.577, ÷ √4.
    for cell in ("hellaswag acc_norm, merged", "75.00 ± 22.00", "+50.00 ± 28.87", "60.00 [10.00"):
        assert cell in section
    assert "mistral" not in section and "generic" not in section


def test_every_input_file_changes_the_page(write, results):
    before = write().read_text()
    run = results.folder / "runs" / "mistral"
    for path, changes in {
        run / "merged_check.json": {"kl_divergence_nats": 0.5},
        run / "gguf_check.json": {"kl_divergence_nats": 0.5},
        run / "memory_plan.json": {"usable_bytes": 10**9},
        run / "adapter" / "training_manifest.json": {"peak_memory_bytes": 1},
        results.folder / "data" / "chats" / "clean" / "cleaning_report.json": {"n_read": 61},
        results.folder / "data" / "chats" / "tiny" / "apart" / "packing_report.json": {"n_rows": 9},
        run / "evaluation" / "F16.inference.json": {"decode_milliseconds_per_token": 10},
        run / "evaluation" / "F16.json": {"size_bytes": 10**10},
        run / "evaluation" / "merged.json": {
            "by_source": [LossOfSource(source="elsewhere", **dict(loss_of(2.0))).content()]
        },
    }.items():
        kept = files.read_json(path)
        files.write_json(path, kept | changes)
        assert write().read_text() != before, path
        files.write_json(path, kept)
    assert write().read_text() == before


def test_a_run_that_was_not_trained_here_has_no_training_on_its_page(write, results):
    given = {"packing": None, "recipe": None, "adapter": "owner/lora"}
    for name in ("adapter/training_manifest.json", "adapter/history.json", "memory_plan.json"):
        (results.folder / "runs" / "mistral" / name).unlink()
    page = write(results=results.changed({"mistral": given})).read_text()
    assert "owner/lora" in page and "<h2>Training</h2>" not in page


@pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_any_request(write, tmp_path):
    seen = browser.see(write(), tmp_path, height=4300)
    assert seen.requests == seen.console == []
    assert seen.screenshot.stat().st_size > 50_000


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_run")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
