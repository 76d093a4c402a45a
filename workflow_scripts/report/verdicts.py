"""Sentences on differences: what was measured, and whether it is larger than its error."""

from __future__ import annotations

import math

from workflow_scripts.report.results import Link, RunResults
from workflow_scripts.scoring.ratio import Ratio

# Beyond so many standard errors a difference is one: 5 % of those by chance alone are as large.
STANDARD_ERRORS = 1.96
# A true difference of so many standard errors is found beyond `STANDARD_ERRORS` four times in five
# (Cohen, Statistical Power Analysis, 1988: a two-sided test at 5 % with a power of 80 %).
SEEN_STANDARD_ERRORS = STANDARD_ERRORS + 0.84


LEAST_TOLD_FRACTION = 0.0005  # shown as 0.1 %


def paired(link: Link, other: Link) -> Ratio:
    """Loss of a link less that of another on the same tokens, nats a token.

    Raises:
        AssertionError: they were scored on different tokens.
    """
    from workflow_scripts.scoring.token_scores import TokenScores

    return TokenScores.read(link.token_scores).difference(TokenScores.read(other.token_scores))


def perplexity_change(name: str, other: str, difference: Ratio) -> str:
    """One sentence on two perplexities.

    Args:
        difference: of the first less the second, nats a token.
    """
    ratio = math.exp(difference.mean)
    change = f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'} than"
    if difference.standard_error is None:
        return (
            f"The perplexity of {name} is {change} that of {other}; of a single conversation no"
            " error is known."
        )
    error = f"{100 * ratio * difference.standard_error:.1f}"
    is_shown = abs(difference.mean) > STANDARD_ERRORS * difference.standard_error
    judged = "a significant difference" if is_shown else "no significant difference"
    return (
        f"The perplexity of {name} is {change} that of {other} (standard error {error} percentage"
        f" points, paired): {judged} at 95 %."
    )


def of_run(run: RunResults) -> list[str]:
    """What training, and quantizing, did to a run's perplexity."""
    merged, smallest = run.link("merged"), run.smallest
    said = [perplexity_change(f"{run.name}, merged,", "the base", paired(merged, run.link("base")))]
    if smallest.name != "F16":
        difference = paired(smallest, run.link("F16"))
        name = f"{run.name}’s {smallest.name}"
        said.append(perplexity_change(name, "its F16 file", difference))
    return said


def smallest_seen(difference: Ratio) -> str:
    """One sentence on what a comparison could have shown; empty where no error is known, or it
    rounds to nothing."""
    fraction = math.expm1(SEEN_STANDARD_ERRORS * (difference.standard_error or 0))
    if fraction < LEAST_TOLD_FRACTION:
        return ""
    return (
        f" A difference of {fraction:.1%} is the smallest that these conversations would show four"
        " times in five."
    )


def of_runs(runs: list[RunResults]) -> list[str]:
    """Each run against the first, where they were scored on the same tokens."""
    first, *others = runs
    said = []
    for run in others:
        if (run.settings.model, run.settings.dataset) == (
            first.settings.model,
            first.settings.dataset,
        ):
            difference = paired(run.link("merged"), first.link("merged"))
            change = perplexity_change(f"{run.name}, merged,", first.name, difference)
            said.append(change + smallest_seen(difference))
    return said
