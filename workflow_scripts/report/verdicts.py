"""Sentences about differences: what was measured, and whether it is significant."""

from __future__ import annotations

import math

from workflow_scripts.report.results import Link, RunResults
from workflow_scripts.scoring.ratio import Ratio
from workflow_scripts.scoring.token_scores import TokenScores

# A difference is significant beyond this number of standard errors: chance alone exceeds it in 5 %
# of comparisons.
STANDARD_ERRORS = 1.96
# A true difference of this number of standard errors is found to be significant in four of five
# experiments (Cohen, Statistical Power Analysis, 1988: a two-sided test at 5 %, power 80 %).
SEEN_STANDARD_ERRORS = STANDARD_ERRORS + 0.84
LEAST_TOLD_FRACTION = 0.0005  # smaller differences would be printed as 0.0%


def paired(link: Link, other: Link) -> Ratio:
    """Loss of a link minus that of another on the same tokens, nats per token.

    Raises:
        AssertionError: the links were scored on different tokens.
    """
    return TokenScores.read(link.token_scores).difference(TokenScores.read(other.token_scores))


def perplexity_change(name: str, other: str, difference: Ratio) -> str:
    """One sentence on two perplexities.

    Args:
        difference: loss of the first minus that of the second, nats per token.
    """
    ratio = math.exp(difference.mean)
    change = f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'} than"
    if difference.standard_error is None:
        return (
            f"The perplexity of {name} is {change} that of {other}. Its error is unknown: only one"
            " conversation was scored."
        )
    error = 100 * ratio * difference.standard_error
    is_significant = abs(difference.mean) > STANDARD_ERRORS * difference.standard_error
    return (
        f"The perplexity of {name} is {change} that of {other} (standard error {error:.1f}"
        f" percentage points, paired): {'a' if is_significant else 'no'} significant difference at"
        " 95 %."
    )


def of_run(run: RunResults) -> list[str]:
    """The effect of training and of quantization on a run's perplexity."""
    merged, smallest = run.link("merged"), run.smallest
    said = [
        perplexity_change(
            f"{run.name} (merged)", "the base model", paired(merged, run.link("base"))
        )
    ]
    if smallest.name != "F16":
        difference = paired(smallest, run.link("F16"))
        said.append(perplexity_change(f"{run.name} {smallest.name}", "its F16 file", difference))
    return said


def smallest_seen(difference: Ratio) -> str:
    """One sentence on the smallest difference that a comparison can detect.

    It is empty where the error is unknown, or the difference rounds to zero.
    """
    fraction = math.expm1(SEEN_STANDARD_ERRORS * (difference.standard_error or 0))
    if fraction < LEAST_TOLD_FRACTION:
        return ""
    return (
        f" With these conversations, a true difference of {fraction:.1%} would be found significant"
        " in four of five experiments, and a smaller one less often."
    )


def of_runs(runs: list[RunResults]) -> list[str]:
    """Each run compared with the first, if they were scored on the same tokens."""
    first, *others = runs
    said = []
    for run in others:
        if run.data == first.data:
            difference = paired(run.link("merged"), first.link("merged"))
            change = perplexity_change(f"{run.name} (merged)", first.name, difference)
            said.append(change + smallest_seen(difference))
    return said
