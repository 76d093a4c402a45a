"""Show what cleaning kept and what it did not: the funnel, and samples of each reason.

python -m workflow_scripts.report.report_cleaning --report clean/cleaning_report.json
    --rejected clean/rejected.parquet --page cleaning_report.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.report.cleaning_page import (
    corrections_html,
    funnel_html,
    kept_html,
    personal_data_html,
    read_samples,
    rejected_html,
    sources_html,
)

OUTPUT_VERSION = 1
logger = log.stage_logger("report_cleaning")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="counts of clean_dataset")
    parser.add_argument("--rejected", type=Path, required=True, help="what it did not keep")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    report = CleaningReport.read(arguments.report)
    sections = {
        "From read to kept": funnel_html(report),
        "Corrections": corrections_html(report),
        "Sources": sources_html(report.by_source),
        "Kept conversations": kept_html(report),
        "Personal data": personal_data_html(report.personal_data),
        "Rejected": rejected_html(report, read_samples(arguments.rejected)),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{section}" for title, section in sections.items())
    intro = f'<p class="quiet">{pages.visible(str(arguments.report))}</p>'
    files.write_text(arguments.page, pages.page("Cleaning of the dataset", intro + body))
    logger.info("wrote n_read=%d path=%s", report.n_read, arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
