"""Which values of a recipe are best, by validation scores: every sweep's runs, ranked.

A run that cannot be told apart from the best one is called that. The test split is not looked at:
what is chosen here is reported on it later.

python -m workflow_scripts.report.report_sweep
    --sweeps '{"rates": {"recipe": "rates", "runs": {"rates.1e-4": {"learning_rate": 1e-4}, …}}}'
    --scores results/runs/rates.1e-4/evaluation/validation.json …
    --manifests results/runs/rates.1e-4/adapter/training_manifest.json …
    --tsv sweep.tsv --markdown sweep.md --html sweep.html --figure sweep.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts import files, log
from workflow_scripts.handover.chain import token_scores_beside
from workflow_scripts.handover.scores import Scores
from workflow_scripts.handover.training import TrainingManifest
from workflow_scripts.report import tables
from workflow_scripts.report.arms import STUDENT_T
from workflow_scripts.report.tables import Table, change_of_perplexity, mebibytes, with_error
from workflow_scripts.settings import sweeps

if TYPE_CHECKING:
    from workflow_scripts.scoring.token_scores import TokenScores

OUTPUT_VERSION = 2
logger = log.stage_logger("report_sweep")
Values = Mapping[str, Any]  # untyped: of any keys of a recipe


@dataclass(frozen=True)
class Run:
    """One combination of a sweep."""

    name: str
    values: Values
    """Swept keys, as validated."""
    scores: Scores
    """On the validation split."""
    tokens: TokenScores
    """The loss of every token, of which the scores are made."""
    manifest: TrainingManifest

    @property
    def perplexity(self) -> float:
        return self.scores.perplexity

    @property
    def half_width(self) -> float | None:
        """Of the perplexity's 95 % interval over conversations; None for a single one."""
        error = self.scores.loss_standard_error_nats_per_token
        if error is None:
            return None
        return self.perplexity * student(self.scores.n_conversations) * error


class Difference(NamedTuple):
    """A run minus the best one, nats per token."""

    mean: float
    half_width: float | None
    """Of the 95 % interval over conversations; None for a single one."""

    @property
    def is_shown(self) -> bool:
        """The interval is on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Sweep:
    """The runs of one sweep, best first."""

    name: str
    recipe: str
    runs: Sequence[Run]

    @property
    def best(self) -> Run:
        return self.runs[0]

    @property
    def keys(self) -> list[str]:
        return list(self.best.values)

    def difference(self, run: Run) -> Difference:
        """To the best, paired token by token, so that what is hard for both drops out."""
        mean, error = run.tokens.difference(self.best.tokens)
        if error is None:
            return Difference(mean, None)
        return Difference(mean, student(run.scores.n_conversations) * error)

    def ties(self) -> list[Run]:
        """Runs that the validation split does not tell apart from the best."""
        return [run for run in self.runs[1:] if not self.difference(run).is_shown]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--sweeps", required=True, help="JSON: recipe, runs and values by sweep")
    parser.add_argument(
        "--scores", nargs="+", type=Path, default=[], help="of evaluate_validation, by run"
    )
    parser.add_argument(
        "--manifests", nargs="+", type=Path, default=[], help="of train_adapter, by run"
    )
    tables.add_arguments(parser)
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    sweeps = json.loads(arguments.sweeps)
    runs = [run for sweep in sweeps.values() for run in sweep["runs"]]
    files = dict(zip(runs, zip(arguments.scores, arguments.manifests, strict=True), strict=True))
    ranked = [
        read_sweep(name, sweep["recipe"], sweep["runs"], files) for name, sweep in sweeps.items()
    ]
    if not ranked:
        raise log.StageError(
            "there is no sweep to report",
            where="--sweeps",
            to_fix="give a recipe `sweep: true` and a list of values, and a run that uses it",
        )
    table(ranked).write(arguments)
    draw(ranked, arguments.figure)
    for sweep in ranked:
        logger.info(
            "ranked sweep=%s n_runs=%d best=%s n_ties=%d",
            *(sweep.name, len(sweep.runs), sweep.best.name, len(sweep.ties())),
        )


def read_sweep(
    name: str, recipe: str, values: Mapping[str, Values], files: Mapping[str, tuple[Path, Path]]
) -> Sweep:
    """A sweep's runs, the lowest validation loss first.

    Args:
        values: swept keys by run.
        files: scores and training manifest by run.
    Raises:
        StageError: two runs were scored on different tokens.
    """
    from workflow_scripts.scoring.token_scores import TokenScores

    runs = []
    for name_of_run, swept in values.items():
        scores, manifest = files[name_of_run]
        runs.append(
            Run(
                name_of_run,
                swept,
                Scores.read(scores),
                TokenScores.read(Path(token_scores_beside(str(scores)))),
                TrainingManifest.read(manifest),
            )
        )
    for other in runs[1:]:
        is_cut_alike = other.scores.piece_tokens == runs[0].scores.piece_tokens
        if not (is_cut_alike and other.tokens.scores_the_same(runs[0].tokens)):
            found, expected = (
                f"{len(one.tokens.nats)} tokens in pieces of {one.scores.piece_tokens}"
                for one in (other, runs[0])
            )
            raise log.StageError(
                "two runs of a sweep were scored on different tokens",
                where=f"{token_scores_beside(str(files[other.name][0]))}, against {runs[0].name}",
                found=found,
                expected=f"the same {expected}",
                to_fix="score them again: snakemake sweep --forcerun evaluate_validation",
            )
    return Sweep(name, recipe, sorted(runs, key=lambda run: run.scores.loss_nats_per_token))


def student(n: int) -> float:
    """97.5 % quantile of Student's t over n conversations; a little too wide above 21."""
    return STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]


