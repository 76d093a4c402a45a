"""Write the headline table: the runs side by side.

python -m workflow_scripts.report.report_comparison --chains results/runs/*/chain.json
    --tsv comparison.tsv --markdown comparison.md --html comparison.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from workflow_scripts import log
from workflow_scripts.report import results, tables
from workflow_scripts.report.comparison_table import comparison

OUTPUT_VERSION = 4
logger = log.stage_logger("report_comparison")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    tables.add_arguments(parser)
    arguments = parser.parse_args(argv)

    runs = results.read_results(
        arguments.chains, results.Asked(arguments.context, arguments.tasks, arguments.kinds)
    )
    comparison(runs).write(tsv=arguments.tsv, markdown=arguments.markdown, html=arguments.html)
    logger.info("wrote n_runs=%d path=%s", len(runs), arguments.html)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
