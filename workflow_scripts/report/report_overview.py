"""The first page of the report: the runs side by side, what may be said of their differences, the
hand-overs that were proven, answers to read, and published figures beside what was measured here.

python -m workflow_scripts.report.report_overview --chains results/runs/*/chain.json
    --sampled mistral --samples base F16 Q4_K_M
    --records .snakemake/metadata --page overview.html --headline headline.md
"""

from __future__ import annotations

import argparse
import graphlib
from collections.abc import Collection, Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.handover.answers import Answer
from workflow_scripts.report import figures, plots, results, samples, stages, verdicts
from workflow_scripts.report.claims import Claim, claims
from workflow_scripts.report.comparison_table import comparison
from workflow_scripts.report.metric_sources import measured_files
from workflow_scripts.report.results import Gates, RunResults
from workflow_scripts.report.tables import Table

OUTPUT_VERSION = 5
MOST_SAMPLES = 4
logger = log.stage_logger("report_overview")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--sampled", nargs="+", default=[], help="runs whose answers are shown")
    parser.add_argument(
        "--samples", nargs="+", default=[], help="links that answered, the base first"
    )
    parser.add_argument(
        "--records", type=Path, required=True, help="what Snakemake noted of each file it made"
    )
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    parser.add_argument("--headline", type=Path, required=True, help="to write: Markdown")
    arguments = parser.parse_args(argv)

    runs = results.read_results(arguments.chains, arguments.also)
    said = [*verdicts.of_runs(runs), *(one for run in runs for one in verdicts.of_run(run))]
    side_by_side, published = comparison(runs), published_figures(claims(runs))
    gates = [results.read_gates(run.chain) for run in runs]
    sampled = [run for run in runs if run.name in arguments.sampled]
    body = "".join(map(pages.paragraph, said))
    body += table_html(side_by_side)
    body += samples_html(sampled, arguments.samples)
    body += "<h2>Nothing lost on the way</h2>" + handovers_html(runs, gates)
    body += figures.inline(
        plots.chain(runs), "Perplexity of every link; bars are one standard error of the link alone"
    )
    body += f"<h2>{pages.visible(published.title)}</h2>" + table_html(published, is_of_words=True)
    body += "<h2>How the figures came about</h2>" + stages_html(
        runs, arguments.also, arguments.records
    )
    files.write_text(arguments.page, pages.page("Overview", body))
    headline = [
        "## Headline",
        "\n".join(f"- {sentence}" for sentence in said),
        side_by_side.as_markdown(),
        published.as_markdown(),
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


def stages_html(runs: Sequence[RunResults], also: Collection[str], records: Path) -> str:
    """What was run to make the files that the metrics stand in, from first to last."""
    measured = {file for run in runs for file in measured_files(run.chain, also)}
    found = stages.stages_of(sorted(measured), records)
    if not found.stages:
        return '<p class="quiet">Snakemake kept no record of how they were made.</p>'
    minutes = sum(stage.seconds for stage in found.stages) / 60
    caption = (
        "Every step behind the figures of this page, as Snakemake recorded it: what a step reads"
        " stands above it, with a line where nothing between says so already. Each box: program,"
        f" folder of it, jobs, and their time from start to last file, {minutes:,.1f} minutes in"
        " all, jobs side by side counted each."
    )
    if found.n_unrecorded:
        caption += (
            f" Of {pages.counted(found.n_unrecorded, 'file')} there is no record: what made only"
            " these is not shown."
        )
    try:
        return stages.figure(found, caption)
    except graphlib.CycleError:
        return '<p class="quiet">The steps follow each other in a circle: no figure of them.</p>'


def table_html(table: Table, *, is_of_words: bool = False) -> str:
    drawn = pages.table(table.header, table.rows, is_of_words=is_of_words)
    return drawn + pages.remark(table.note)


def published_figures(found: Sequence[Claim]) -> Table:
    return Table(
        title="Published figures, and what is known here",
        note=(
            "“Measured” is of the runs of this build, on this machine; “computed from shapes” needs"
            " no run; what is “not measured here” is said to be so, not repeated."
        ),
        header=["", "published", "here", "how", "verdict"],
        rows=[[one.what, one.published, one.here, one.kind, one.verdict] for one in found],
    )


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
