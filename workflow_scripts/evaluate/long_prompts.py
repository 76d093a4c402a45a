"""A model's answers to questions at the end of long prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from workflow_scripts.evaluate.needles import Needle, NeedlePrompts
from workflow_scripts.handover.context import Cell, TaskCell
from workflow_scripts.scoring.likelihood import LogitModel, all_logits
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.settings import ContextSettings

NORMAL_95 = 1.959964


class Answer(NamedTuple):
    """A model's answer to one prompt."""

    is_exact: bool
    """Greedy decoding gives the right code; anything it says after that does not count."""
    nats: float
    """Negative log-likelihood of the right code."""


def measure(
    model: LogitModel,
    prompts: NeedlePrompts,
    questions: Iterable[tuple[str, int, float | None]],
    settings: ContextSettings,
) -> list[TaskCell]:
    """Return one cell per task, length and depth.

    Args:
        questions: task, length and depth; a task without depth (None) gets the prompts of all
            depths in one cell.
    """
    cells: list[TaskCell] = []
    for task, length, depth in questions:
        n_prompts = settings.n_prompts * (len(settings.depths) if depth is None else 1)
        cell = ask(
            model,
            prompts,
            n_prompts=n_prompts,
            length_tokens=length,
            depth_fraction=depth,
            task=task,
        )
        cells.append(TaskCell(task=task, **dict(cell)))
    return sorted(cells, key=lambda cell: (cell.task, cell.length_tokens, cell.depth_fraction or 0))


def ask(
    model: LogitModel,
    prompts: NeedlePrompts,
    *,
    n_prompts: int,
    length_tokens: int,
    depth_fraction: float | None,
    task: str = "single",
) -> Cell:
    """Put the prompts of one length and depth to a model, and summarize its answers.

    Args:
        depth_fraction: depth of the fact; None for a task without one.
    """
    answers = [
        answer(
            model,
            prompts.make(
                number, length_tokens=length_tokens, depth_fraction=depth_fraction or 0, task=task
            ),
        )
        for number in range(n_prompts)
    ]
    return summarize(answers, length_tokens=length_tokens, depth_fraction=depth_fraction)


def answer(model: LogitModel, needle: Needle) -> Answer:
    """Score the right answer in one forward pass over the prompt and the answer.

    As long as the likeliest token is always the right one, greedy decoding sees the same tokens.
    """
    start, end = needle.answer
    logits = all_logits(model, Piece(0, needle.input_ids, np.arange(start, end)))
    right = torch.from_numpy(needle.input_ids[start:end].astype(np.int64))
    nats = torch.nn.functional.cross_entropy(logits, right, reduction="none").double()
    return Answer(bool((logits.argmax(dim=-1) == right).all()), float(nats.sum()))


def summarize(
    answers: Sequence[Answer], *, length_tokens: int, depth_fraction: float | None
) -> Cell:
    """Return the share of exact answers with its Wilson interval, and the mean loss per answer."""
    n = len(answers)
    n_exact = sum(one.is_exact for one in answers)
    low, high = wilson_interval(n_exact, n)
    nats = [one.nats for one in answers]
    return Cell(
        length_tokens=length_tokens,
        depth_fraction=depth_fraction,
        n_prompts=n,
        n_exact=n_exact,
        exact_fraction=n_exact / n,
        exact_low_fraction=low,
        exact_high_fraction=high,
        nats_per_answer=statistics.mean(nats),
        standard_error_nats_per_answer=statistics.stdev(nats) / math.sqrt(n) if n > 1 else None,
    )


def wilson_interval(n_right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), which holds for few trials, and for 0 and
    n right answers."""
    share, z2 = n_right / n, NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The interval of a share of 0 or 1 ends exactly there, except for rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
