"""Answers of every link to the same prompts, side by side: examples to read.

python -m workflow_scripts.report.report_samples --runs '{"runs": …, "gguf_types": …}'
    --results results --page results/report/samples.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.report import samples
from workflow_scripts.report.results import Wanted

OUTPUT_VERSION = 2
logger = log.stage_logger("report_samples")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--runs", required=True, help="JSON of the runs and GGUF types")
    parser.add_argument("--results", type=Path, required=True, help="folder of all results")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    wanted = Wanted.read(arguments.runs)
    links = ["base", "merged", *wanted.gguf_types]
    body = "".join(
        f"<h2>{pages.visible(run)}</h2>"
        + samples.as_html(samples.read(run, settings, links, arguments.results))
        for run, settings in wanted.runs.items()
    )
    files.write_text(arguments.page, pages.page("Answers", pages.remark(samples.REMARK) + body))
    logger.info("wrote n_runs=%d path=%s", len(wanted.runs), arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
