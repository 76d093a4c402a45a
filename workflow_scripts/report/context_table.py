"""Usable context of the links: scores by length, effective lengths, what long context gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts.handover.chain import Chain
from workflow_scripts.handover.context import ContextScores, Definition
from workflow_scripts.report.tables import Table, with_error

Reports = Mapping[str, ContextScores]


def read(chain: Chain, links: Sequence[str]) -> Reports:
    """Reports of evaluate_context by link, the base's first.

    Args:
        links: those that were measured.
    """
    return {
        link.title: ContextScores.read(Path(link.context))
        for link in chain.links
        if link.context and link.name in links
    }


def context(runs: Mapping[str, Reports]) -> Table:
    """One row a run and link."""
    lengths = sorted(
        {
            score.length_tokens
            for links in runs.values()
            for report in links.values()
            for score in report.scores
        }
    )
    rows = [
        [
            f"{run}: {link}",
            effective(report, "ruler"),
            effective(report, "nolima"),
            gain(report),
            *(score_at(report, length) for length in lengths),
        ]
        for run, links in runs.items()
        for link, report in links.items()
    ]
    first = next(iter(next(iter(runs.values())).values()))
    return Table(
        title="Usable context",
        note=(
            "Scores are per cent of right answers over tasks made after RULER, each task weighing"
            " the same. Effective ÷ advertised: the longest length up to which every score is at"
            " least 85.6 (RULER), or at least 85 % of the best at up to 1,024 tokens (NoLiMa);"
            " in brackets the 95 % interval of so many prompts (Jeffreys);"
            " “not measurable” is a link that answers nothing even at the shortest length. The gain"
            f" is what tokens beyond {first.short_tokens:,} lose when no more context than that"
            " is given, nats a token ± a standard error; a dash where it was not measured or no"
            " test conversation is so long. GGUFs are tested and advertised up to the window only,"
            " because llama.cpp does not apply it."
        ),
        header=[
            "Link",
            "Effective (RULER)",
            "Effective (NoLiMa)",
            "Gain of long context",
            *(f"{length:,}" for length in lengths),
        ],
        rows=rows,
    )


def effective(report: ContextScores, definition: Definition) -> str:
    """Effective length, what the link is advertised for (a GGUF up to its window), and the 95 %
    interval: `2,048 / 32,768 (1,024–4,096)`."""
    if not report.is_measurable:
        return "not measurable"
    length, low, high = report.effective_tokens(definition)
    return f"{length:,} / {report.context_tokens:,} ({low:,}–{high:,})"


def gain(report: ContextScores) -> str:
    if report.long_gain_nats_per_token is None:
        return "–"
    error = report.long_gain_standard_error_nats_per_token
    return with_error(report.long_gain_nats_per_token, error, 4)


def score_at(report: ContextScores, length: int) -> str:
    found = [score.score_percent for score in report.scores if score.length_tokens == length]
    return f"{found[0]:.0f}" if found else ""
