"""Means over tokens with their standard errors; tokens of one conversation are not independent."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from workflow_scripts.handover.scores import Loss


class Ratio(NamedTuple):
    """A mean over tokens."""

    mean: float
    standard_error: float | None
    """Over conversations; None for a single conversation."""


def ratio(sums: np.ndarray, counts: np.ndarray) -> Ratio:
    """Sum over all tokens ÷ number of tokens.

    The error is that of a ratio of sums over conversations (Cochran, Sampling Techniques, 1977,
    §6.3): conversations are independent of each other, their tokens are not.

    Args:
        sums: (n_conversations,) sum over each conversation's tokens.
        counts: (n_conversations,) number of these tokens.
    """
    mean = float(sums.sum() / counts.sum())
    n = len(sums)
    if n < 2:
        return Ratio(mean, None)
    residuals = sums - mean * counts
    return Ratio(mean, math.sqrt(n / (n - 1) * (residuals**2).sum()) / float(counts.sum()))


def loss_metrics(sums: np.ndarray, counts: np.ndarray) -> Loss:
    """Mean loss with its standard error, and perplexity.

    Args:
        sums: (n_conversations,) nats of each conversation's scored tokens.
        counts: (n_conversations,) number of these tokens.
    """
    loss = ratio(sums, counts)
    return Loss(
        n_conversations=len(sums),
        n_scored_tokens=int(counts.sum()),
        loss_nats_per_token=loss.mean,
        loss_standard_error_nats_per_token=loss.standard_error,
        perplexity=math.exp(loss.mean),
    )
