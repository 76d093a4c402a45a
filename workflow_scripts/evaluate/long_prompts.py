"""What a model makes of a question at the end of a long prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from workflow_scripts.evaluate.needles import Needle
from workflow_scripts.handover.context import Cell
from workflow_scripts.scoring.pieces import Piece

if TYPE_CHECKING:
    from workflow_scripts.scoring.likelihood import LogitModel

NORMAL_95 = 1.959964


class Answer(NamedTuple):
    """What a model made of one prompt."""

    is_exact: bool
    """Greedy decoding would give the right code; what it says after that does not count."""
    nats: float
    """Negative log-likelihood of the right code."""


def answer(model: LogitModel, needle: Needle) -> Answer:
    """One forward pass, the right answer given: as long as every likeliest token is the right one,
    greedy decoding sees the same tokens."""
    import numpy as np
    import torch

    from workflow_scripts.scoring.likelihood import all_logits

    start, end = needle.answer
    logits = all_logits(model, Piece(0, needle.input_ids, np.arange(start, end)))
    right = torch.from_numpy(needle.input_ids[start:end].astype(np.int64))
    nats = torch.nn.functional.cross_entropy(logits, right, reduction="none").double()
    return Answer(bool((logits.argmax(dim=-1) == right).all()), float(nats.sum()))


def summarize(
    answers: Sequence[Answer], *, length_tokens: int, depth_fraction: float | None
) -> Cell:
    """Exact answers with their Wilson interval, and the mean cost of an answer."""
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
    """95 % interval of a share (Wilson 1927): honest for few trials, and at none and all."""
    share, z2 = n_right / n, NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The ends of 0 and 1 are these numbers exactly, but for rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
