"""The merged models of both bases, in memory, measured against the live adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.gates import MergeBase, MergeCandidate
from workflow_scripts.log import StageError
from workflow_scripts.merge import merge_base, merged_weights
from workflow_scripts.merge.adapter import Adapter
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.merge_gate import STANDARD_ERRORS
from workflow_scripts.merge.model_weights import MergedWeights
from workflow_scripts.scoring import divergences
from workflow_scripts.scoring.divergences import Divergences
from workflow_scripts.scoring.likelihood import Scores, all_logits, by_document, losses, summarize
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.scoring.streamed_model import StreamedModel, batches
from workflow_scripts.scoring.transformers_model import TransformersModel


def candidate(
    checkpoint: Path, adapter: Path, facts: ModelShape, base_name: MergeBase
) -> StreamedModel:
    """The model that a merge into one of the bases would give.

    Args:
        checkpoint: folder of the base model.
        adapter: folder of the adapter.
        facts: of the base model.
    """
    trained = Adapter(adapter)
    base = BaseWeights(checkpoint, merge_base.nf4_dtype(base_name, adapter, checkpoint))
    merged_weights.check_fit(checkpoint, base, trained)
    return StreamedModel(
        checkpoint,
        MergedWeights(base, trained),
        window=facts.sliding_window,
        rope=facts.rope_parameters,
        vocabulary_size=trained.vocabulary_size,
    )


def measured(
    live: TransformersModel, candidates: Mapping[MergeBase, StreamedModel], pieces: Sequence[Piece]
) -> tuple[Scores, dict[MergeBase, Scores], dict[MergeBase, MergeCandidate]]:
    """Return the losses of the live adapter and of each candidate by document, and the distance of
    each candidate from the live adapter."""
    live_nats: dict[Piece, np.ndarray] = {}
    compared: dict[MergeBase, dict[Piece, Divergences]] = {name: {} for name in candidates}
    for batch in batches(pieces):
        reference = [all_logits(live, piece) for piece in batch]
        live_nats.update(zip(batch, map(losses, reference, batch), strict=True))
        for name, model in candidates.items():
            for piece, of_live, logits in zip(batch, reference, model.logits(batch), strict=True):
                compared[name][piece] = divergences.compare([of_live], [logits], piece.targets)
    scores, found = {}, {}
    for name, of_piece in compared.items():
        documents = divergences.by_document((piece.document, of_piece[piece]) for piece in pieces)
        scores[name] = {number: each.nats for number, each in documents.items()}
        distance = divergences.metrics(documents)
        found[name] = MergeCandidate(
            perplexity=summarize(scores[name]).perplexity,
            kl_divergence_nats=distance.kl_divergence_nats,
            top1_agreement_fraction=distance.top1_agreement_fraction,
        )
    return by_document(pieces, live_nats), scores, found


def better(
    found: Mapping[MergeBase, MergeCandidate], difference: float, error: float | None
) -> MergeBase:
    """The base whose merge is better.

    Args:
        found: what was measured, by base.
        difference: loss of the merge into the original base minus that of the other, nats per
            token.
        error: its standard error; None where it is not known.
    Raises:
        StageError: a figure is not finite.
    """
    for name, figures in found.items():
        for key, value in figures:
            if not math.isfinite(value):
                raise StageError(
                    "a merge computes no numbers", where=f"base {name}, {key}", found=value
                )
    if error is not None and abs(difference) > STANDARD_ERRORS * error:
        return "original" if difference < 0 else "dequantized"
    return min(merge_base.BASES, key=lambda name: found[name].kl_divergence_nats)
