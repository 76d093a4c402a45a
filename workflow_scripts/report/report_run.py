"""Write the page of a run: what it is, what every step measured, how long it took.

python -m workflow_scripts.report.report_run --chains results/runs/mistral/chain.json
    --benchmarks benchmarks/runs/mistral --page results/runs/mistral/report.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.durations import durations
from workflow_scripts.report import results

OUTPUT_VERSION = 5
logger = log.stage_logger("report_run")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    parser.add_argument(
        "--benchmarks",
        type=Path,
        required=True,
        help="folder with the durations of the run's steps",
    )
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import run_page

    (run,) = results.read_results(
        arguments.chains, results.Asked(arguments.context, arguments.tasks, arguments.kinds)
    )
    files.write_text(arguments.page, run_page.page(run, durations(arguments.benchmarks)))
    logger.info("wrote path=%s", arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
