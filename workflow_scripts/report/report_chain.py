"""Write the perplexity of every link, from the base to each quantized file, with the cost of each.

python -m workflow_scripts.report.report_chain --chains results/runs/mistral/chain.json
    --tsv chain.tsv --markdown chain.md --html chain.html --figure chain.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.report import results, tables

OUTPUT_VERSION = 4
logger = log.stage_logger("report_chain")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    tables.add_arguments(parser)
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import chain_table, figures, plots

    runs = results.read_results(
        arguments.chains, results.Asked(arguments.context, arguments.tasks, arguments.kinds)
    )
    table = chain_table.chain(runs)
    table.write(tsv=arguments.tsv, markdown=arguments.markdown, html=arguments.html)
    figures.save(plots.chain(runs), arguments.figure)
    logger.info("wrote n_runs=%d path=%s", len(runs), arguments.html)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