def table(ranked: Sequence[Sweep]) -> Table:
    """A row a run, best first within its sweep."""
    keys = list(dict.fromkeys(key for sweep in ranked for key in sweep.keys))
    return Table(
        title=f"Sweep: {', '.join(keys)}",
        note=note(ranked),
        header=[
            "run", *keys, "perplexity", "vs. the best, %", "told apart",
            "training, s", "tokens/s", "peak memory",
        ],
        rows=[row(sweep, run, keys) for sweep in ranked for run in sweep.runs],
        conclusions=[conclusion(sweep) for sweep in ranked],
    )  # fmt: skip


def row(sweep: Sweep, run: Run, keys: Sequence[str]) -> list[str]:
    if run is sweep.best:
        compared = ["best", ""]
    else:
        one = sweep.difference(run)
        compared = [change_of_perplexity(*one), "yes" if one.is_shown else "no"]
    speed = run.manifest.tokens_per_second
    return [
        run.name,
        *(as_written(run.values[key]) if key in run.values else "" for key in keys),
        with_error(run.perplexity, run.half_width, 3),
        *compared,
        f"{run.manifest.duration_seconds:,.0f}",
        "" if speed is None else f"{speed:,.0f}",
        mebibytes(run.manifest.peak_memory_bytes),
    ]


def as_written(value: Any) -> str:
    """As it stands in a config: `2e-4`, `[q_proj, v_proj]`."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    return sweeps.short(value)


def note(ranked: Sequence[Sweep]) -> str:
    first = ranked[0].best.scores
    return (
        f"Lower perplexity is better: {first.n_scored_tokens:,} supervised tokens of"
        f" {first.n_conversations:,} validation conversations, the live adapter on its base."
        " ± is a 95 % interval over conversations; the difference to the best is paired token by"
        " token. The test split is not used. The best was chosen on these very conversations, so"
        " its own perplexity is a little flattered."
    )


def conclusion(sweep: Sweep) -> str:
    """What to write into the recipe."""
    values = ", ".join(f"{key}: {as_written(sweep.best.values[key])}" for key in sweep.keys)
    ties = sweep.ties()
    if len(sweep.runs) == 1:
        judged = "the only run"
    elif ties:
        judged = f"not told apart from {', '.join(run.name for run in ties)}"
    else:
        judged = "told apart from every other run"
    return f"Best: {sweep.best.name}, {judged}. Copy into recipes.{sweep.recipe}: {values}"


def draw(ranked: Sequence[Sweep], path: Path) -> None:
    """A panel a sweep: perplexity against the swept value where there is one and it is a number,
    else the runs in their order. Bars are those of the difference to the best, so that a bar which
    crosses the line of the best is a run that is not told apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "tramontane"
    heights = [4.2 if is_curve(sweep) else 1.3 + 0.35 * len(sweep.runs) for sweep in ranked]
    drawing, axes = pyplot.subplots(
        *(len(ranked), 1),
        figsize=(8, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for panel, sweep in zip(axes[:, 0], ranked, strict=True):
        draw_sweep(panel, sweep)
    with files.atomic_file(path) as temporary:
        drawing.savefig(temporary, metadata={"Date": None})
    pyplot.close(drawing)


def draw_sweep(panel: Any, sweep: Sweep) -> None:
    best = sweep.best.perplexity
    # From a difference of losses to one of perplexities, by its derivative.
    bars = [(sweep.difference(run).half_width or 0.0) * run.perplexity for run in sweep.runs]
    bars[0] = 0.0
    perplexities = [run.perplexity for run in sweep.runs]
    label = "validation perplexity (lower is better)"
    style = {"marker": "o", "capsize": 3, "label": "run, 95 % of its difference to the best"}
    panel.set_title(sweep.name, fontsize=10)
    if is_curve(sweep):
        (key,) = sweep.keys
        places = [float(run.values[key]) for run in sweep.runs]
        order = sorted(range(len(places)), key=places.__getitem__)
        if is_logarithmic(places):
            panel.set_xscale("log")
        panel.set_xticks([places[at] for at in order])
        panel.minorticks_off()
        panel.set_xticklabels([as_written(sweep.runs[at].values[key]) for at in order])
        panel.errorbar(
            [places[at] for at in order],
            [perplexities[at] for at in order],
            yerr=[bars[at] for at in order],
            **style,
        )
        panel.axhline(best, color="0.5", linestyle="--", linewidth=1, label="the best")
        panel.set_xlabel(key)
        panel.set_ylabel(label)
    else:
        rows = range(len(sweep.runs))
        panel.errorbar(perplexities, rows, xerr=bars, linestyle="", **style)
        panel.axvline(best, color="0.5", linestyle="--", linewidth=1, label="the best")
        panel.set_yticks(rows)
        panel.set_yticklabels(
            [
                ", ".join(f"{key} {as_written(run.values[key])}" for key in sweep.keys)
                for run in sweep.runs
            ]
        )
        panel.invert_yaxis()  # the best on top, as in the table
        panel.margins(y=0.2 / len(sweep.runs) + 0.05)
        panel.set_xlabel(label)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)


def is_curve(sweep: Sweep) -> bool:
    """One key, and all its values numbers."""
    return len(sweep.keys) == 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for run in sweep.runs
        for value in run.values.values()
    )


def is_logarithmic(places: Sequence[float]) -> bool:
    """Values that span a factor of four or more are chosen by factors."""
    return min(places) > 0 and max(places) >= 4 * min(places)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
