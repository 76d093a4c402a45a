"""Draw the loss of training by optimizer step, with the validation loss of every run.

python -m workflow_scripts.report.report_loss --histories results/runs/*/adapter/history.json
    --figure loss.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.training import History

OUTPUT_VERSION = 1
logger = log.stage_logger("report_loss")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--histories", type=Path, nargs="+", required=True, help="history.json of each run"
    )
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    from workflow_scripts.report import figures, plots

    histories = {path.parts[-3]: History.read(path) for path in arguments.histories}
    figures.save(plots.training_curves(histories), arguments.figure)
    logger.info("wrote n_runs=%d path=%s", len(histories), arguments.figure)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
