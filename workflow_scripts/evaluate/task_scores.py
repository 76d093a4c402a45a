"""Scores of tasks that have a right answer, and the scores of the single documents behind them.

`tasks.json` holds one score per task and metric; a table next to it holds the score of every
document, so that two links can be compared document by document.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import pyarrow as pa

from workflow_scripts import files
from workflow_scripts.handover.tasks import TaskScore

SCHEMA = pa.schema(
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
"""Columns of `Sample`."""


class Sample(TypedDict):
    """Score of one document by one metric: a row of `SCHEMA`."""

    asked: str
    task: str
    document: str
    metric: str
    filter: str
    value: float | None
    """None if the metric has no value for a single document."""
    prompt_hash: str
    """Hash of document and prompt, which must be the same for two links."""
    answer: str
    """A text, or the log-likelihood of every choice as JSON."""
    reference: str
    is_truncated: bool


class Difference(NamedTuple):
    """A score minus another score on the same documents."""

    mean: float
    standard_error: float | None
    """Over the documents' differences; None for a single document."""


def write_samples(path: Path, rows: Iterable[Sample]) -> None:
    files.write_parquet(path, pa.Table.from_pylist(list(rows), schema=SCHEMA))


class Samples:
    """Scores of all documents of one link."""

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
        """Return prompt hash and value by (task, document), for all documents behind a score."""
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
    """Return a score minus the other, paired document by document: this cancels their difficulty.

    None if the two did not answer the same prompts, or if the score is not a mean over documents
    (a perplexity, a group whose tasks have equal weight).
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
    error = statistics.stdev(changes) / math.sqrt(n) if n > 1 else None
    return Difference(statistics.fmean(changes), error)
