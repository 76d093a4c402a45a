"""Choose the weights to merge a 4-bit training's adapter into, by measuring both.

Each candidate is built in memory, rounded to 16 bits as `merge_adapter` would write it, and scored
on validation text against the live adapter on its 4-bit base: perplexity, and KL divergence. The
lower perplexity is chosen; where the difference is within two standard errors of it (paired by
conversation), the candidate that is nearer to the live adapter. Nothing is written but the choice.

python -m workflow_scripts.export.choose_merge_base --checkpoint checkpoint/ --facts facts.json
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

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.export import merge_base
from workflow_scripts.export.check_merged import roomy_device
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import MergeBaseGateSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

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

    import torch

    from workflow_scripts.export import merged_weights
    from workflow_scripts.export.adapter import Adapter
    from workflow_scripts.export.base_weights import BaseWeights
    from workflow_scripts.scoring.likelihood import (
        all_logits,
        divergence,
        score_documents,
        summarize,
    )
    from workflow_scripts.scoring.transformers_model import TransformersModel, measured_precision

    facts = files.read_json(arguments.facts)
    shape = {"window": facts["sliding_window"], "rope": facts["rope_parameters"]}
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
        arguments.checkpoint, **shape, precision="nf4", adapter=arguments.adapter
    )
    reference = [all_logits(live, piece) for piece in pieces]
    live_scores = summarize(score_documents(live, pieces))
    del live
    candidate = TransformersModel(
        arguments.checkpoint,
        **shape,
        precision=measured_precision("native"),
        device=roomy_device(facts, times_its_size=1.2),
    )
    adapter = Adapter(arguments.adapter)
    found, scores = {}, {}
    for name in merge_base.BASES:
        dtype = merge_base.nf4_dtype(name, arguments.adapter, arguments.checkpoint)
        base = BaseWeights(arguments.checkpoint, dtype)
        merged_weights.check_fit(arguments.checkpoint, base, adapter)
        merged_weights.overwrite(candidate.model, base, adapter)
        compared = [
            divergence(expected, all_logits(candidate, piece))
            for expected, piece in zip(reference, pieces, strict=True)
        ]
        scores[name] = score_documents(candidate, pieces)
        found[name] = {
            "perplexity": summarize(scores[name])["perplexity"],
            "kl_divergence_nats": float(torch.cat([kl for kl, _ in compared]).mean()),
            "top1_agreement_fraction": float(
                torch.cat([agrees for _, agrees in compared]).double().mean()
            ),
        }
        logger.info("measured base=%s %s", name, log.fields(found[name]))
    difference, error = paired_difference(scores["original"], scores["dequantized"])
    report = {
        "merge_base": better(found, difference, error),
        "n_conversations": len(documents),
        "n_scored_tokens": live_scores["n_scored_tokens"],
        "adapter_perplexity": live_scores["perplexity"],
        "loss_difference_nats_per_token": difference,
        "loss_difference_standard_error_nats_per_token": error,
        **found,
    }
    files.write_json(arguments.choice, report)
    logger.info("chose %s", log.fields(report))


def better(found: Mapping[str, Mapping[str, float]], difference: float, error: float | None) -> str:
    """The base whose merge is better.

    Args:
        found: perplexity and KL divergence by base.
        difference: loss of the original base's merge less that of the other, nats a token.
        error: its standard error; None where it is not known.
    Raises:
        StageError: a figure is not finite.
    """
    for name, measured in found.items():
        for key, value in measured.items():
            if not math.isfinite(value):
                raise log.StageError(
                    "a merge computes no numbers", where=f"base {name}, {key}", found=value
                )
    if error is not None and abs(difference) > STANDARD_ERRORS * error:
        return "original" if difference < 0 else "dequantized"
    return min(merge_base.BASES, key=lambda name: found[name]["kl_divergence_nats"])


def paired_difference(
    one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]
) -> tuple[float, float | None]:
    """Mean loss of one less that of the other, nats a token, with its standard error.

    The same tokens of the same documents, so that what is hard for both cancels out.

    Args:
        one: nats of each scored token by document, as is `other`.
    """
    from workflow_scripts.scoring.likelihood import summarize

    summary = summarize({key: one[key] - other[key] for key in one})
    return summary["loss_nats_per_token"], summary["loss_standard_error_nats_per_token"]


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
