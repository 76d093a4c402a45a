"""Choose the weights to merge a 4-bit training's adapter into, by measuring both.

The weights of each candidate are made one at a time, rounded as `merge_adapter` would write them,
and scored on validation text against the live adapter on its 4-bit base: perplexity, and KL
divergence. The lower perplexity is chosen; where the difference is within two standard errors of it
(paired by conversation), the candidate that is nearer to the live adapter. Nothing is written but
the choice.

python -m workflow_scripts.merge.choose_merge_base --checkpoint checkpoint/ --facts facts.json
    --adapter adapter/ --tokens tokens/validation.arrow --settings '{"n_conversations": 20}'
    --choice merge_base.json
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.gates import MergeBase, MergeBaseChoice, MergeCandidate
from workflow_scripts.merge import merge_base
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import MergeBaseGateSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

if TYPE_CHECKING:
    import numpy as np
    import torch

    from workflow_scripts.scoring.likelihood import Scores
    from workflow_scripts.scoring.pieces import Piece
    from workflow_scripts.scoring.streamed_model import StreamedModel
    from workflow_scripts.scoring.transformers_model import TransformersModel

OUTPUT_VERSION = 1
# About 95 of 100 differences that are none lie within.
STANDARD_ERRORS = 2
logger = log.stage_logger("choose_merge_base")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="documents of the validation split"
    )
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates.merge_base`")
    parser.add_argument("--choice", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(MergeBaseGateSettings, arguments.settings)

    from workflow_scripts.scoring.likelihood import paired_difference, summarize
    from workflow_scripts.scoring.transformers_model import TransformersModel

    facts = Facts.read(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    if not documents:
        raise log.StageError(
            "there is nothing to choose by",
            where=arguments.tokens,
            found="no document",
            to_fix="raise datasets.<name>.cleaning.validation_fraction, or name the base"
            " (runs.<name>.merge_base)",
        )
    pieces = list(cutting.cut(documents, piece_tokens=cutting.comparable_tokens(facts, None)))
    live = TransformersModel(
        arguments.checkpoint,
        window=facts.sliding_window,
        rope=facts.rope_parameters,
        precision="nf4",
        adapter=arguments.adapter,
    )
    candidates = {name: candidate(arguments, facts, name) for name in merge_base.BASES}
    live_scores, scores, found = measured(live, candidates, pieces)
    for name, figures in found.items():
        logger.info("measured base=%s %s", name, log.fields(figures.model_dump()))
    difference, error = paired_difference(scores["original"], scores["dequantized"])
    summary = summarize(live_scores)
    choice = MergeBaseChoice(
        merge_base=better(found, difference, error),
        n_conversations=len(documents),
        n_scored_tokens=summary.n_scored_tokens,
        adapter_perplexity=summary.perplexity,
        loss_difference_nats_per_token=difference,
        loss_difference_standard_error_nats_per_token=error,
        original=found["original"],
        dequantized=found["dequantized"],
    )
    choice.write(arguments.choice)
    logger.info("chose %s", log.fields(choice.model_dump()))


def candidate(arguments: argparse.Namespace, facts: ModelShape, name: MergeBase) -> StreamedModel:
    """The model that a merge into one of the bases would give."""
    from workflow_scripts.merge import merged_weights
    from workflow_scripts.merge.adapter import Adapter
    from workflow_scripts.merge.base_weights import BaseWeights
    from workflow_scripts.merge.model_weights import MergedWeights
    from workflow_scripts.scoring.streamed_model import StreamedModel

    adapter = Adapter(arguments.adapter)
    dtype = merge_base.nf4_dtype(name, arguments.adapter, arguments.checkpoint)
    base = BaseWeights(arguments.checkpoint, dtype)
    merged_weights.check_fit(arguments.checkpoint, base, adapter)
    return StreamedModel(
        arguments.checkpoint,
        MergedWeights(base, adapter),
        window=facts.sliding_window,
        rope=facts.rope_parameters,
        vocabulary_size=adapter.vocabulary_size,
    )


def measured(
    live: TransformersModel, candidates: Mapping[MergeBase, StreamedModel], pieces: Sequence[Piece]
) -> tuple[Scores, dict[MergeBase, Scores], dict[MergeBase, MergeCandidate]]:
    """Losses of the live adapter and of each candidate by document, and how near each candidate is
    to the live adapter."""
    import torch

    from workflow_scripts.scoring.likelihood import (
        all_logits,
        by_document,
        divergence,
        losses,
        summarize,
    )
    from workflow_scripts.scoring.streamed_model import batches

    live_nats: dict[Piece, np.ndarray] = {}
    nats: dict[MergeBase, dict[Piece, np.ndarray]] = {name: {} for name in candidates}
    compared: dict[MergeBase, list[tuple[torch.Tensor, torch.Tensor]]] = {
        name: [] for name in candidates
    }
    for batch in batches(pieces):
        reference = [all_logits(live, piece) for piece in batch]
        live_nats.update(zip(batch, map(losses, reference, batch), strict=True))
        for name, model in candidates.items():
            logits = model.logits(batch)
            nats[name].update(zip(batch, map(losses, logits, batch), strict=True))
            compared[name] += map(divergence, reference, logits)
    scores = {name: by_document(pieces, nats[name]) for name in candidates}
    found = {}
    for name in candidates:
        divergences, agreements = map(torch.cat, zip(*compared[name], strict=True))
        found[name] = MergeCandidate(
            perplexity=summarize(scores[name]).perplexity,
            kl_divergence_nats=float(divergences.mean()),
            top1_agreement_fraction=float(agreements.double().mean()),
        )
    return by_document(pieces, live_nats), scores, found


def better(
    found: Mapping[MergeBase, MergeCandidate], difference: float, error: float | None
) -> MergeBase:
    """The base whose merge is better.

    Args:
        found: what was measured, by base.
        difference: loss of the original base's merge less that of the other, nats a token.
        error: its standard error; None where it is not known.
    Raises:
        StageError: a figure is not finite.
    """
    for name, measured in found.items():
        for key, value in measured:
            if not math.isfinite(value):
                raise log.StageError(
                    "a merge computes no numbers", where=f"base {name}, {key}", found=value
                )
    if error is not None and abs(difference) > STANDARD_ERRORS * error:
        return "original" if difference < 0 else "dequantized"
    return min(merge_base.BASES, key=lambda name: found[name].kl_divergence_nats)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
