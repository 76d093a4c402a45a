"""Print two finished runs side by side, possibly from two folders of results.

Every figure that both runs have is printed with the difference and its error. Where the same tokens
were scored, the change of perplexity is paired by token.

python -m workflow_scripts.report.compare results/runs/generic results/runs/mistral
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.metrics import Metric, RunMetrics
from workflow_scripts.log import StageError
from workflow_scripts.report.tables import change_of_perplexity, digits_of, with_error
from workflow_scripts.scoring.token_scores import TokenScores

logger = log.stage_logger("compare")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, help="results/runs/<run> of a finished report")
    arguments = parser.parse_args(argv)
    print(compared(*arguments.runs))


def compared(one: Path, other: Path) -> str:
    """One Markdown table per link."""
    metrics = [read(folder) for folder in (one, other)]
    names = [metric.run for metric in metrics]
    if names[0] == names[1]:
        names = [str(one), str(other)]
    header = f"| | {names[0]} | {names[1]} | difference |\n| --- | ---: | ---: | ---: |"
    return "\n\n".join(
        "\n".join(
            [
                f"### {link}\n\n{header}",
                *loss_rows(one, other, link),
                *rows_of(by_name, metrics[1].links[link]),
            ]
        )
        for link, by_name in metrics[0].links.items()
        if link in metrics[1].links
    )


def read(folder: Path) -> RunMetrics:
    """Metrics of a run.

    Raises:
        StageError: the run has none.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise StageError(
            "the run has no metrics",
            where=path,
            expected="results/runs/<run> of a build with a finished report",
            to_fix="snakemake --cores 8 report",
        )
    return RunMetrics.read(path)


def rows_of(one: Mapping[str, Metric], other: Mapping[str, Metric]) -> Iterator[str]:
    """One row per metric that both runs have."""
    for name in [name for name in one if name in other]:
        pair = (one[name], other[name])
        shown = [shown_with(metric.value, metric.error) for metric in pair]
        unit = f", {pair[0].unit}" if pair[0].unit else ""
        errors = [metric.error for metric in pair if metric.error is not None]
        error = math.hypot(*errors) if len(errors) == 2 else None
        difference = pair[1].value - pair[0].value
        sign = "−" if difference < 0 else "+"
        text = sign + shown_with(abs(difference), error) if difference else "0"
        yield f"| {name}{unit} | {shown[0]} | {shown[1]} | {text} |"


def shown_with(value: int | float, error: float | None) -> str:
    """Value and error with two digits of the error, or five of a value without one."""
    if isinstance(value, int) and error is None:
        return f"{value:,}"
    least = abs(error or value / 1000)
    return with_error(value, error, min(9, digits_of(least, least=0)) if least else 2)


def loss_rows(one: Path, other: Path, link: str) -> Iterator[str]:
    """Change of perplexity paired by token; no row where different tokens were scored."""
    paths = [folder / "evaluation" / f"{link}.tokens.parquet" for folder in (one, other)]
    if all(path.is_file() for path in paths):
        before, after = map(TokenScores.read, paths)
        if after.scores_the_same(before):
            change = change_of_perplexity(*after.difference(before))
            yield f"| perplexity, paired by token, % | | | {change} |"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
