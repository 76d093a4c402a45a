from __future__ import annotations

import numpy as np
import pytest

from workflow_scripts.evaluate.task_scores import Samples, difference, write_samples
from workflow_scripts.handover.tasks import TaskScore


def score_of(values, **others):
    return TaskScore(
        **{
            "asked": "t", "task": "t", "n_examples": 0, "metric": "acc", "filter": "none",
            "score": float(np.mean(values)), "standard_error": None, "low": None, "high": None,
            "n_documents": len(values), "n_truncated": 0, "subtasks": ["t"], **others,
        }
    )  # fmt: skip


def rows_of(values, task="t", prompt="p", asked="t"):
    return [
        {
            "asked": asked, "task": task, "document": str(at), "metric": "acc",
            "filter": "none", "value": value,
            "prompt_hash": f"{prompt}{at}", "answer": "", "reference": "", "is_truncated": False,
        }
        for at, value in enumerate(values)
    ]  # fmt: skip


FIRST, SECOND = [1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]


def test_a_paired_difference_is_the_mean_of_differences_with_their_error(tmp_path):
    for name, values in (("a", FIRST), ("b", SECOND)):
        write_samples(tmp_path / f"{name}.parquet", rows_of(values))
    a, b = (Samples.read(tmp_path / f"{name}.parquet") for name in "ab")
    found = difference(score_of(FIRST), a, score_of(SECOND), b)
    changes = np.subtract(FIRST, SECOND)
    assert found.mean == pytest.approx(changes.mean())
    assert found.standard_error == pytest.approx(changes.std(ddof=1) / np.sqrt(5))


def test_equal_scores_on_every_document_have_no_error():
    same = Samples(rows_of(FIRST))
    assert difference(score_of(FIRST), same, score_of(FIRST), same) == (0, 0)
    assert difference(score_of([1.0]), *[Samples(rows_of([1.0])), score_of([0.0])],
                      Samples(rows_of([0.0]))) == (1, None)  # fmt: skip


def test_a_group_is_paired_over_the_documents_of_its_tasks():
    def samples(values):
        return Samples(rows_of(values[:2], "x") + rows_of(values[2:], "y"))

    group = {"task": "g", "subtasks": ["x", "y"]}
    found = difference(
        score_of(FIRST, **group), samples(FIRST), score_of(SECOND, **group), samples(SECOND)
    )
    assert found.mean == pytest.approx(np.mean(np.subtract(FIRST, SECOND)))


def test_a_task_that_is_requested_twice_is_compared_with_itself():
    def both(values):
        changed = [1 - value for value in values]
        return Samples(rows_of(values) + rows_of(changed, asked="t@5", prompt="q"))

    first, second = both(FIRST), both(SECOND)
    found = difference(score_of(FIRST), first, score_of(SECOND), second)
    again = difference(
        score_of(np.subtract(1, FIRST), asked="t@5"), first,
        score_of(np.subtract(1, SECOND), asked="t@5"), second,
    )  # fmt: skip
    assert found.mean == -again.mean != 0
    assert not first.of(score_of(FIRST, asked="t@9"))


@pytest.mark.parametrize(
    ("values", "score", "prompt"),
    [
        (SECOND[:4], SECOND[:4], "p"),  # one document fewer
        (SECOND, SECOND, "q"),  # other prompts
        (SECOND, FIRST, "p"),  # a score that is not the mean of its documents
        ([None] * 5, SECOND, "p"),  # a metric without a value per document
        ([], SECOND, "p"),
    ],
)
def test_scores_that_cannot_be_paired_have_no_difference(values, score, prompt):
    other = Samples(rows_of(values, prompt=prompt))
    assert difference(score_of(FIRST), Samples(rows_of(FIRST)), score_of(score), other) is None
