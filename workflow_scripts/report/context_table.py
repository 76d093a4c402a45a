"""Table of the usable context of links: scores by length, effective lengths, gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts.handover.chain import Chain
from workflow_scripts.handover.context import ContextScores, Definition
from workflow_scripts.report.tables import Table, with_error

HEAT_MAP_CAPTION = (
    "Percentage of right answers by length of the prompt and depth of the fact, for the tasks that"
    " have a depth."
)

Reports = Mapping[str, ContextScores]


def read(chain: Chain, links: Sequence[str]) -> Reports:
    """Reports of evaluate_context by link, the base first.

    Args:
        links: names of the links that were measured.
    """
    return {
        link.title: ContextScores.read(Path(link.context))
        for link in chain.links
        if link.context and link.name in links
    }


def context(runs: Mapping[str, Reports]) -> Table:
    """One row per run and link."""
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
            "The columns of lengths give the percentage of right answers, averaged over tasks"
            " modelled on RULER; higher is better. “Effective” gives the effective and the"
            " advertised length. The effective length is the longest up to which every score is at"
            " least 85.6 (RULER), or at least 85 % of the best score at up to 1,024 tokens"
            " (NoLiMa). Brackets contain its 95 % interval for this number of prompts (Jeffreys)."
            " “Not measurable” means that a link gives no right answer even at the shortest length."
            f" The gain is the rise in loss of tokens after the first {first.short_tokens:,} when"
            " the model sees only that many tokens of context: nats per token ± a standard error,"
            " or a dash where it was not measured or no test conversation is long enough. GGUFs are"
            " tested only up to the sliding window, because llama.cpp does not apply it."
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
    """Effective length, advertised length (of a GGUF: its window) and 95 % interval.

    `2,048 / 32,768 (1,024–4,096)`
    """
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
