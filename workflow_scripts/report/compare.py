"""Set two finished runs side by side, also of two folders of results.

Prints every figure that both have, with the difference and its error; the losses of links that were
scored on the same tokens are paired.

python -m workflow_scripts.report.compare results/runs/generic results/runs/mistral
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.metrics import Metric, RunMetrics
from workflow_scripts.log import StageError
from workflow_scripts.report.tables import change_of_perplexity, with_error

logger = log.stage_logger("compare")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, help="results/runs/<run>, of a finished report")
    arguments = parser.parse_args(argv)
    print(compared(*arguments.runs))


def compared(one: Path, other: Path) -> str:
    """Markdown: a table a link."""
    metrics = [read(folder) for folder in (one, other)]
    names = [metric.run for metric in metrics]
    if names[0] == names[1]:
        names = [str(one), str(other)]
    parts = []
    for link in metrics[0].links:
        if link not in metrics[1].links:
            continue
        rows = rows_of(metrics[0].links[link], metrics[1].links[link])
        paired = loss_row(one, other, link)
        lines = [f"### {link}", "", f"| | {names[0]} | {names[1]} | difference |"]
        lines += ["| --- | ---: | ---: | ---: |", *([paired] if paired else []), *rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def read(folder: Path) -> RunMetrics:
    """
    Raises:
        StageError: the run has no metrics.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise StageError(
            "the run has no metrics",
            where=path,
            expected="results/runs/<run> of a build whose report is made",
            to_fix="snakemake --cores 8 report",
        )
    return RunMetrics.read(path)


def rows_of(one: Mapping[str, Metric], other: Mapping[str, Metric]) -> list[str]:
    """A row each of the metrics that both have."""
    rows = []
    for name in one:
        if name not in other:
            continue
        pair = (one[name], other[name])
        shown = [shown_with(metric.value, metric.error) for metric in pair]
        unit = f", {pair[0].unit}" if pair[0].unit else ""
        errors = [metric.error for metric in pair if metric.error is not None]
        error = math.hypot(*errors) if len(errors) == 2 else None
        difference = pair[1].value - pair[0].value
        sign = "−" if difference < 0 else "+"
        text = sign + shown_with(abs(difference), error)
        if not difference:
            text = "0"
        rows.append(f"| {name}{unit} | {shown[0]} | {shown[1]} | {text} |")
    return rows


def shown_with(value: int | float, error: float | None) -> str:
    """Value and error with as many digits as tell something."""
    if isinstance(value, int) and error is None:
        return f"{value:,}"
    least = abs(error) if error else abs(value) / 1000
    digits = 2 if not least else max(0, min(9, 1 - math.floor(math.log10(least))))
    return with_error(value, error, digits)


def loss_row(one: Path, other: Path, link: str) -> str | None:
    """Perplexities of the same tokens, paired; None where they are not the same."""
    from workflow_scripts.scoring.token_scores import TokenScores

    paths = [folder / "evaluation" / f"{link}.tokens.parquet" for folder in (one, other)]
    if not all(path.is_file() for path in paths):
        return None
    scores = [TokenScores.read(path) for path in paths]
    if not scores[1].scores_the_same(scores[0]):
        return None
    change = change_of_perplexity(*scores[1].difference(scores[0]))
    return f"| perplexity, paired by token, % | | | {change} |"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
