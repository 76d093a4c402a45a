"""The first page of the report: the runs side by side, what may be said of their differences, the
hand-overs that were proven, and answers to read.

python -m workflow_scripts.report.report_overview --chains results/runs/*/chain.json
    --sampled mistral --samples base F16 Q4_K_M --page overview.html --headline headline.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.handover.answers import Answer
from workflow_scripts.report import figures, plots, results, samples, verdicts
from workflow_scripts.report.comparison_table import comparison
from workflow_scripts.report.results import Gates, RunResults
from workflow_scripts.report.tables import Table

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

    runs = results.read_results(arguments.chains, results.Asked.of(arguments))
    said = [*verdicts.of_runs(runs), *(one for run in runs for one in verdicts.of_run(run))]
    side_by_side = comparison(runs)
    gates = [results.read_gates(run.chain) for run in runs]
    sampled = [run for run in runs if run.name in arguments.sampled]
    body = "".join(map(pages.paragraph, said))
    body += table_html(side_by_side)
    body += samples_html(sampled, arguments.samples)
    body += "<h2>Nothing lost on the way</h2>" + handovers_html(runs, gates)
    body += figures.inline(
        plots.chain(runs), "Perplexity of every link; bars are one standard error of the link alone"
    )
    files.write_text(arguments.page, pages.page("Overview", body))
    headline = [
        "## Headline",
        "\n".join(f"- {sentence}" for sentence in said),
        side_by_side.as_markdown(),
    ]
    files.write_text(arguments.headline, "\n\n".join(headline) + "\n")
    logger.info("wrote n_runs=%d path=%s", len(runs), arguments.page)


def samples_html(runs: Sequence[RunResults], links: Sequence[str]) -> str:
    """Questions of the test split with the answers of every run, side by side.

    Runs of one base and dataset answered the same questions; their answers share a table.

    Args:
        links: of each run, the base first.
    """
    if not runs:
        return ""
    by_questions: dict[tuple[str, str], dict[str, tuple[Answer, ...]]] = {}
    for run in runs:
        asked = (run.settings.model, run.settings.dataset)
        answers = by_questions.setdefault(asked, {})
        for link, given in samples.read(run.chain, links).items():
            answers["base" if link == "base" else f"{run.name}, {link}"] = given
    shown = "".join(
        (pages.paragraph(f"`{model}` on `{dataset}`") if len(by_questions) > 1 else "")
        + samples.as_html({link: given[:MOST_SAMPLES] for link, given in answers.items()})
        for (model, dataset), answers in by_questions.items()
    )
    return "<h2>The same questions, before and after</h2>" + pages.remark(samples.REMARK) + shown


def table_html(table: Table) -> str:
    return pages.table(table.header, table.rows) + pages.remark(table.note)


def handovers_html(runs: Sequence[RunResults], gates: Sequence[Gates]) -> str:
    """What each gate measured, run by run."""
    quantizations = [link.name for link in runs[0].links if link.divergence is not None]
    rows = [
        [
            run.name,
            nats(of_run.merged.kl_divergence_nats if of_run.merged else None),
            change(of_run.merged.perplexity_increase_fraction if of_run.merged else None),
            nats(of_run.gguf.kl_divergence_nats),
            *(nats(quantization(run, link)) for link in quantizations),
        ]
        for run, of_run in zip(runs, gates, strict=True)
    ]
    header = ["run", "base + adapter → merged", "trained → merged", "merged → F16 GGUF"]
    header += [f"F16 → {link}" for link in quantizations]
    note = (
        "Each hand-over against an independent reference: KL divergence in nats a token, and for"
        " the model as it was trained the change of perplexity on validation text."
    )
    return pages.table(header, rows) + f'<p class="quiet">{note}</p>'


def quantization(run: RunResults, link: str) -> float | None:
    divergence = run.link(link).divergence
    return divergence.kl_divergence_nats if divergence else None


def nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def change(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:+.2%}"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
