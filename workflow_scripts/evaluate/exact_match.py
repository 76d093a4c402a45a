"""Exact match of answers with their references: SQuAD's (arXiv:1606.05250, evaluate-v1.1.py)."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from workflow_scripts import files
from workflow_scripts.evaluate.long_prompts import wilson_interval
from workflow_scripts.evaluate.prompts import Prompt
from workflow_scripts.evaluate.task_scores import Sample
from workflow_scripts.handover.tasks import TaskScore

TASK = "reference answers"
METRIC = "exact_match"
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def sample(asked: Prompt, answer: str, references: Sequence[str]) -> Sample:
    """Return the score of one answer."""
    return {
        "asked": TASK,
        "task": TASK,
        "document": asked.conversation,
        "metric": METRIC,
        "filter": "none",
        "value": float(matches(answer, references)),
        "prompt_hash": files.fingerprint([asked.prompt.tolist(), references]),
        "answer": answer,
        "reference": "\n".join(references),
        "is_truncated": False,
    }


def matches(answer: str, references: Sequence[str]) -> bool:
    """True if an answer is one of the references."""
    return normalized(answer) in map(normalized, references)


def normalized(text: str) -> str:
    """Remove case, punctuation, articles and extra white space, in SQuAD's order."""
    text = text.lower().translate(WITHOUT_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def score(rows: Sequence[Sample]) -> TaskScore:
    """Return the share of matches with its Wilson interval."""
    n = len(rows)
    n_right = sum(row["value"] == 1 for row in rows)
    low, high = wilson_interval(n_right, n)
    share = n_right / n
    return TaskScore(
        asked=TASK,
        task=TASK,
        n_examples=0,
        metric=METRIC,
        filter="none",
        score=share,
        standard_error=math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None,
        low=low,
        high=high,
        n_documents=n,
        n_truncated=0,
        subtasks=(TASK,),
    )
