"""An experiment: what one change does to a model, over several seeds.

The runs are grouped into arms by the settings in which they differ apart from their seeds, and
compared seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure as Drawing

from workflow_scripts import log
from workflow_scripts.handover.context import Cell, RecallScores
from workflow_scripts.handover.scores import PositionScores
from workflow_scripts.report import figures
from workflow_scripts.report.arms import Arm, Seeds, difference
from workflow_scripts.report.tables import Table, signed, with_error

NOT_MEASURABLE = "not measurable"

Values = dict[Seeds, float]


class Figure(NamedTuple):
    """A figure that is measured for every run."""

    title: str
    of: Callable[[str], float]
    """Return the figure of the run with this name."""
    digits: int
    """Decimals to print."""


@dataclass(frozen=True)
class Results:
    """Everything measured in an experiment."""

    factors: Sequence[str]
    arms: Sequence[Arm]
    positions: Mapping[str, PositionScores]
    """Scores by run."""
    recall: Mapping[str, RecallScores]
    """Scores by run; empty if recall was not measured."""

    @property
    def first(self) -> PositionScores:
        """Positions of the first run, for what all runs share."""
        return next(iter(self.positions.values()))

    @property
    def n_seeds(self) -> int:
        return len(self.arms[0].runs)

    def lengths(self) -> list[int]:
        """Lengths of the recall prompts, tokens, ascending."""
        return sorted(
            {cell.length_tokens for scores in self.recall.values() for cell in scores.cells}
        )

    def recalls(self) -> bool:
        """True if any run found a fact in the shortest prompts.

        If none did, 0 % says nothing about how far the models see.
        """
        shortest = min(self.lengths(), default=None)
        return any(
            cell.n_exact
            for scores in self.recall.values()
            for cell in scores.cells
            if cell.length_tokens == shortest
        )

    @property
    def chance_nats(self) -> float:
        """Cost of guessing the answer to a recall prompt."""
        return next(iter(self.recall.values())).chance_nats_per_answer

    def perplexity_at(self, bucket: int, run: str) -> float:
        return self.positions[run].buckets[bucket].perplexity

    def percent_recalled(self, length: int, run: str) -> float:
        """Percentage of right answers over all depths."""
        cells = self._cells(length, run)
        return 100 * sum(cell.n_exact for cell in cells) / sum(cell.n_prompts for cell in cells)

    def nats_per_answer(self, length: int, run: str) -> float:
        """Mean loss of the right answer over all depths."""
        return statistics.mean(cell.nats_per_answer for cell in self._cells(length, run))

    def _cells(self, length: int, run: str) -> list[Cell]:
        return [cell for cell in self.recall[run].cells if cell.length_tokens == length]

    def values(self, arm: Arm, figure: Figure) -> Values:
        """A figure of each run of an arm, by seeds."""
        return {seeds: figure.of(run) for seeds, run in arm.runs.items()}


def check_same_questions(
    positions: Mapping[str, PositionScores], recall: Mapping[str, RecallScores]
) -> None:
    """Check that all runs were measured alike.

    Raises:
        StageError: two runs were measured on different tokens or prompts.
    """
    measured_on = {
        run: [
            *((part.first_position, part.n_scored_tokens) for part in scores.buckets),
            *(
                (cell.length_tokens, cell.depth_fraction, cell.n_prompts)
                for cell in (recall[run].cells if recall else ())
            ),
        ]
        for run, scores in positions.items()
    }
    first, *others = measured_on
    for run in others:
        if measured_on[run] != measured_on[first]:
            raise log.StageError(
                "two runs of an experiment were measured on different tokens or prompts",
                where=f"run {run}, compared with {first}",
                found=measured_on[run],
                expected=measured_on[first],
                to_fix="use one model and one dataset for all runs",
            )


def table(results: Results) -> Table:
    """One row per figure and arm, so that the table stays narrow with many arms."""
    figures = [perplexity(results), *position_figures(results)]
    rows = [row for figure in figures for row in rows_of(results, figure)]
    for figure in recall_figures(results):
        if results.recalls():
            rows += rows_of(results, figure)
        else:
            rows += [[figure.title, arm.name, NOT_MEASURABLE, "", ""] for arm in results.arms]
    rows += [row for figure in cost_figures(results) for row in rows_of(results, figure)]
    return Table(
        title=f"Experiment: {', '.join(results.factors)}",
        note=" ".join([*verdicts(results), note(results)]),
        header=[
            "",
            "arm",
            "mean ± sd",
            f"difference from {results.arms[0].name}, 95 %",
            "significant",
        ],
        rows=rows,
    )


def rows_of(results: Results, figure: Figure) -> Iterator[list[str]]:
    """Mean and standard deviation of each arm over its seeds, and its difference from the first."""
    by_arm = {arm.name: results.values(arm, figure) for arm in results.arms}
    first = next(iter(by_arm.values()))
    for name, values in by_arm.items():
        cells = [figure.title, name, with_error(*mean_and_deviation(values), figure.digits)]
        if values is first:
            yield [*cells, "", ""]
            continue
        one = difference(values, first)
        yield [
            *cells,
            signed(*one, digits=figure.digits),
            "yes" if one.is_significant else "no",
        ]


def perplexity(results: Results) -> Figure:
    return Figure("Perplexity", lambda run: results.positions[run].perplexity, 3)


def position_figures(results: Results) -> list[Figure]:
    """Perplexity of each bucket of positions."""
    return [
        Figure(
            f"Perplexity, positions {bucket.first_position:,}–{bucket.last_position:,}",
            partial(results.perplexity_at, at),
            3,
        )
        for at, bucket in enumerate(results.first.buckets)
    ]


def recall_figures(results: Results) -> list[Figure]:
    """Percentage of right answers by length, over all depths."""
    return [
        Figure(
            f"Facts recalled, {length:,} tokens, %",
            partial(results.percent_recalled, length),
            1,
        )
        for length in results.lengths()
    ]


def cost_figures(results: Results) -> list[Figure]:
    """Loss of the right answer by length, nats, over all depths."""
    return [
        Figure(
            f"Loss of the right answer, {length:,} tokens, nats",
            partial(results.nats_per_answer, length),
            2,
        )
        for length in results.lengths()
    ]


def mean_and_deviation(values: Values) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; a single seed has no deviation."""
    return statistics.mean(values.values()), (
        statistics.stdev(values.values()) if len(values) > 1 else None
    )


