"""The statistical half of the merge gate: what the merged model computes, and how well.

The models pass through memory one parameter at a time, except the one that training used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.gates import GivenMergedCheck, MergedCheck
from workflow_scripts.merge import merge_base
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.exact_merge import ExactResult
from workflow_scripts.merge.live_adapter import LiveAdapter
from workflow_scripts.merge.model_weights import (
    LiveWeights,
    NearestWeights,
    RoundedWeights,
    Weights,
)
from workflow_scripts.merge.safetensors_stream import DTYPES
from workflow_scripts.merge.tensor_names import part
from workflow_scripts.models.checkpoint import Precision
from workflow_scripts.scoring.likelihood import (
    Scores,
    divergence,
    paired_difference,
    score_documents,
    summarize,
)
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.scoring.precision import measured_precision
from workflow_scripts.scoring.streamed_model import StreamedModel, WeightSource, batches
from workflow_scripts.scoring.transformers_model import TransformersModel

# Seeds of rounding at random. Its divergence is reported, not judged: rounding to nearest loses
# changes below half a step, all in one direction; rounding at random keeps them on average.
N_ROUNDINGS = 3
# Tokens on which divergences are measured: enough for every weight to contribute to the mean.
DIVERGENCE_TOKENS = 1024


def check(
    merged: Path,
    checkpoint: Path,
    adapter: Path,
    facts: ModelShape,
    pieces: Sequence[Piece],
    *,
    precision: Literal["native", "int8", "nf4"],
    exact: ExactResult,
    n_conversations: int,
) -> MergedCheck:
    """Measure divergences, and compare the loss with that of the model as it was trained.

    Args:
        merged: folder of the merged model.
        checkpoint: folder of the base model.
        adapter: folder of the adapter.
        facts: of the base model.
        pieces: of the validation split.
        precision: of the base in training.
        exact: result of the exact comparison.
        n_conversations: that the pieces are cut from.
    """
    nf4_dtype = merge_base.nf4_dtype(exact.merge_base, adapter, checkpoint)
    base, live = BaseWeights(checkpoint, nf4_dtype), LiveAdapter(adapter, checkpoint)
    stored = BaseWeights(merged)
    embeddings = live.whole.get("model.embed_tokens.weight")

    def model(weights: WeightSource) -> StreamedModel:
        """The base model's architecture with other weights."""
        return StreamedModel(
            checkpoint,
            weights,
            window=facts.sliding_window,
            rope=facts.rope_parameters,
            vocabulary_size=None if embeddings is None else len(embeddings),
        )

    sums = LiveWeights(base, live)
    dtypes = {part(name).parameter: DTYPES[entry.dtype] for name, entry in stored.entries.items()}
    dtype = dtypes["model.embed_tokens.weight"]
    unrounded, as_loaded = model(sums), loaded(stored, merged, facts)
    measured = divergences(
        unrounded,
        as_loaded,
        rounded=model(NearestWeights(base, live, dtypes, exact.roundings)),
        rounded_at_random=[model(RoundedWeights(sums, dtype, seed)) for seed in range(N_ROUNDINGS)],
        pieces=first_pieces(pieces),
    )
    merged_scores = as_loaded.score(pieces)
    if precision == "native":
        adapter_precision: Precision = "float32"
        trained_scores = unrounded.score(pieces)
    else:
        adapter_precision = measured_precision(precision)
        trained_scores = scores_of_quantized(
            checkpoint, adapter, facts, pieces, precision=adapter_precision
        )
    difference, error = paired_difference(merged_scores, trained_scores)
    summary = summarize(merged_scores)
    return MergedCheck(
        n_conversations=n_conversations,
        merge_base=exact.merge_base,
        n_tensors=exact.n_tensors,
        n_adapted_tensors=exact.n_adapted_tensors,
        rounding=exact.rounding,
        n_divergence_tokens=len(measured.merged),
        kl_divergence_from_rounded_nats=float(measured.from_rounded.mean()),
        kl_divergence_nats=float(measured.merged.mean()),
        max_kl_divergence_nats=float(measured.merged.max()),
        rounding_kl_divergence_nats=tuple(float(kl.mean()) for kl in measured.rounded_at_random),
        top1_agreement_fraction=float(measured.agreements.double().mean()),
        n_scored_tokens=summary.n_scored_tokens,
        merged_perplexity=summary.perplexity,
        adapter_precision=adapter_precision,
        adapter_perplexity=summarize(trained_scores).perplexity,
        perplexity_increase_fraction=math.expm1(difference),
        loss_difference_nats_per_token=difference,
        loss_difference_standard_error_nats_per_token=error,
    )


def scores_of_quantized(
    checkpoint: Path,
    adapter: Path,
    facts: ModelShape,
    pieces: Sequence[Piece],
    *,
    precision: Precision,
) -> Scores:
    """Nats of every scored token under the live adapter on its quantized base."""
    model = TransformersModel(
        checkpoint,
        window=facts.sliding_window,
        rope=facts.rope_parameters,
        precision=precision,
        adapter=adapter,
    )
    return score_documents(model, pieces)


def check_given(
    merged: Path, facts: ModelShape, pieces: Sequence[Piece], *, n_conversations: int
) -> GivenMergedCheck:
    """Score a model that was merged elsewhere: there is no adapter to compare it with.

    Args:
        merged: folder of the model.
    """
    summary = summarize(loaded(BaseWeights(merged), merged, facts).score(pieces))
    return GivenMergedCheck(
        n_conversations=n_conversations,
        n_scored_tokens=summary.n_scored_tokens,
        merged_perplexity=summary.perplexity,
    )


def loaded(stored: BaseWeights, merged: Path, facts: ModelShape) -> StreamedModel:
    """A merged model in float32, as its users load it: by its own config.json, except for the
    window. In particular the positions are those of config.json."""
    return StreamedModel(merged, Weights(stored), window=facts.sliding_window)


class Divergences(NamedTuple):
    """KL divergence at each token, nats."""

    merged: torch.Tensor
    """From the float32 sum to the merged model."""
    agreements: torch.Tensor
    """True where float32 sum and merged model have the same most likely next token."""
    from_rounded: torch.Tensor
    """From the rounded sum to the merged model."""
    rounded_at_random: Sequence[torch.Tensor]
    """From the float32 sum to the sum rounded at random, seed by seed."""


def divergences(
    unrounded: StreamedModel,
    merged: StreamedModel,
    *,
    rounded: StreamedModel,
    rounded_at_random: Sequence[StreamedModel],
    pieces: Sequence[Piece],
) -> Divergences:
    """Compare the merged model with the rounded and the unrounded sum of base and adapter."""
    columns = []
    for batch in batches(pieces):
        reference, of_merged = torch.cat(unrounded.logits(batch)), torch.cat(merged.logits(batch))
        columns.append(
            [
                *divergence(reference, of_merged),
                divergence(torch.cat(rounded.logits(batch)), of_merged)[0],
                *(
                    divergence(reference, torch.cat(model.logits(batch)))[0]
                    for model in rounded_at_random
                ),
            ]
        )
    kl, agreements, from_rounded, *at_random = map(torch.cat, zip(*columns, strict=True))
    return Divergences(kl, agreements, from_rounded, at_random)


def first_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """The first pieces, up to `DIVERGENCE_TOKENS` tokens, but at least one."""
    totals = itertools.accumulate(len(piece.input_ids) for piece in pieces)
    n_pieces = sum(total <= DIVERGENCE_TOKENS for total in totals)
    return list(pieces[: max(1, n_pieces)])
