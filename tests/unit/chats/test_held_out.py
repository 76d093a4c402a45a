from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.reports import CLEANING
from workflow_scripts.chats.held_out import (
    LARGEST_SHARE,
    USEFUL,
    USUAL_SHARE,
    check_rendered,
    check_splits,
    proposed_share,
)
from workflow_scripts.log import StageError

REPORT = Path("clean/cleaning_report.json")


def report(n_train, n_validation, n_test, validation=0.05, test=0.05):
    return CLEANING.changed(
        n_train=n_train,
        n_validation=n_validation,
        n_test=n_test,
        held_out_fractions={"validation": validation, "test": test},
    )


def test_splits_with_conversations_pass_without_a_warning():
    assert check_splits(report(900, 50, 50), REPORT) == []


def test_a_split_with_few_conversations_passes_with_a_warning():
    assert check_splits(report(198, 1, 30), REPORT) == [
        "found 1 conversations in the validation split, too few to tell runs apart; set"
        " validation_fraction: 0.09, which holds out about 21 of 229"
    ]


def test_a_split_without_a_share_may_be_empty():
    assert check_splits(report(100, 0, 0, validation=0, test=0), REPORT) == []


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ((10, 0, 1), ["the validation split is empty", "0.05 of 11", "0.55 expected"]),
        ((10, 1, 0), ["the test split is empty", "cleaning.test_fraction"]),
        (
            (10, 0, 0),
            [
                "the validation and the test split are empty",
                "cleaning.validation_fraction, test_fraction",
                "set validation_fraction: 0.26, which holds out about 3 of 10",
                "set test_fraction: 0.26",
                "snakemake train",
            ],
        ),
        ((4, 0, 1), ["add conversations: 5 are too few"]),
    ],
)
def test_an_empty_split_is_refused_with_a_share_that_fills_it(counts, parts):
    with pytest.raises(StageError) as caught:
        check_splits(report(*counts), REPORT)
    for part in [*parts, str(REPORT)]:
        assert part in str(caught.value)


def test_a_split_that_rendering_emptied_is_refused():
    cleaned = {"train": 90, "validation": 5, "test": 0}
    check_rendered(cleaned, {"train": 0, "validation": 1, "test": 0}, REPORT)
    with pytest.raises(StageError) as caught:
        check_rendered(cleaned, {"train": 9, "validation": 0, "test": 0}, REPORT)
    for part in ("of the validation split could", "5 conversations", "max_document_tokens"):
        assert part in str(caught.value)


@pytest.mark.parametrize("n_conversations", [9, 10, 13, 20, 40, 66, 67, 100, 400, 2000, 10**6])
def test_the_proposed_share_holds_out_what_it_promises(n_conversations):
    share = proposed_share(n_conversations, 0.0)
    assert share is not None and 0 < share <= LARGEST_SHARE
    held_out = np.random.default_rng(0).binomial(n_conversations, share, size=4000)
    assert (held_out > 0).mean() > 0.93  # 95 % expected; 4,000 draws
    if n_conversations >= USEFUL / USUAL_SHARE:
        assert held_out.mean() >= USEFUL - 0.5
