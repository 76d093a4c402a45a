"""How far one model's next-token probabilities are from another's, token by token.

The terms are those of `llama-perplexity --kl-divergence`: KL divergence, whether the likeliest
tokens agree, and Δp, the change of the right token's probability. No logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from workflow_scripts.handover.scores import Distance
from workflow_scripts.log import StageError
from workflow_scripts.scoring.likelihood import log_probabilities, token_losses
from workflow_scripts.scoring.ratio import Ratio, ratio

if TYPE_CHECKING:
    from torch import Tensor


class Divergences(NamedTuple):
    """Of some tokens, in order."""

    kl_nats: np.ndarray
    """(n,) float64: KL divergence, reference first."""
    agrees: np.ndarray
    """(n,) bool: both find the same token the likeliest."""
    probability_change: np.ndarray
    """(n,) float64: of the token that comes; the reference's is taken away."""
    nats: np.ndarray
    """(n,) float64: the other model's loss, as `likelihood.token_losses` has it for every link."""


def compare(
    reference: Iterable[Tensor], other: Iterable[Tensor], targets: np.ndarray
) -> Divergences:
    """Two models over the same positions.

    Args:
        reference: blocks of (n, vocabulary) float32 logits, as is `other`, alike in size.
        targets: (n_positions,) integer, the tokens that come.
    Raises:
        StageError: the models do not know the same number of tokens.
    """
    import torch

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
            kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
            right = wanted[done : done + len(log_p), None]
            change.append((log_q.gather(1, right).exp() - log_p.gather(1, right).exp())[:, 0])
            done += len(log_p)
    assert done == len(targets), (done, len(targets))
    return Divergences(*(torch.cat(parts).numpy() for parts in (kl, agrees, change, nats)))


def by_document(
    compared: Iterable[tuple[int, Divergences]],
) -> dict[int, Divergences]:
    """Those of a document's pieces together.

    Args:
        compared: a document and the divergences of one of its pieces, piece by piece.
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
