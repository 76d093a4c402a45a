"""The distance of one model's next-token probabilities from another's, token by token.

The measures are those of `llama-perplexity --kl-divergence`: KL divergence, agreement of the most
likely tokens, and Δp, the change of the right token's probability. No logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workflow_scripts.handover.scores import Distance
from workflow_scripts.log import StageError
from workflow_scripts.scoring.likelihood import kl_divergence, log_probabilities, token_losses
from workflow_scripts.scoring.ratio import Ratio, ratio


class Divergences(NamedTuple):
    """The distances of two models at each of n tokens, in order."""

    kl_nats: np.ndarray
    """(n,) float64: KL divergence, reference first."""
    agrees: np.ndarray
    """(n,) bool: both models give the highest probability to the same token."""
    probability_change: np.ndarray
    """(n,) float64: probability of the right token, minus the reference's."""
    nats: np.ndarray
    """(n,) float64: the other model's loss, by `likelihood.token_losses` as for every link."""


def compare(
    reference: Iterable[Tensor], other: Iterable[Tensor], targets: np.ndarray
) -> Divergences:
    """Compare two models at the same positions.

    Args:
        reference: blocks of (n, vocabulary) float32 logits; those of `other` have the same sizes.
        targets: (n_positions,) integer, the tokens that follow.
    Raises:
        StageError: the models' vocabularies differ in size.
    """
    kl: list[Tensor] = []
    agrees: list[Tensor] = []
    change: list[Tensor] = []
    nats: list[Tensor] = []
    wanted = torch.from_numpy(targets.astype(np.int64))
    done = 0
    for p_logits, q_logits in zip(reference, other, strict=True):
        if p_logits.shape != q_logits.shape:
            raise StageError(
                "two models with different vocabularies cannot be compared",
                found=f"{q_logits.shape[1]} tokens",
                expected=f"{p_logits.shape[1]}, those of the reference",
            )
        nats.append(token_losses(q_logits, wanted[done : done + len(q_logits)]))
        agrees.append(p_logits.argmax(dim=-1) == q_logits.argmax(dim=-1))
        for log_p, log_q in log_probabilities(p_logits, q_logits):
            kl.append(kl_divergence(log_p, log_q))
            right = wanted[done : done + len(log_p), None]
            change.append((log_q.gather(1, right).exp() - log_p.gather(1, right).exp())[:, 0])
            done += len(log_p)
    assert done == len(targets), (done, len(targets))
    return Divergences(*(torch.cat(parts).numpy() for parts in (kl, agrees, change, nats)))


def by_document(compared: Iterable[tuple[int, Divergences]]) -> dict[int, Divergences]:
    """Join the divergences of each document's pieces.

    Args:
        compared: the document and the divergences of each piece, in order.
    """
    parts: dict[int, list[Divergences]] = {}
    for document, found in compared:
        parts.setdefault(document, []).append(found)
    return {
        document: Divergences(*map(np.concatenate, zip(*some, strict=True)))
        for document, some in parts.items()
    }


def metrics(divergences: Mapping[int, Divergences]) -> Distance:
    """Means with their standard errors over documents, and percentiles over tokens.

    Args:
        divergences: by document.
    """
    kl, agrees, change, _ = (list(column) for column in zip(*divergences.values(), strict=True))
    counts = np.array([len(part) for part in kl])
    tokens = np.concatenate(kl)

    def mean(parts: Iterable[np.ndarray]) -> Ratio:
        return ratio(np.array([part.sum(dtype=float) for part in parts]), counts)

    def quantile(fraction: float) -> float:
        return float(np.quantile(tokens, fraction))

    divergence, agreement, shift = mean(kl), mean(agrees), mean(change)
    square = mean(part**2 for part in change)
    root = math.sqrt(square.mean)
    error = square.standard_error
    if error is not None:
        error = error / (2 * root) if root else None  # by the derivative of the root
    return Distance(
        n_conversations=len(counts),
        n_scored_tokens=int(counts.sum()),
        kl_divergence_nats=divergence.mean,
        kl_divergence_standard_error_nats=divergence.standard_error,
        median_kl_divergence_nats=quantile(0.5),
        p90_kl_divergence_nats=quantile(0.9),
        p99_kl_divergence_nats=quantile(0.99),
        p99_9_kl_divergence_nats=quantile(0.999),
        max_kl_divergence_nats=quantile(1.0),
        top1_agreement_fraction=agreement.mean,
        top1_agreement_standard_error_fraction=agreement.standard_error,
        probability_change_fraction=shift.mean,
        probability_change_standard_error_fraction=shift.standard_error,
        probability_change_rms_fraction=root,
        probability_change_rms_standard_error_fraction=error,
    )
