"""A sweep: runs that differ in the values of a recipe, ranked by their validation scores.

The test split is not read here: it is kept for reporting what is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from workflow_scripts import log
from workflow_scripts.handover.chain import token_scores_beside
from workflow_scripts.handover.scores import Scores
from workflow_scripts.handover.training import TrainingManifest
from workflow_scripts.report import figures
from workflow_scripts.report.arms import Difference, student
from workflow_scripts.report.tables import Table, change_of_perplexity, mebibytes, with_error
from workflow_scripts.scoring.token_scores import TokenScores
from workflow_scripts.settings import sweeps

Values = Mapping[str, Any]  # untyped: of any keys of a recipe


@dataclass(frozen=True)
class Run:
    """A run with one combination of the swept values."""

    name: str
    values: Values
    """Values of the swept keys, as validated."""
    scores: Scores
    """Scores on the validation split."""
    tokens: TokenScores
    """Loss of every token, from which the scores are computed."""
    manifest: TrainingManifest

    @property
    def perplexity(self) -> float:
        return self.scores.perplexity

    @property
    def half_width(self) -> float | None:
        """Half of the perplexity's 95 % interval over conversations; None for a single one."""
        error = self.scores.loss_standard_error_nats_per_token
        if error is None:
            return None
        return self.perplexity * student(self.scores.n_conversations) * error


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
        """Loss of a run minus that of the best, paired token by token, nats per token."""
        mean, error = run.tokens.difference(self.best.tokens)
        if error is None:
            return Difference(mean, None)
        return Difference(mean, student(run.scores.n_conversations) * error)

    def ties(self) -> list[Run]:
        """Runs that do not differ significantly from the best."""
        return [run for run in self.runs[1:] if not self.difference(run).is_significant]


def read_sweep(
    name: str, recipe: str, values: Mapping[str, Values], files: Mapping[str, tuple[Path, Path]]
) -> Sweep:
    """The runs of a sweep, in order of their validation loss.

    Args:
        values: values of the swept keys by run.
        files: scores and training manifest by run.
    Raises:
        StageError: two runs were scored on different tokens.
    """
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
                where=token_scores_beside(str(files[other.name][0]))
                + f", compared with {runs[0].name}",
                found=found,
                expected=f"the same {expected}",
                to_fix="score them again: snakemake sweep --forcerun evaluate_validation",
            )
    return Sweep(name, recipe, sorted(runs, key=lambda run: run.scores.loss_nats_per_token))


def table(ranked: Sequence[Sweep]) -> Table:
    """One row per run, the best first within its sweep."""
    keys = list(dict.fromkeys(key for sweep in ranked for key in sweep.keys))
    return Table(
        title=f"Sweep: {', '.join(keys)}",
        note=note(ranked),
        header=[
            "run", *keys, "perplexity", "vs. the best, %", "significant",
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
        compared = [change_of_perplexity(*one), "yes" if one.is_significant else "no"]
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
    """A value as written in a config: `2e-4`, `[q_proj, v_proj]`."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    return sweeps.short(value)


def note(ranked: Sequence[Sweep]) -> str:
    first = ranked[0].best.scores
    return (
        "Lower perplexity is better. It is measured with the adapter on its base model, on"
        f" {first.n_scored_tokens:,} supervised tokens of {first.n_conversations:,} validation"
        " conversations. ± is half of the 95 % interval over conversations. The difference from the"
        " best run is paired token by token. The best run was chosen on these conversations, so its"
        " perplexity here is slightly optimistic. The test split is not used."
    )


def conclusion(sweep: Sweep) -> str:
    """The values to copy into the recipe."""
    values = ", ".join(f"{key}: {as_written(sweep.best.values[key])}" for key in sweep.keys)
    ties = sweep.ties()
    if len(sweep.runs) == 1:
        judged = "the only run"
    elif ties:
        judged = f"not significantly better than {', '.join(run.name for run in ties)}"
    else:
        judged = "significantly better than every other run"
    return f"Best: {sweep.best.name}, {judged}. Copy into recipes.{sweep.recipe}: {values}"


def draw(ranked: Sequence[Sweep]) -> Figure:
    """One panel per sweep: perplexity by the swept value if it is a single number, else by run.

    Bars are the intervals of the difference from the best run: a run whose bar crosses the line of
    the best run does not differ significantly from it.
    """
    heights = [4.2 if is_curve(sweep) else 1.3 + 0.35 * len(sweep.runs) for sweep in ranked]
    drawing, panels = figures.stacked_panels(heights)
    for panel, sweep in zip(panels, ranked, strict=True):
        draw_sweep(panel, sweep)
    return drawing


def draw_sweep(panel: Any, sweep: Sweep) -> None:
    best = sweep.best.perplexity
    # The derivative turns a difference of losses into one of perplexities.
    bars = [(sweep.difference(run).half_width or 0.0) * run.perplexity for run in sweep.runs]
    bars[0] = 0.0
    perplexities = [run.perplexity for run in sweep.runs]
    label = "validation perplexity (lower is better)"
    style = {"marker": "o", "label": "run, with 95 % interval of its difference from the best"}
    panel.set_title(sweep.name)
    if is_curve(sweep):
        (key,) = sweep.keys
        places = [float(run.values[key]) for run in sweep.runs]
        order = sorted(range(len(places)), key=places.__getitem__)
        if is_logarithmic(places):
            panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xticks(
            [places[at] for at in order],
            [as_written(sweep.runs[at].values[key]) for at in order],
        )
        panel.errorbar(
            [places[at] for at in order],
            [perplexities[at] for at in order],
            yerr=[bars[at] for at in order],
            **style,
        )
        panel.axhline(best, color=figures.QUIET, linestyle="--", linewidth=1, label="best run")
        panel.set(xlabel=key, ylabel=label)
    else:
        rows = range(len(sweep.runs))
        panel.errorbar(perplexities, rows, xerr=bars, linestyle="", **style)
        panel.axvline(best, color=figures.QUIET, linestyle="--", linewidth=1, label="best run")
        panel.set_yticks(
            rows,
            [
                ", ".join(f"{key} {as_written(run.values[key])}" for key in sweep.keys)
                for run in sweep.runs
            ],
        )
        panel.invert_yaxis()  # the best run on top, as in the table
        panel.margins(y=0.2 / len(sweep.runs) + 0.05)
        panel.set_xlabel(label)
    panel.legend()


def is_curve(sweep: Sweep) -> bool:
    """True if one key was swept and all its values are numbers."""
    return len(sweep.keys) == 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for run in sweep.runs
        for value in run.values.values()
    )


def is_logarithmic(places: Sequence[float]) -> bool:
    """True for positive values that span a factor of four or more."""
    return min(places) > 0 and max(places) >= 4 * min(places)
