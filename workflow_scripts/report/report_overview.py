"""Write the first page of the report: runs side by side, their differences in words, hand-overs,
and answers to read.

python -m workflow_scripts.report.report_overview --chains results/runs/*/chain.json
    --sampled mistral --samples base F16 Q4_K_M --page overview.html --headline headline.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.handover.answers import Answer
from workflow_scripts.report import results, samples, verdicts
from workflow_scripts.report.comparison_table import comparison
from workflow_scripts.report.results import RunResults
from workflow_scripts.report.samples import Question
from workflow_scripts.report.tables import Table, signed

OUTPUT_VERSION = 6
MOST_SAMPLES = 4
logger = log.stage_logger("report_overview")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--sampled", nargs="+", default=[], help="runs whose answers are shown")
    parser.add_argument(
        "--samples", nargs="+", default=[], help="links that answered, the base first"
    )
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    parser.add_argument("--headline", type=Path, required=True, help="to write: Markdown")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import figures, plots

    runs = results.read_results(
        arguments.chains, results.Asked(arguments.context, arguments.tasks, arguments.kinds)
    )
    said = [*verdicts.of_runs(runs), *(one for run in runs for one in verdicts.of_run(run))]
    side_by_side = comparison(runs)
    page = pages.render(
        "overview.html.j2",
        verdicts=said,
        comparison=side_by_side,
        asked=questions([run for run in runs if run.name in arguments.sampled], arguments.samples),
        gates=gates_table(runs),
        chain=figures.inline(plots.chain(runs)),
    )
    files.write_text(arguments.page, page)
    headline = [
        "## Headline",
        "\n".join(f"- {sentence}" for sentence in said),
        side_by_side.as_markdown(),
    ]
    files.write_text(arguments.headline, "\n\n".join(headline) + "\n")
    logger.info("wrote n_runs=%d path=%s", len(runs), arguments.page)


def questions(
    runs: Sequence[RunResults], links: Sequence[str]
) -> dict[tuple[str, str], list[Question]]:
    """Questions of the test split with the answers of every run, by base model and dataset.

    Runs of one base model and dataset answered the same questions, so they share a table.

    Args:
        links: of each run, the base first.
    """
    by_data: dict[tuple[str, str], dict[str, tuple[Answer, ...]]] = {}
    for run in runs:
        answers = by_data.setdefault(run.data, {})
        for link, given in samples.read(run.chain, links).items():
            name = "base" if link == "base" else f"{run.name}, {link}"
            answers[name] = given[:MOST_SAMPLES]
    return {data: samples.questions(answers) for data, answers in by_data.items()}


def gates_table(runs: Sequence[RunResults]) -> Table:
    """Measurements of each gate, one row per run."""
    quantizations = [link.name for link in runs[0].links if link.divergence is not None]
    rows = []
    for run in runs:
        gates = results.read_gates(run.chain)
        divergences = [run.link(link).divergence for link in quantizations]
        rows.append(
            [
                run.name,
                nats(gates.merged.kl_divergence_nats if gates.merged else None),
                change(gates.merged.perplexity_increase_fraction if gates.merged else None),
                nats(gates.gguf.kl_divergence_nats),
                *(nats(one.kl_divergence_nats if one else None) for one in divergences),
            ]
        )
    return Table(
        title="Hand-overs",
        note="Each hand-over is compared with an independent reference. The figures are KL"
        " divergences in nats per token; for the step from the trained model to the merged"
        " model, the figure is the change of perplexity on validation text.",
        header=["run", "base + adapter → merged", "trained model → merged", "merged → F16 GGUF"]
        + [f"F16 → {link}" for link in quantizations],
        rows=rows,
    )


def nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def change(fraction: float | None) -> str:
    return "–" if fraction is None else f"{signed(100 * fraction)}%"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
