"""Token-level scores from logits: negative log-likelihood, KL divergence, and their means.

Transformers and llama.cpp give logits through one interface, `LogitModel`, so that a score means
the same for every link. Losses are computed in float32 and divergences in float64; sums over tokens
are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from workflow_scripts.handover.scores import Loss
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.scoring.ratio import loss_metrics

# Nats of each scored token, by document.
Scores = dict[int, np.ndarray]


class LogitModel(Protocol):
    """A model that gives next-token logits."""

    def logit_blocks(self, input_ids: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        """Logits after each of `positions`, in order, in blocks of (n, vocabulary) float32 on the
        CPU.

        A block may be the model's own memory: it is valid until the next one is requested.

        Args:
            input_ids: (n_tokens,) integer.
            positions: ascending; the logits at position p predict token p + 1.
        """
        ...


def negative_log_likelihoods(model: LogitModel, piece: Piece) -> np.ndarray:
    """(n_scored,) float64 nats of each scored token of a piece."""
    targets = torch.from_numpy(piece.targets)
    parts = []
    done = 0
    for logits in model.logit_blocks(piece.input_ids, piece.scored - 1):
        parts.append(token_losses(logits, targets[done : done + len(logits)]))
        done += len(logits)
    assert done == len(targets), (done, len(targets))
    return torch.cat(parts).numpy()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) float64 nats of each target.

    Args:
        logits: (n, vocabulary) float32.
        targets: (n,) integer.
    """
    return (torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None])[:, 0]).double()


def losses(logits: Tensor, piece: Piece) -> np.ndarray:
    """(n_scored,) float64 nats of each scored token of a piece.

    Args:
        logits: (n_scored, vocabulary) float32, those that predict the scored tokens.
    """
    return token_losses(logits, torch.from_numpy(piece.targets)).numpy()


def score_documents(model: LogitModel, pieces: Iterable[Piece]) -> Scores:
    """Nats of every scored token, by document."""
    nats = {piece: negative_log_likelihoods(model, piece) for piece in pieces}
    return by_document(nats, nats)


def by_document(pieces: Iterable[Piece], nats: Mapping[Piece, np.ndarray]) -> Scores:
    """Nats of every scored token by document, in the order of its pieces.

    Args:
        nats: of each piece, in any order.
    """
    parts: dict[int, list[np.ndarray]] = {}
    for piece in pieces:
        parts.setdefault(piece.document, []).append(nats[piece])
    return {document: np.concatenate(each) for document, each in parts.items()}


def summarize(scores: Scores) -> Loss:
    """Mean loss over all scored tokens with its standard error over documents, and perplexity.

    Args:
        scores: nats of each scored token, by document.
    """
    sums = np.array([part.sum() for part in scores.values()])
    counts = np.array([len(part) for part in scores.values()])
    return loss_metrics(sums, counts)


def paired_difference(one: Scores, other: Scores) -> tuple[float, float | None]:
    """Mean loss of one model minus that of another, nats per token, with its standard error.

    Both score the same tokens of the same documents; this cancels text difficulty.

    Args:
        one: nats of each scored token by document; `other` likewise.
    """
    summary = summarize({key: one[key] - other[key] for key in one})
    return summary.loss_nats_per_token, summary.loss_standard_error_nats_per_token


def divergence(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence of each position, nats, reference first; and whether the most likely tokens
    agree.

    Args:
        reference: (n, vocabulary) float32 logits; `other` likewise.
    """
    logs = log_probabilities(reference, other)
    divergences = [kl_divergence(log_p, log_q) for log_p, log_q in logs]
    return torch.cat(divergences), reference.argmax(dim=-1) == other.argmax(dim=-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(n,) KL divergence of q from p, nats.

    Args:
        log_p: (n, vocabulary) log-probabilities; `log_q` likewise.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def log_probabilities(reference: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities of both models, (n, vocabulary) float64, 32 positions at a time.

    float64, because the divergence between good matches is 1e-8 nats; in parts, because a copy of
    all positions would be slow.

    Args:
        reference: (n, vocabulary) float32 logits; `other` likewise.
    """
    for p, q in zip(reference.split(32), other.split(32), strict=True):
        yield p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)


def all_logits(model: LogitModel, piece: Piece) -> Tensor:
    """(n_scored, vocabulary) float32; for gates, on few and short pieces."""
    blocks = model.logit_blocks(piece.input_ids, piece.scored - 1)
    return torch.cat([block.clone() for block in blocks])
