from __future__ import annotations

import dataclasses
import math
import re
import statistics

import numpy as np
import pytest

from tests.unit.report.conftest import CHANGES, token_scores
from workflow_scripts.report import verdicts
from workflow_scripts.scoring.ratio import Ratio


@pytest.mark.parametrize(
    ("mean", "error", "parts"),
    [
        (
            math.log(0.9),
            0.01,
            [
                "10.0% lower than that of b (standard error 0.9",
                ": a significant difference at 95 %",
            ],
        ),
        (math.log(1.1), 0.01, ["10.0% higher than that of b", ": a significant difference"]),
        (0.0195, 0.01, ["higher", ": no significant difference at 95 %"]),
        (0.0197, 0.01, ["higher", ": a significant difference"]),
        (-0.5, None, ["lower", "Its error is unknown: only one conversation was scored."]),
    ],
)
def test_a_difference_is_significant_beyond_its_error(mean, error, parts):
    sentence = verdicts.perplexity_change("a", "b", Ratio(mean, error))
    assert sentence.startswith("The perplexity of a is ") and sentence.endswith(".")
    for part in parts:
        assert part in sentence


def test_the_smallest_detectable_difference_is_found_in_four_of_five_draws():
    """Of normal draws around a true difference of that size, four of five are significant."""
    error = 0.02
    said = verdicts.smallest_seen(Ratio(0.001, error))
    fraction = float(re.search(r"a true difference of ([\d.]+)%", said)[1]) / 100
    draws = np.random.default_rng(0).normal(math.log1p(fraction), error, size=100_000)
    is_shown = draws > verdicts.STANDARD_ERRORS * error
    assert is_shown.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("error", [None, 0.0, 1e-4])
def test_without_an_error_no_smallest_difference_is_given(error):
    assert verdicts.smallest_seen(Ratio(0.1, error)) == ""


def test_the_runs_are_compared_token_by_token(results):
    runs = results.read()
    difference = verdicts.paired(runs[1].link("merged"), runs[0].link("merged"))
    assert difference.mean == pytest.approx(math.log(6.05 / 5.05), rel=1e-6)
    # Both links have the same hard and easy conversations, so pairing leaves no error.
    assert difference.standard_error == pytest.approx(0, abs=1e-6)
    (sentence,) = verdicts.of_runs(runs)
    assert "mistral (merged) is 19.8% higher than that of generic" in sentence


def test_two_runs_are_compared_with_the_smallest_detectable_difference(results):
    runs = results.read()
    path = runs[1].link("merged").token_scores
    token_scores([1.5, 1.6, 1.9, 2.1]).write(path)
    (sentence,) = verdicts.of_runs(runs)
    difference = verdicts.paired(runs[1].link("merged"), runs[0].link("merged"))
    assert "four of five experiments" in sentence
    assert sentence.endswith(verdicts.smallest_seen(difference))


def test_a_run_is_compared_with_its_base_and_its_smallest_file_with_f16(results):
    run = results.read()[0]
    merged, smallest = verdicts.of_run(run)
    error = 100 * 0.505 * statistics.stdev(CHANGES) / 2
    assert f"is 49.5% lower than that of the base model (standard error {error:.1f}" in merged
    assert "generic Q4_K_M is 8.9% higher than that of its F16 file" in smallest


def test_runs_of_other_data_are_not_compared(results):
    runs = results.read()
    others = runs[1].chain.changed(settings=runs[1].settings.model_dump() | {"dataset": "others"})
    assert verdicts.of_runs([runs[0], dataclasses.replace(runs[1], chain=others)]) == []
