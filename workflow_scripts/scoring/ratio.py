"""Means over tokens with their errors, where tokens of one conversation depend on each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from workflow_scripts.handover.scores import Loss


class Ratio(NamedTuple):
    """A mean over tokens."""

    mean: float
    standard_error: float | None
    """Over conversations; None for a single one."""


def ratio(sums: np.ndarray, counts: np.ndarray) -> Ratio:
    """Sum over all tokens ÷ tokens.

    The error is that of a ratio of sums over conversations (Cochran, Sampling Techniques, 1977,
    §6.3): conversations are independent of each other, their tokens are not.

    Args:
        sums: (n_conversations,) of each conversation's tokens.
        counts: (n_conversations,) its tokens.
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
        sums: nats of each conversation's scored tokens.
        counts: how many they are.
    """
    loss = ratio(sums, counts)
    return Loss(
        n_conversations=len(sums),
        n_scored_tokens=int(counts.sum()),
        loss_nats_per_token=loss.mean,
        loss_standard_error_nats_per_token=loss.standard_error,
        perplexity=math.exp(loss.mean),
    )
