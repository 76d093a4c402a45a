"""What one change does to a model, over several seeds: loss by position and recall of facts.

The runs are grouped into arms by what they differ in beside their seeds, and compared seed by
seed; a difference that is no larger than its error is called that.

python -m workflow_scripts.report.report_experiment --runs '{"best-fit-0": {"packing": …}, …}'
    --positions results/runs/best-fit-0/evaluation/positions.json …
    --tsv experiment.tsv --markdown experiment.md --html experiment.html --figure experiment.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from workflow_scripts import log
from workflow_scripts.handover.context import RecallScores
from workflow_scripts.handover.scores import PositionScores
from workflow_scripts.report import figures, tables
from workflow_scripts.report.arms import Arm, Difference, Seeds, difference, find_arms
from workflow_scripts.report.tables import Table, with_error

OUTPUT_VERSION = 2
NOT_MEASURABLE = "not measurable"
logger = log.stage_logger("report_experiment")

Values = dict[Seeds, float]


class Figure(NamedTuple):
    """One thing that is measured of every run."""

    title: str
    of: Callable[[str], float]
    """By the run's name."""
    digits: int
    """Shown behind the point."""


@dataclass(frozen=True)
class Results:
    """Everything measured in an experiment."""

    factors: Sequence[str]
    arms: Sequence[Arm]
    positions: Mapping[str, PositionScores]
    """Scores by run."""
    recall: Mapping[str, RecallScores]
    """Scores by run; empty where recall was left out."""

    @property
    def first(self) -> PositionScores:
        """Positions of some run: what all runs share is read from it."""
        return next(iter(self.positions.values()))

    @property
    def n_seeds(self) -> int:
        return len(self.arms[0].runs)

    def lengths(self) -> list[int]:
        """Of the recall prompts, tokens, ascending."""
        return sorted(
            {cell.length_tokens for scores in self.recall.values() for cell in scores.cells}
        )

    def recalls(self) -> bool:
        """Whether any run found any fact in the shortest prompts: else 0 % says nothing of how far
        the models see."""
        shortest = min(self.lengths(), default=None)
        return any(
            cell.n_exact
            for scores in self.recall.values()
            for cell in scores.cells
            if cell.length_tokens == shortest
        )

    @property
    def chance_nats(self) -> float:
        """What guessing costs in a recall prompt."""
        return next(iter(self.recall.values())).chance_nats_per_answer

    def values(self, arm: Arm, figure: Figure) -> Values:
        """A figure of each run of an arm."""
        return {seeds: figure.of(run) for seeds, run in arm.runs.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--runs", required=True, help="JSON of the runs' settings, by name")
    parser.add_argument(
        "--positions", nargs="+", type=Path, required=True, help="of evaluate_positions, by run"
    )
    parser.add_argument(
        "--recall", nargs="+", type=Path, default=[], help="of evaluate_recall, by run"
    )
    tables.add_arguments(parser)
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    runs = json.loads(arguments.runs)
    factors, arms = find_arms(runs)
    positions = {
        run: PositionScores.read(path) for run, path in zip(runs, arguments.positions, strict=True)
    }
    recall = {
        run: RecallScores.read(path)
        for run, path in zip(runs if arguments.recall else (), arguments.recall, strict=True)
    }
    check_same_questions(positions, recall)
    results = Results(factors, arms, positions, recall)
    table(results).write(arguments)
    draw(results, arguments.figure)
    logger.info("wrote n_arms=%d n_seeds=%d path=%s", len(arms), results.n_seeds, arguments.html)


def check_same_questions(
    positions: Mapping[str, PositionScores], recall: Mapping[str, RecallScores]
) -> None:
    """
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
                "two runs of an experiment were measured on different things",
                where=f"run {run}, against {first}",
                found=measured_on[run],
                expected=measured_on[first],
                to_fix="give all runs one model and one dataset",
            )


def table(results: Results) -> Table:
    """A row a figure and arm: long and narrow, however many arms there are."""
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
            "larger than its error",
        ],
        rows=rows,
    )


def rows_of(results: Results, figure: Figure) -> Iterator[list[str]]:
    """Of each arm the mean and standard deviation over its seeds; of all but the first the
    difference from that."""
    by_arm = {arm.name: results.values(arm, figure) for arm in results.arms}
    first = next(iter(by_arm.values()))
    for name, values in by_arm.items():
        cells = [figure.title, name, with_error(*mean_and_deviation(values), figure.digits)]
        if values is first:
            yield [*cells, "", ""]
            continue
        one = difference(values, first)
        yield [*cells, signed(one, figure.digits), "yes" if one.is_shown else "no"]


def perplexity(results: Results) -> Figure:
    return Figure("Perplexity", lambda run: results.positions[run].perplexity, 3)


def position_figures(results: Results) -> list[Figure]:
    """Perplexity of each bucket of positions."""

    def figure(at: int, first: int, last: int) -> Figure:
        return Figure(
            f"Perplexity, positions {first:,}–{last:,}",
            lambda run: results.positions[run].buckets[at].perplexity,
            3,
        )

    return [
        figure(at, bucket.first_position, bucket.last_position)
        for at, bucket in enumerate(results.first.buckets)
    ]


def recall_figures(results: Results) -> list[Figure]:
    """Per cent of right answers by length, over all depths."""

    def figure(length: int) -> Figure:
        return Figure(
            f"Facts recalled, {length:,} tokens, %",
            lambda run: 100 * exact_of(results.recall[run], length),
            1,
        )

    return [figure(length) for length in results.lengths()]


def cost_figures(results: Results) -> list[Figure]:
    """Nats of the right answer by length, over all depths."""

    def figure(length: int) -> Figure:
        return Figure(
            f"Cost of the right answer, {length:,} tokens, nats",
            lambda run: nats_of(results.recall[run], length),
            2,
        )

    return [figure(length) for length in results.lengths()]


def exact_of(scores: RecallScores, length: int) -> float:
    """Share of right answers over all depths."""
    cells = [cell for cell in scores.cells if cell.length_tokens == length]
    return sum(cell.n_exact for cell in cells) / sum(cell.n_prompts for cell in cells)


def nats_of(scores: RecallScores, length: int) -> float:
    """Mean over all depths."""
    cells = [cell for cell in scores.cells if cell.length_tokens == length]
    return statistics.mean(cell.nats_per_answer for cell in cells)


def mean_and_deviation(values: Values) -> tuple[float, float | None]:
    """Over seeds; no deviation of a single one."""
    return statistics.mean(values.values()), (
        statistics.stdev(values.values()) if len(values) > 1 else None
    )


def signed(one: Difference, digits: int) -> str:
    """`−0.123 ± 0.045`."""
    sign = "−" if one.mean < 0 else "+"
    return sign + with_error(abs(one.mean), one.half_width, digits)


def verdicts(results: Results) -> list[str]:
    """The answers in sentences: an arm each, and where there is none."""
    first, *others = results.arms
    start = results.values(first, perplexity(results))
    said = []
    for arm in others:
        one = difference(results.values(arm, perplexity(results)), start)
        share = one.mean / statistics.mean(start.values())
        change = f"{abs(share):.1%} {'lower' if one.mean < 0 else 'higher'}"
        if one.half_width is None:
            judged = "with one seed no error is known"
        elif one.is_shown:
            judged = "that is larger than its error"
        else:
            judged = "that is no larger than its error, so no difference is shown"
        said.append(
            f"The perplexity of {arm.name} is {change} than that of {first.name}; {judged}."
        )
    if results.recall and not results.recalls():
        said.append("No run finds a fact even in the shortest prompts: recall is not measurable.")
    return said


def note(results: Results) -> str:
    window = results.first.sliding_window
    said = [
        f"Arms: {'; '.join(described(results))}.",
        f"Lower perplexity is better: {results.first.n_scored_tokens:,} supervised tokens of"
        f" {results.first.n_conversations} validation conversations, each whole and alone, with"
        f" {f'a window of {window:,} tokens' if window else 'full attention'}.",
    ]
    if results.recall:
        shortest = results.lengths()[0]
        cells = next(iter(results.recall.values())).cells
        n_prompts = sum(cell.n_prompts for cell in cells if cell.length_tokens == shortest)
        said.append(
            f"Recall: {n_prompts} prompts a length, spread over depths; guessing costs"
            f" {results.chance_nats:.1f} nats."
        )
    said.append(
        f"{results.n_seeds} seeds an arm: ± is the standard deviation over seeds; a difference is"
        " paired by seed, its ± a 95 % interval (Student) over seeds, for these conversations"
        f"{' and prompts' if results.recall else ''}. Of twenty differences that are none, one is"
        " larger than its error by chance."
    )
    return " ".join(said)


def described(results: Results) -> list[str]:
    """Each arm by its values; those after the first by what differs from it."""
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


def draw(results: Results, path: Path) -> None:
    """Perplexity by position, facts recalled and cost of the answer by length of the prompt; a line
    an arm, bars of one standard deviation over seeds."""
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
                "Nats of the right answer (lower is better)",
                by_length,
                lengths,
                cost_figures(results),
            ),
        ]
    window = results.first.sliding_window
    drawing, axes = figures.panels(len(panels), width=1.5 + 4.2 * len(panels), height=4)
    for panel, (title, label, places, drawn) in zip(axes, panels, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlim(places[0] / 1.3, places[-1] * 1.3)
        figures.log_ticks(panel.xaxis)
        panel.set_title(title)
        panel.set_xlabel(label)
        if not drawn:
            panel.text(0.5, 0.5, NOT_MEASURABLE, ha="center", transform=panel.transAxes)
            continue
        for number, (arm, style) in enumerate(zip(results.arms, figures.styles(), strict=False)):
            summaries = [mean_and_deviation(results.values(arm, figure)) for figure in drawn]
            panel.errorbar(
                # Beside each other, so that bars do not hide bars.
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
            results.chance_nats, color=figures.QUIET, linestyle="--", linewidth=1, label="guessed"
        )
    for panel in axes:
        if panel.lines:
            panel.legend()
    figures.save(drawing, path)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
