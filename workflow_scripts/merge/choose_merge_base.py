"""Choose the weights to merge a 4-bit training's adapter into, by measuring both.

The weights of each candidate are computed one parameter at a time, rounded as `merge_adapter` would
write them, and scored on validation text. Perplexity decides. Where its difference is within two
standard errors (paired by conversation), the candidate with the smaller KL divergence from the live
adapter on its 4-bit base is chosen. Only the choice is written.

python -m workflow_scripts.merge.choose_merge_base --checkpoint checkpoint/ --facts facts.json
    --adapter adapter/ --tokens tokens/validation.arrow --settings '{"n_conversations": 20}'
    --choice merge_base.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import MergeBaseChoice
from workflow_scripts.merge import merge_base
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import MergeBaseGateSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

OUTPUT_VERSION = 1
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

    from workflow_scripts.merge import merge_candidates
    from workflow_scripts.scoring.likelihood import paired_difference, summarize
    from workflow_scripts.scoring.transformers_model import TransformersModel

    checkpoint, adapter = arguments.checkpoint, arguments.adapter
    facts = Facts.read(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    if not documents:
        raise log.StageError(
            "there is no conversation to choose the base by",
            where=arguments.tokens,
            found="no document",
            to_fix="raise datasets.<name>.cleaning.validation_fraction, or name the base"
            " (runs.<name>.merge_base)",
        )
    pieces = list(cutting.cut(documents, piece_tokens=cutting.comparable_tokens(facts, None)))
    live = TransformersModel(
        checkpoint,
        window=facts.sliding_window,
        rope=facts.rope_parameters,
        precision="nf4",
        adapter=adapter,
    )
    candidates = {
        name: merge_candidates.candidate(checkpoint, adapter, facts, name)
        for name in merge_base.BASES
    }
    live_scores, scores, found = merge_candidates.measured(live, candidates, pieces)
    for name, figures in found.items():
        logger.info("measured base=%s %s", name, log.fields(figures.model_dump()))
    difference, error = paired_difference(scores["original"], scores["dequantized"])
    summary = summarize(live_scores)
    choice = MergeBaseChoice(
        merge_base=merge_candidates.better(found, difference, error),
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


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
