"""Usable context of a link, from its answers and from its loss on long documents."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from workflow_scripts.handover.context import (
    EffectiveIntervals,
    EffectiveLengths,
    LongGain,
    TaskCell,
)
from workflow_scripts.scoring.likelihood import LogitModel, score_documents
from workflow_scripts.scoring.pieces import cut
from workflow_scripts.scoring.ratio import ratio
from workflow_scripts.settings import ContextSettings
from workflow_scripts.tokens.documents import Document

RULER_PERCENT = 85.6
NOLIMA_FRACTION = 0.85
NOLIMA_SHORT_TOKENS = 1024  # its base score is the best up to this length
N_DRAWS = 2000
INTERVAL_PERCENT = (2.5, 97.5)


def scores_by_length(
    cells: Sequence[TaskCell], n_right: Sequence[float] | None = None
) -> dict[int, float]:
    """Return per cent of right answers by length, with equal weight for every task, as in RULER.

    Args:
        n_right: right answers of each cell; None takes the cells' own.
    """
    right, asked = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for cell, n in zip(cells, n_right or [cell.n_exact for cell in cells], strict=True):
        right[cell.length_tokens, cell.task] += n  # type: ignore[assignment]  # a float when drawn
        asked[cell.length_tokens, cell.task] += cell.n_prompts
    scores = {}
    for length, keys in itertools.groupby(sorted(asked), key=lambda key: key[0]):
        shares = [right[key] / asked[key] for key in keys]
        scores[length] = 100 * sum(shares) / len(shares)
    return scores


def effective_lengths(scores: Mapping[int, float]) -> EffectiveLengths:
    """Return the effective length by both definitions: None if nothing is measurable, 0 if even the
    shortest length is too long.

    Args:
        scores: per cent by length.
    """
    shortest = min(scores)
    is_measurable = scores[shortest] > 0
    short = [score for length, score in scores.items() if length <= NOLIMA_SHORT_TOKENS]
    base = max(short, default=scores[shortest])

    def longest(least: float) -> int | None:
        if not is_measurable:
            return None
        good = itertools.takewhile(lambda length: scores[length] >= least, sorted(scores))
        return max(good, default=0)

    return EffectiveLengths(
        is_measurable=is_measurable,
        base_score_percent=base,
        effective_tokens_ruler=longest(RULER_PERCENT),
        effective_tokens_nolima=longest(NOLIMA_FRACTION * base),
    )


def effective_intervals(cells: Sequence[TaskCell], *, seed: int) -> EffectiveIntervals:
    """Return 95 % intervals of the effective lengths by both definitions, for this number of
    prompts; None if nothing is measurable.

    Each cell's share of right answers is drawn from its Jeffreys posterior, Beta(right + ½,
    wrong + ½) (Brown, Cai and DasGupta 2001, doi:10.1214/ss/1009213286), so a cell without a wrong
    answer has an error too.
    """
    if not effective_lengths(scores_by_length(cells)).is_measurable:
        return EffectiveIntervals(**dict.fromkeys(EffectiveIntervals.model_fields))
    generator = np.random.default_rng(seed)
    n_prompts = np.array([cell.n_prompts for cell in cells])
    n_right = np.array([cell.n_exact for cell in cells])
    shares = generator.beta(n_right + 0.5, n_prompts - n_right + 0.5, size=(N_DRAWS, len(cells)))
    drawn = [
        effective_lengths(scores_by_length(cells, list(share * n_prompts))) for share in shares
    ]

    def interval(lengths: Sequence[int | None]) -> tuple[int, int]:
        low, high = np.percentile(
            np.array(lengths, dtype=int), INTERVAL_PERCENT, method="closest_observation"
        )
        return int(low), int(high)

    ruler = interval([one.effective_tokens_ruler for one in drawn])
    nolima = interval([one.effective_tokens_nolima for one in drawn])
    return EffectiveIntervals(
        effective_tokens_ruler_low=ruler[0],
        effective_tokens_ruler_high=ruler[1],
        effective_tokens_nolima_low=nolima[0],
        effective_tokens_nolima_high=nolima[1],
    )


def long_gain(
    model: LogitModel, documents: Iterable[Document], context_tokens: int, settings: ContextSettings
) -> LongGain:
    """Return the loss with `short_tokens` of context minus the loss with all of it, on supervised
    tokens beyond `short_tokens`.

    Args:
        documents: of the test split; the first that are longer than `short_tokens` count.
        context_tokens: the whole context that the link is given.
    """
    short_tokens = settings.short_tokens
    long = [
        document
        for document in documents
        if len(document.input_ids) > short_tokens
        and document.is_supervised[short_tokens:context_tokens].any()
    ][: settings.n_long_conversations]
    if not long:
        return LongGain(
            short_tokens=short_tokens,
            n_long_conversations=0,
            long_gain_nats_per_token=None,
            long_gain_standard_error_nats_per_token=None,
        )
    short, whole = (
        score_documents(model, cut(long, piece_tokens=piece_tokens))
        for piece_tokens in (short_tokens, context_tokens)
    )
    sums, counts = [], []
    for number, document in enumerate(long):
        positions = np.flatnonzero(document.is_supervised[1:]) + 1
        beyond = (positions >= short_tokens) & (positions < context_tokens)
        sums.append(float((short[number] - whole[number])[beyond].sum()))
        counts.append(int(beyond.sum()))
    gain = ratio(np.array(sums), np.array(counts))
    return LongGain(
        short_tokens=short_tokens,
        n_long_conversations=len(long),
        long_gain_nats_per_token=gain.mean,
        long_gain_standard_error_nats_per_token=gain.standard_error,
        n_long_tokens=sum(counts),
    )
