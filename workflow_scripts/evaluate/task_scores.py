"""Scores of tasks with a right answer: one a task and metric, and what they were made of.

`tasks.json` holds the scores; beside it a table holds what every single document scored, so that
two links are compared document by document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from workflow_scripts import files

if TYPE_CHECKING:
    import pyarrow as pa


class Score(TypedDict):
    """One task by one metric."""

    asked: str
    """The entry of `evaluation.tasks.names`: a task may be asked for alone and in a group."""
    task: str
    n_examples: int
    """Few-shot examples before every question."""
    metric: str
    filter: str
    """What of the answer is compared, in the harness's terms; `none` is all of it."""
    score: float
    standard_error: float | None
    low: float | None
    """End of its 95 % interval, as is `high`, where one is known that is better than ± 2 errors."""
    high: float | None
    n_documents: int
    n_truncated: int
    """Documents whose prompt did not fit and lost its beginning."""
    subtasks: list[str]
    """What the documents in the table are of."""


class Difference(NamedTuple):
    """A score less another's of the same documents."""

    mean: float
    standard_error: float | None
    """Over documents, of their differences; None for a single one."""


def sample_schema() -> pa.Schema:
    """A row a document and metric."""
    import pyarrow as pa

    return pa.schema(
        [
            ("asked", pa.string()),
            ("task", pa.string()),
            ("document", pa.string()),
            ("metric", pa.string()),
            ("filter", pa.string()),
            ("value", pa.float64()),  # null where a metric is of no single document
            ("prompt_hash", pa.string()),  # of document and prompt: what must be the same in two
            ("answer", pa.string()),  # text, or as JSON the log-likelihood of every choice
            ("reference", pa.string()),
            ("is_truncated", pa.bool_()),
        ]
    )


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow as pa

    files.write_parquet(path, pa.Table.from_pylist(list(rows), schema=sample_schema()))


class Samples:
    """What every document scored."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
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

    def of(self, score: Score) -> dict[tuple[str, str], tuple[str, float | None]]:
        """(task, document) → prompt and value, of all documents that a score is made of."""
        return {
            (task, document): found
            for task in score["subtasks"]
            for document, found in self._values.get(
                (score["asked"], task, score["metric"], score["filter"]), {}
            ).items()
        }


def difference(
    score: Score, samples: Samples, other: Score, other_samples: Samples
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
        if not math.isclose(mean, whole["score"], abs_tol=1e-9):
            return None
    n = len(changes)
    mean = math.fsum(changes) / n
    if n < 2:
        return Difference(mean, None)
    variance = math.fsum((change - mean) ** 2 for change in changes) / (n - 1)
    return Difference(mean, math.sqrt(variance / n))
