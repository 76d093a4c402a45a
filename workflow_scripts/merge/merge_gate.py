"""The limits of the merge gate: how far a merged model may be from base + adapter."""

from __future__ import annotations

import math
from pathlib import Path

from workflow_scripts.handover.gates import GivenMergedCheck, MergedCheck
from workflow_scripts.log import StageError
from workflow_scripts.settings import MergeGateSettings

TRAINED_AS = {
    "native": "the model as it was trained",
    "int8": "the adapter on its 8-bit base",
    "nf4": "the adapter on its 4-bit base",
}
# The weights of a right merge differ from the rounded sum only where float32 could not decide
# between two neighbours. Measured on real weights: no divergence at all.
ROUNDED_SHARE = 0.05
# KL divergence of two float32 computations of the same model.
ARITHMETIC_NATS = 1e-7
# A difference in loss counts where it is larger than this many of its standard errors.
STANDARD_ERRORS = 2


def judge(
    report: GivenMergedCheck | MergedCheck,
    settings: MergeGateSettings,
    merged: Path,
    precision: str,
) -> None:
    """
    Args:
        merged: folder of the merged model.
        precision: of the base in training, a key of `TRAINED_AS`.
    Raises:
        StageError: a figure is beyond its limit. NaN is too, as it compares as false.
    """
    if not math.isfinite(report.merged_perplexity):
        raise StageError(
            "the merged model computes no numbers",
            where=merged,
            found=f"perplexity {report.merged_perplexity}",
            expected="a finite one",
        )
    if isinstance(report, GivenMergedCheck):
        return
    limit = max(ROUNDED_SHARE * min(report.rounding_kl_divergence_nats), ARITHMETIC_NATS)
    if not report.kl_divergence_from_rounded_nats <= limit:
        raise StageError(
            "the merged model does not compute what base + adapter compute",
            where=f"{merged}, mean over {report.n_divergence_tokens} tokens",
            found=f"KL divergence {report.kl_divergence_from_rounded_nats:.3g} nats per token from"
            " the rounded sum, although each weight is right",
            expected=f"at most {limit:.3g}",
            to_fix="compare the folder's config.json with the base's; if they agree, please"
            " report it",
        )
    error = report.loss_difference_standard_error_nats_per_token or 0.0
    limit = math.log1p(settings.perplexity_increase_fraction)
    if not report.loss_difference_nats_per_token - STANDARD_ERRORS * error <= limit:
        raise StageError(
            "the merged model is worse than the adapter that was merged",
            where=f"{merged}, {report.n_conversations} validation conversations",
            found=f"perplexity {report.merged_perplexity:.4f}, compared with"
            f" {report.adapter_perplexity:.4f} for {TRAINED_AS[precision]}:"
            f" {report.perplexity_increase_fraction:.2%} more, with a standard error of"
            f" {error:.2%}",
            expected=f"at most {settings.perplexity_increase_fraction:.1%} more"
            " (evaluation.gates.merge.perplexity_increase_fraction), after two standard errors are"
            " subtracted",
            to_fix="set runs.<name>.merge_base: auto (a run trained in 4 bits), train longer, or"
            " raise the gate if you accept the loss",
        )