def verdicts(results: Results) -> list[str]:
    """One sentence per arm, and one if recall is not measurable."""
    first, *others = results.arms
    start = results.values(first, perplexity(results))
    said = []
    for arm in others:
        one = difference(results.values(arm, perplexity(results)), start)
        share = one.mean / statistics.mean(start.values())
        change = f"{abs(share):.1%} {'lower' if one.mean < 0 else 'higher'}"
        if one.half_width is None:
            judged = "with one seed, its error is unknown"
        elif one.is_significant:
            judged = "a significant difference at 95 %"
        else:
            judged = "no significant difference at 95 %"
        said.append(
            f"The perplexity of {arm.name} is {change} than that of {first.name}: {judged}."
        )
    if results.recall and not results.recalls():
        said.append(
            "No run finds a fact even in the shortest prompts, so recall is not measurable."
        )
    return said


def note(results: Results) -> str:
    window = results.first.sliding_window
    attention = f"a window of {window:,} tokens" if window else "full attention"
    said = [
        f"Arms: {'; '.join(described(results))}.",
        f"Lower perplexity is better. It is measured on {results.first.n_scored_tokens:,}"
        f" supervised tokens of {results.first.n_conversations} validation conversations, each"
        f" whole and alone, with {attention}.",
    ]
    if results.recall:
        shortest = results.lengths()[0]
        cells = next(iter(results.recall.values())).cells
        n_prompts = sum(cell.n_prompts for cell in cells if cell.length_tokens == shortest)
        said.append(
            f"Recall is measured with {n_prompts} prompts per length, spread over depths; the loss"
            f" of a guess is {results.chance_nats:.1f} nats."
        )
    measured_on = "conversations and prompts" if results.recall else "conversations"
    said.append(
        f"Each arm has {results.n_seeds} seeds. The ± of a mean is the standard deviation over"
        " seeds. Differences are paired by seed, and their ± is half of the 95 % interval (Student)"
        f" over seeds, for these {measured_on}. On average, one of twenty comparisons of equal arms"
        " is significant by chance."
    )
    return " ".join(said)


def described(results: Results) -> list[str]:
    """The values of each arm; for arms after the first, only the values that differ from it."""
    first = results.arms[0].values
    return [
        f"{arm.name}: "
        + ", ".join(
            f"{key} {value}"
            for key, value in arm.values.items()
            if arm.values is first or value != first[key]
        )
        for arm in results.arms
    ]


def draw(results: Results) -> Drawing:
    """Perplexity by position, and recall by length of the prompt: one line per arm.

    Bars are one standard deviation over seeds.
    """
    buckets = results.first.buckets
    middles = [(bucket.first_position + bucket.last_position + 1) / 2 for bucket in buckets]
    lengths = results.lengths()
    by_position, by_length = "position in the conversation, tokens", "length of the prompt, tokens"
    recalled = recall_figures(results) if results.recalls() else []
    panels: list[tuple[str, str, Sequence[float], list[Figure]]] = [
        ("Perplexity (lower is better)", by_position, middles, position_figures(results)),
    ]
    if results.recall:
        panels += [
            ("Facts recalled, %", by_length, lengths, recalled),
            (
                "Loss of the right answer, nats (lower is better)",
                by_length,
                lengths,
                cost_figures(results),
            ),
        ]
    window = results.first.sliding_window
    drawing, axes = figures.panels(len(panels), width=1.5 + 4.2 * len(panels), height=4)
    for panel, (title, label, places, drawn) in zip(axes, panels, strict=True):
        panel.set_xscale("log", base=2)
        figures.log_ticks(panel.xaxis)
        panel.set(title=title, xlabel=label, xlim=(places[0] / 1.3, places[-1] * 1.3))
        if not drawn:
            panel.text(0.5, 0.5, NOT_MEASURABLE, ha="center", transform=panel.transAxes)
            continue
        for number, (arm, style) in enumerate(zip(results.arms, figures.styles(), strict=False)):
            summaries = [mean_and_deviation(results.values(arm, figure)) for figure in drawn]
            panel.errorbar(
                # Side by side, so that no bar hides another.
                [place * 1.03**number for place in places],
                [mean for mean, _ in summaries],
                yerr=[deviation or 0 for _, deviation in summaries],
                **style,
                label=arm.name,
            )
        if window:
            panel.axvline(window, color=figures.QUIET, linestyle=":", linewidth=1, label="window")
    if results.recall:
        axes[1].set_ylim(-3, 103)
        axes[2].axhline(
            results.chance_nats, color=figures.QUIET, linestyle="--", linewidth=1, label="guess"
        )
    for panel in axes:
        if panel.lines:
            panel.legend()
    return drawing
