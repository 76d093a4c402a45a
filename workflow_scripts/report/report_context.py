"""Usable context of every link: scores by length, effective lengths, what long context gains.

python -m workflow_scripts.report.report_context --chains results/runs/*/chain.json
    --context base merged --tsv context.tsv --markdown context.md --html context.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log, pages
from workflow_scripts.handover.chain import Chain
from workflow_scripts.report import figures, plots, results, tables
from workflow_scripts.report.context_table import context, read

OUTPUT_VERSION = 3
logger = log.stage_logger("report_context")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--chains", nargs="+", type=Path, required=True, help="of write_chain")
    results.add_context_argument(parser)
    tables.add_arguments(parser)
    arguments = parser.parse_args(argv)

    runs = {
        chain.run: read(chain, arguments.context) for chain in map(Chain.read, arguments.chains)
    }
    table = context(runs)
    below = ""
    for name, links in runs.items():
        below += f"<h2>{pages.visible(name)}</h2>" + figures.inline(
            plots.heat_maps(links),
            f"{name}: right answers by length of the prompt and depth of the fact, of the tasks"
            " that have a depth",
        )
    table.write(arguments, below=below)
    logger.info("wrote n_runs=%d path=%s", len(runs), arguments.html)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
