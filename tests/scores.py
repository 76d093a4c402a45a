"""Scores of links, for tests that read them."""

from __future__ import annotations

import math

from workflow_scripts.handover.scores import (
    Divergence,
    Loss,
    LossAtPositions,
    LossOfSource,
    LossOfTurn,
    Scores,
)


def loss_of(perplexity: float) -> Loss:
    return Loss(
        n_conversations=12,
        n_scored_tokens=34_567,
        loss_nats_per_token=math.log(perplexity),
        loss_standard_error_nats_per_token=0.01,
        perplexity=perplexity,
    )


def scores_of(perplexity: float, **more: object) -> Scores:
    """Scores of a link whose parts all have the loss of the whole.

    Args:
        more: other values of `Scores`.
    """
    loss = loss_of(perplexity)
    scores = Scores(
        piece_tokens=64,
        n_pieces=15,
        size_bytes=7 * 2**20,
        **dict(loss),
        by_position=tuple(
            LossAtPositions(first_position=first, last_position=last, **dict(loss))
            for first, last in ((0, 255), (256, 511))
        ),
        by_turn=tuple(LossOfTurn(turn=turn, **dict(loss)) for turn in (1, 2)),
        by_source=(LossOfSource(source="forum", **dict(loss)),),
        duration_seconds=1.5,
    )
    return scores.changed(**more)


DIVERGENCE = Divergence(
    reference="run-F16.gguf",
    piece_tokens=64,
    n_pieces=15,
    n_conversations=12,
    n_scored_tokens=34_567,
    kl_divergence_nats=0.01234,
    kl_divergence_standard_error_nats=0.00056,
    median_kl_divergence_nats=0.005,
    p90_kl_divergence_nats=0.03,
    p99_kl_divergence_nats=0.1,
    p99_9_kl_divergence_nats=0.4,
    max_kl_divergence_nats=1.2,
    top1_agreement_fraction=0.925,
    top1_agreement_standard_error_fraction=0.0031,
    probability_change_fraction=-0.002,
    probability_change_standard_error_fraction=0.0004,
    probability_change_rms_fraction=0.03,
    probability_change_rms_standard_error_fraction=0.001,
    n_models_in_memory=2,
    duration_seconds=1.5,
)
