"""Scores of links in tasks with a right answer (`evaluate_tasks`, `match_references`)."""

from __future__ import annotations

from workflow_scripts.handover.record import Record


class TaskScore(Record):
    """One task by one metric."""

    asked: str
    """The entry of `evaluation.tasks.names`: a task may be asked for alone and in a group."""
    task: str
    n_examples: int
    """Few-shot examples before every question."""
    metric: str
    filter: str
    """The part of the answer that is compared, in the terms of lm-evaluation-harness; `none` is all
    of it."""
    score: float
    """A share for most metrics; some are perplexities or bits."""
    standard_error: float | None
    """Over documents."""
    low: float | None
    """Lower end of the 95 % interval, where one is known that is better than ± 2 errors."""
    high: float | None
    """Its upper end."""
    n_documents: int
    n_truncated: int
    """Documents whose prompt did not fit and lost its beginning."""
    subtasks: tuple[str, ...]
    """The tasks that the documents belong to."""


class TaskScores(Record):
    """`{link}.tasks.json`: scores in the tasks of lm-evaluation-harness. A table of the same name
    has the score of every document."""

    scores: tuple[TaskScore, ...]
    are_chats: bool
    """True if prompts were formatted as chats."""
    context_tokens: int
    """Longest input that the link was given."""
    duration_seconds: float


class ReferenceScores(Record):
    """`{link}.references.json`: exact match with the reference answers of the test split. A table
    of the same name has every answer."""

    n_with_reference: int
    """Conversations that have a reference answer."""
    n_too_long: int
    """Prompts that leave no room for an answer; they are not asked."""
    scores: tuple[TaskScore, ...]
    """A single score; empty where nothing was asked."""
    duration_seconds: float


class FetchedTask(Record):
    """The data of one task on the Hub."""

    task: str
    version: int | float | str | None
    """Version of the task, as lm-evaluation-harness counts them."""
    dataset: str | None
    """Hub id, or the kind of local files."""
    subset: str | None
    n_documents: int
    """Documents that the task asks about."""


class FetchedTasks(Record):
    """`tasks.json`: the tasks whose data are in the cache (`fetch_tasks`)."""

    tasks: tuple[FetchedTask, ...]
