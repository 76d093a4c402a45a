"""Write the scores of every link in tasks with a right answer, and the paired changes.

python -m workflow_scripts.report.report_tasks --chains results/runs/*/chain.json
    --tasks base merged --kinds references --tsv tasks.tsv --markdown tasks.md --html tasks.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.chain import Chain
from workflow_scripts.report import results, tables
from workflow_scripts.report.task_table import read, tasks

OUTPUT_VERSION = 1
logger = log.stage_logger("report_tasks")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--chains", nargs="+", type=Path, required=True, help="chain.json of each run"
    )
    results.add_task_arguments(parser)
    tables.add_arguments(parser)
    arguments = parser.parse_args(argv)

    asked = results.Asked(tasks=arguments.tasks, kinds=arguments.kinds)
    runs = {chain.run: read(chain, asked) for chain in map(Chain.read, arguments.chains)}
    table = tasks(runs)
    table.write(tsv=arguments.tsv, markdown=arguments.markdown, html=arguments.html)
    logger.info("wrote n_rows=%d path=%s", len(table.rows), arguments.html)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
