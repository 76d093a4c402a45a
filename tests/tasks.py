"""Records of task scores for tests."""

from __future__ import annotations

from workflow_scripts.handover.tasks import ReferenceScores, TaskScore, TaskScores


def task_scores(*scores: TaskScore, are_chats: bool = False) -> TaskScores:
    return TaskScores(scores=scores, are_chats=are_chats, context_tokens=4096, duration_seconds=1.5)


def reference_scores(*scores: TaskScore) -> ReferenceScores:
    return ReferenceScores(n_with_reference=5, n_too_long=0, scores=scores, duration_seconds=1.5)
