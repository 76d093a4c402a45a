"""Write the page with the answers of every link to the same prompts, side by side.

python -m workflow_scripts.report.report_samples --chains results/runs/*/chain.json
    --page results/report/samples.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.handover.chain import Chain
from workflow_scripts.report import samples

OUTPUT_VERSION = 2
logger = log.stage_logger("report_samples")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--chains", nargs="+", type=Path, required=True, help="chain.json of each run"
    )
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    chains = [Chain.read(path) for path in arguments.chains]
    by_run = {chain.run: samples.questions(samples.read(chain)) for chain in chains}
    files.write_text(arguments.page, pages.render("samples.html.j2", by_run=by_run))
    logger.info("wrote n_runs=%d path=%s", len(chains), arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
