"""Write the usable context of every link: scores by length, effective lengths, gain.

python -m workflow_scripts.report.report_context --chains results/runs/*/chain.json
    --context base merged --tsv context.tsv --markdown context.md --html context.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.chain import Chain
from workflow_scripts.report import results, tables
from workflow_scripts.report.context_table import HEAT_MAP_CAPTION, context, read
from workflow_scripts.report.tables import Plot

OUTPUT_VERSION = 3
logger = log.stage_logger("report_context")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--chains", nargs="+", type=Path, required=True, help="chain.json of each run"
    )
    results.add_context_argument(parser)
    tables.add_arguments(parser)
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import figures, plots

    runs = {
        chain.run: read(chain, arguments.context) for chain in map(Chain.read, arguments.chains)
    }
    context(runs).write(
        tsv=arguments.tsv,
        markdown=arguments.markdown,
        html=arguments.html,
        plots=[
            Plot(
                name,
                figures.inline(plots.heat_maps(links)),
                f"{name}: {HEAT_MAP_CAPTION}",
            )
            for name, links in runs.items()
        ],
    )
    logger.info("wrote n_runs=%d path=%s", len(runs), arguments.html)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
