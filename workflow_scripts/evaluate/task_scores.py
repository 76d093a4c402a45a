"""Scores of tasks with a right answer: one a task and metric, and what they were made of.

`tasks.json` holds the scores; beside it a table holds what every single document scored, so that
two links are compared document by document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from workflow_scripts import files
from workflow_scripts.handover.tasks import TaskScore

if TYPE_CHECKING:
    import pyarrow as pa


class Sample(TypedDict):
    """What one document scored by one metric: a row of `sample_schema`."""

    asked: str
    task: str
    document: str
    metric: str
    filter: str
    value: float | None
    """None where a metric is of no single document."""
    prompt_hash: str
    """Hash of document and prompt: what must be the same in two links."""
    answer: str
    """A text, or as JSON the log-likelihood of every choice."""
    reference: str
    is_truncated: bool


class Difference(NamedTuple):
    """A score less another's of the same documents."""

    mean: float
    standard_error: float | None
    """Over documents, of their differences; None for a single one."""


def sample_schema() -> pa.Schema:
    """The columns of `Sample`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("asked", pa.string()),
            ("task", pa.string()),
            ("document", pa.string()),
            ("metric", pa.string()),
            ("filter", pa.string()),
            ("value", pa.float64()),
            ("prompt_hash", pa.string()),
            ("answer", pa.string()),
            ("reference", pa.string()),
            ("is_truncated", pa.bool_()),
        ]
    )


def write_samples(path: Path, rows: Iterable[Sample]) -> None:
    import pyarrow as pa

    files.write_parquet(path, pa.Table.from_pylist(list(rows), schema=sample_schema()))


class Samples:
    """What every document scored."""

    def __init__(self, rows: Sequence[Sample]) -> None:
        self._values: dict[tuple[str, str, str, str], dict[str, tuple[str, float | None]]] = {}
        for row in rows:
            of = self._values.setdefault(
                (row["asked"], row["task"], row["metric"], row["filter"]), {}
            )
            of[row["document"]] = (row["prompt_hash"], row["value"])

    @classmethod
    def read(cls, path: Path) -> Samples:
        columns = ["asked", "task", "document", "metric", "filter", "value", "prompt_hash"]
        return cls(files.read_parquet(path, columns=columns).to_pylist())

    def of(self, score: TaskScore) -> dict[tuple[str, str], tuple[str, float | None]]:
        """(task, document) → prompt and value, of all documents that a score is made of."""
        return {
            (task, document): found
            for task in score.subtasks
            for document, found in self._values.get(
                (score.asked, task, score.metric, score.filter), {}
            ).items()
        }


def difference(
    score: TaskScore, samples: Samples, other: TaskScore, other_samples: Samples
) -> Difference | None:
    """A score less the other, paired document by document: what is hard for both drops out.

    None where the two did not answer the same prompts, or where the score is no mean over
    documents (a perplexity, a group whose tasks weigh alike).
    """
    mine, others = samples.of(score), other_samples.of(other)
    if not mine or mine.keys() != others.keys():
        return None
    changes = []
    for key, (prompt, value) in mine.items():
        other_prompt, other_value = others[key]
        if prompt != other_prompt or value is None or other_value is None:
            return None
        changes.append(value - other_value)
    for whole, parts in ((score, mine), (other, others)):
        mean = math.fsum(value for _, value in parts.values() if value is not None) / len(parts)
        if not math.isclose(mean, whole.score, abs_tol=1e-9):
            return None
    n = len(changes)
    mean = math.fsum(changes) / n
    if n < 2:
        return Difference(mean, None)
    variance = math.fsum((change - mean) ** 2 for change in changes) / (n - 1)
    return Difference(mean, math.sqrt(variance / n))
