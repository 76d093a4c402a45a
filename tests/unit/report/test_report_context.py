from __future__ import annotations

import json

import pytest

from tests import browser
from workflow_scripts import files
from workflow_scripts.report import report_context


def reported(scores, **more):
    """A report of evaluate_context, with these scores at 512, 1024 … tokens."""
    lengths = [512 << number for number in range(len(scores))]
    cells = [
        {"task": "single", "length_tokens": length, "depth_fraction": depth, "n_prompts": 10,
         "n_exact": score // 10}
        for length, score in zip(lengths, scores, strict=True)
        for depth in (0.0, 1.0)
    ]  # fmt: skip
    return {
        "advertised_tokens": 4096,
        "cells": cells,
        "scores": [
            {"length_tokens": length, "score_percent": score}
            for length, score in zip(lengths, scores, strict=True)
        ],
        "is_measurable": scores[0] > 0,
        "effective_tokens_ruler": 1024 if scores[0] else None,
        "effective_tokens_nolima": 2048 if scores[0] else None,
        "short_tokens": 256,
        "long_gain_nats_per_token": None,
        "long_gain_standard_error_nats_per_token": None,
        **more,
    }


@pytest.fixture
def write(tmp_path):
    results = tmp_path / "results"
    gain = {
        "long_gain_nats_per_token": 0.0123,
        "long_gain_standard_error_nats_per_token": 0.0045,
    }
    for path, report in {
        "evaluation/tiny/chats/base.context.json": reported([0, 0, 0]),
        "runs/r/evaluation/merged.context.json": reported([100, 90, 80], **gain),
        "runs/r/evaluation/Q4_K_M.context.json": reported([90, 70]),
    }.items():
        files.write_json(results / path, report)
    runs = json.dumps({"runs": {"r": {"model": "tiny", "dataset": "chats"}}})
    paths = [tmp_path / f"context.{form}" for form in ("tsv", "md", "html")]
    report_context.main(
        ["--runs", runs, "--links", "merged", "Q4_K_M", "--results", str(results)]
        + ["--tsv", str(paths[0]), "--markdown", str(paths[1]), "--html", str(paths[2])]
    )
    return paths


def test_a_row_a_link_with_both_effective_lengths_and_its_scores(write, read_tsv):
    assert read_tsv(write[0]) == [
        ["Link", "Effective (RULER)", "Effective (NoLiMa)", "Gain of long context"]
        + ["512", "1,024", "2,048"],
        ["r: base", "not measurable", "not measurable", "–", "0", "0", "0"],
        ["r: merged", "1,024 / 4,096", "2,048 / 4,096", "0.0123 ± 0.0045", "100", "90", "80"],
        ["r: Q4_K_M", "1,024 / 4,096", "2,048 / 4,096", "–", "90", "70", ""],
    ]


@pytest.mark.skipif(browser.program() is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_heat_maps_and_asks_for_nothing(write, tmp_path):
    page = write[2].read_text()
    # A picture inside the drawing would be refused: the page allows none.
    assert "<image" not in page and page.count("<svg") == 1
    seen = browser.see(write[2], tmp_path, height=1000)
    assert seen.requests == seen.console == []
    assert seen.screenshot.stat().st_size > 30_000


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_context")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
