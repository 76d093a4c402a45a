"""Write the page on a dataset: what was kept, what was rejected and why, with samples.

python -m workflow_scripts.report.report_cleaning --report clean/cleaning_report.json
    --rejected clean/rejected.parquet --page cleaning_report.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.cleaning import CleaningReport

OUTPUT_VERSION = 1
logger = log.stage_logger("report_cleaning")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="report of clean_dataset")
    parser.add_argument("--rejected", type=Path, required=True, help="its rejected conversations")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import cleaning_page

    report = CleaningReport.read(arguments.report)
    page = cleaning_page.page(report, arguments.rejected, source=str(arguments.report))
    files.write_text(arguments.page, page)
    logger.info("wrote n_read=%d path=%s", report.n_read, arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
